"""Kernel, training step, scoring and the memory of a large student on one GPU, each against what there is.

    python benchmarks/gpu.py

prints one JSON line per figure: ours, against, ratio (ours / against, or the share reached) and its goal.
Each case runs in a process of its own that is ended after its time limit, and none begins or goes on after
eight minutes; a case without a figure, or a peer that is not there, is one plain line. Peers (Liger's fused
cross-entropy, Cut Cross-Entropy) are installed into build/gpu-peers, from benchmarks/wheels or the registry,
unless `--no-peers` is given.

`--device cpu --tiny` runs every case on a CPU at sizes that say nothing, to see that the file itself works.
"""

# N = positions, D = hidden size, V = vocabulary, M = ids requested per position

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from support.gpu_cases import CASES, Sizes
from support.peers import install_peers

PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
"""Dense bfloat16, by words in the card's name."""
PRODUCT_FLOPS = 700e12
"""What large bfloat16 products reach on an H100; four of them are the kernel's limit."""
PEERS = {
    "liger": ("liger_kernel", "liger-kernel==0.8.5"),
    "cce": ("cut_cross_entropy", "cut-cross-entropy==25.1.1"),
}
KERNEL_CONTENDERS = ("ours", "liger", "cce", "chunked", "dense")
TIME_LIMIT_S = 100
TOTAL_LIMIT_S = 480
CARD_GIB = 76
"""What the 8B student may take of a card of 80 GB: the driver and the allocator's gaps need the rest."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="sizes that say nothing")
    parser.add_argument("--no-peers", action="store_true", help="do not install what ours is compared with")
    parser.add_argument("--time-limit-s", type=float, default=TIME_LIMIT_S, help="of one case")
    parser.add_argument("--total-limit-s", type=float, default=TOTAL_LIMIT_S, help="of all cases")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        job = json.loads(options.worker)
        print("\n" + json.dumps(CASES[job.pop("case")](Sizes(**job.pop("sizes")), **job)))
        return
    if options.device == "cuda" and not _has_gpu():
        sys.exit("no GPU here; `--device cpu --tiny` shows that the benchmark runs")
    run = Run(options)
    run.kernel()
    run.step()
    run.scoring()
    run.large()


def _has_gpu() -> bool:
    command = [sys.executable, "-c", "import torch; raise SystemExit(not torch.cuda.is_available())"]
    return subprocess.run(command, check=False).returncode == 0


class Run:
    """One run over all cases."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.sizes = Sizes.tiny(options.device) if options.tiny else Sizes.full(options.device)
        self.time_limit_s = options.time_limit_s
        self.ends_s = time.monotonic() + options.total_limit_s
        self.device_name = "CPU, figures say nothing about a GPU" if options.device == "cpu" else ""
        # On a few cores a pool of compilers takes longer to start than it saves.
        few = {"TORCHINDUCTOR_COMPILE_THREADS": "1"} if options.device == "cpu" else {}
        self.environment = {**os.environ, **few}
        self.python = sys.executable
        if not options.no_peers:
            self.python = str(install_peers("gpu-peers", [package for _, package in PEERS.values()]))
        self.missing = {name for name, (module, _) in PEERS.items() if not self._has(module)}
        for name in sorted(self.missing):
            print(f"{PEERS[name][1]} is not there: its figures are left out", flush=True)

    def kernel(self) -> None:
        """Time and memory of every contender, at every shape; only ours and dense have a tail."""
        for num_positions, hidden_size in self.sizes.kernel_shapes:
            for num_ids in (1, 65):
                names = KERNEL_CONTENDERS if num_ids == 1 else ("ours",)
                found = {
                    name: self.measure("kernel", contender=name, shape=[num_positions, hidden_size, num_ids])
                    for name in names
                    if name not in self.missing
                }
                if num_ids == 1:
                    peers = {name: one for name, one in found.items() if one and name != "ours"}
                self._kernel_lines(f"n{num_positions}_d{hidden_size}_m{num_ids}", found.get("ours"), peers)
                limit_ms = 8 * num_positions * hidden_size * self.sizes.vocabulary / PRODUCT_FLOPS * 1e3
                goal = "<= 1.6" if num_positions > 8192 or hidden_size > 1024 else "none"
                if found.get("ours"):
                    name = f"kernel_limit_n{num_positions}_d{hidden_size}_m{num_ids}"
                    self.report(
                        name, found["ours"]["ms"], limit_ms, goal, "ms", "four products at 700 TFLOP/s"
                    )

    def _kernel_lines(self, name: str, ours: Any, peers: dict[str, Any]) -> None:
        if not ours or not peers:
            return
        fastest = min(peers, key=lambda peer: peers[peer]["ms"])
        times = {peer: round(one["ms"], 3) for peer, one in peers.items()}
        self.report(
            f"kernel_time_{name}", ours["ms"], peers[fastest]["ms"], "<= 0.95", "ms", fastest, times=times
        )
        if "liger" in peers:
            self.report(f"kernel_memory_{name}", ours["mib"], peers["liger"]["mib"], "<= 1.1", "MiB", "liger")

    def step(self) -> None:
        """A whole optimiser step against fine-tuning with the fastest loss that is there."""
        peer = "chunked" if "liger" in self.missing else "liger"
        with self.cache() as path:
            sft = self.measure("step", contender=f"sft_{peer}", path=path)
            goals = {"sampled": "<= 1.0", "top64": "<= 1.03", "packed": "none", "compiled": "<= 0.55"}
            for name, goal in goals.items():
                ours = self.measure("step", contender=name, path=path)
                if not ours or not sft:
                    continue
                self.report(
                    f"step_time_{name}",
                    ours["s"],
                    sft["s"],
                    goal,
                    "s",
                    f"sft, {peer}",
                    first_s=ours["first_s"],
                )
                self.report(f"step_memory_{name}", ours["mib"], sft["mib"], "none", "MiB", f"sft, {peer}")
                peak = next((flops for word, flops in PEAK_FLOPS.items() if word in ours["card"]), None)
                if name == "compiled" and peak:
                    reached = ours["flops"] / ours["s"]
                    self.report(
                        "step_flops_compiled", reached, peak, ">= 0.35", "FLOP/s", "dense bfloat16 peak"
                    )

    def scoring(self) -> None:
        """Response tokens a second of top-64 scores, against the bare forward pass and head."""
        found = {name: self.measure("scoring", contender=name) for name in ("ours", "bare")}
        if all(found.values()):
            ours, bare = (found[name]["tokens_per_s"] for name in ("ours", "bare"))
            self.report("scoring_top64", ours, bare, ">= 0.95", "tokens/s", "forward pass and head alone")

    def large(self) -> None:
        """Peak of a full fine-tune of the 8B shape on one card, and what the run said before it began."""
        found = self.measure("large")
        if found:
            self.report("large_peak", found["peak_gib"], CARD_GIB, "<= 1.0", "GiB", "a card of 80 GB")
            self.report(
                "large_estimate",
                found["estimate_gib"],
                found["peak_gib"],
                "0.85 to 1.15",
                "GiB",
                "its peak",
                split=found["split"],
                step_s=_short(found["s"]),
            )

    def measure(self, case: str, **job: Any) -> Any:
        """What a case measures in a process of its own; None, and a plain line, where it does not."""
        arguments = json.dumps({"case": case, "sizes": self.sizes._asdict(), **job})
        command = [self.python, __file__, "--worker", arguments]
        named = " ".join(str(value) for value in (case, *job.values()) if not str(value).startswith("/"))
        limit_s = min(self.time_limit_s, self.ends_s - time.monotonic())
        if limit_s <= 0:
            print(f"{named}: not begun, the time for all cases is over", flush=True)
            return None
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=limit_s, check=False, env=self.environment
            )
        except subprocess.TimeoutExpired:
            print(f"{named}: not done after {limit_s:.3g} s, ended", flush=True)
            return None
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            print(f"{named}: failed ({reason[:200]})", flush=True)
            return None
        return json.loads(done.stdout.splitlines()[-1])

    def report(
        self, name: str, ours: float, against: float, goal: str, unit: str, peer: str, **more: Any
    ) -> None:
        """One figure as one JSON line."""
        figures = {"ours": _short(ours), "against": _short(against), "ratio": _short(ours / against)}
        where = {"device": self.device_name} if self.device_name else {}
        print(
            json.dumps({"name": name, **figures, "goal": goal, "unit": unit, "peer": peer, **more, **where}),
            flush=True,
        )

    @contextmanager
    def cache(self) -> Iterator[str]:
        """A random cache of the step's rollouts."""
        from support.workers import write_cache

        with tempfile.TemporaryDirectory() as folder:
            rollouts, lengths = self.sizes.step_rollouts, tuple(self.sizes.step_lengths)
            write_cache(
                Path(folder) / "cache",
                num_shards=1,
                per_shard=rollouts,
                top_k=64,
                vocabulary_size=self.sizes.vocabulary,
                lengths=lengths,
                prompt_tokens=self.sizes.prompt_tokens,
            )
            yield str(Path(folder) / "cache")

    def _has(self, module: str) -> bool:
        command = [
            self.python,
            "-c",
            f"import importlib.util as u; raise SystemExit(u.find_spec({module!r}) is None)",
        ]
        return subprocess.run(command, check=False).returncode == 0


def _short(number: float) -> float:
    return float(f"{number:.4g}")


if __name__ == "__main__":
    main()
