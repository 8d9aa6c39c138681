"""Time and memory of `selected_logprobs` against dense log-softmax and checkpointed cross-entropy.

    python benchmarks/kernel.py

prints one JSON line per figure: ours, against, ratio (ours / against) and the goal for that ratio. Each is
forward plus backward, in float32, with gradients for hidden states and head.

Time is the median over interleaved rounds of CPU seconds on one thread: what an idle core would take, however
busy the machine is. Memory is the growth of the peak resident set in a fresh process per case; the gradient
of the head itself (V * D * 4 bytes) is part of it for everyone.

With M = 1 the others return the sampled token's log-probability. With M = 65 the dense peer also returns the
tail, the cheap way (1 - sum); ours sums the tokens outside. Ours and dense also return the entropy.
"""

# N = positions, D = hidden size, V = vocabulary, M = ids asked per position

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple

# torch is imported in the workers only: a child inherits its parent's peak memory on Linux.
if TYPE_CHECKING:
    from torch import Tensor

HIDDEN_SIZE = 576
NUM_ROUNDS = 3
PEER_CHUNK = 256
# Time per logit hardly depends on the number of positions. Memory does, so it is taken at one number for all.
TIMED_POSITIONS = {49_152: 1024, 151_936: 256}
MEMORY_POSITIONS = 1024
TIME_GOAL = {"dense": 1.3, "chunked_cross_entropy": 1.05}
MEMORY_GOAL = {"dense": 0.5, "chunked_cross_entropy": 1.0}
PEER_NAMES = {
    "dense": "torch log_softmax + gather + entropy",
    "chunked_cross_entropy": f"torch cross_entropy, checkpointed chunks of {PEER_CHUNK} positions",
}


class Inputs(NamedTuple):
    hidden_ND: Tensor
    head_VD: Tensor
    ids_NM: Tensor


def make_inputs(num_positions: int, num_vocab: int, num_asked: int) -> Inputs:
    """Logits with a standard deviation near 1.2, made without temporary copies."""
    import torch

    generator = torch.Generator().manual_seed(0)
    return Inputs(
        torch.empty(num_positions, HIDDEN_SIZE).normal_(generator=generator).requires_grad_(),
        torch.empty(num_vocab, HIDDEN_SIZE).normal_(std=0.05, generator=generator).requires_grad_(),
        torch.randint(0, num_vocab, (num_positions, num_asked), generator=generator),
    )


def run_ours(inputs: Inputs) -> None:
    import torch

    from lightopd.kernels.selected_logprobs import selected_logprobs

    num_positions, num_asked = inputs.ids_NM.shape
    in_set = torch.ones(num_positions, 1, num_asked, dtype=torch.bool) if num_asked > 1 else None
    selected = selected_logprobs(*inputs, member_NSM=in_set)
    (selected.logprobs_NM.sum() + selected.tail_logprobs_NS.sum()).backward()


def run_dense(inputs: Inputs) -> None:
    import torch

    logprobs_NV = (inputs.hidden_ND @ inputs.head_VD.T).log_softmax(-1)
    logprobs_NM = logprobs_NV.gather(1, inputs.ids_NM)
    with torch.no_grad():
        _entropy_N = -(logprobs_NV.exp() * logprobs_NV).sum(-1)
    loss = logprobs_NM.sum()
    if inputs.ids_NM.shape[1] > 1:
        loss = loss + torch.log1p(-logprobs_NM.exp().sum(-1).clamp(max=0.999)).sum()
    loss.backward()


def run_chunked_cross_entropy(inputs: Inputs) -> None:
    import torch
    from torch.utils.checkpoint import checkpoint

    def chunk_loss(hidden_CD: Tensor, ids_C: Tensor) -> Tensor:
        logits_CV = hidden_CD @ inputs.head_VD.T
        return torch.nn.functional.cross_entropy(logits_CV, ids_C, reduction="none")

    chunks = zip(inputs.hidden_ND.split(PEER_CHUNK), inputs.ids_NM[:, 0].split(PEER_CHUNK), strict=True)
    losses = [checkpoint(chunk_loss, hidden, ids, use_reentrant=False) for hidden, ids in chunks]
    torch.cat(losses).sum().backward()


CONTENDERS: dict[str, Callable[[Inputs], None]] = {
    "ours": run_ours,
    "dense": run_dense,
    "chunked_cross_entropy": run_chunked_cross_entropy,
}


def measure_time(
    contenders: list[str], num_positions: int, num_vocab: int, num_asked: int
) -> dict[str, float]:
    """CPU seconds of each contender, median of interleaved rounds."""
    for name in contenders:
        CONTENDERS[name](make_inputs(8, 64, num_asked))
    inputs = make_inputs(num_positions, num_vocab, num_asked)
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(NUM_ROUNDS):
        for name in contenders:
            inputs.hidden_ND.grad = inputs.head_VD.grad = None
            start = time.process_time()
            CONTENDERS[name](inputs)
            seconds[name].append(time.process_time() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def measure_memory(
    contenders: list[str], num_positions: int, num_vocab: int, num_asked: int
) -> dict[str, float]:
    """MiB by which one contender raises this process's peak; its code is warmed up on a small case first."""
    (name,) = contenders
    CONTENDERS[name](make_inputs(8, 64, num_asked))
    inputs = make_inputs(num_positions, num_vocab, num_asked)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    CONTENDERS[name](inputs)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    kib_per_unit = 1 / 1024 if sys.platform == "darwin" else 1
    return {name: (after - before) * kib_per_unit / 1024}


def in_fresh_process(measure: str, contenders: list[str], *sizes: int) -> dict[str, float]:
    """Run one measurement in a process of its own and return what it prints."""
    command = [sys.executable, __file__, "--worker", json.dumps([measure, contenders, *sizes])]
    finished = subprocess.run(command, check=True, capture_output=True, text=True)
    result: dict[str, float] = json.loads(finished.stdout)
    return result


def work(job: str) -> None:
    import torch

    torch.set_num_threads(1)
    measure, contenders, *sizes = json.loads(job)
    function: Any = {"time": measure_time, "memory": measure_memory}[measure]
    print(json.dumps(function(contenders, *sizes)))


def report(name: str, ours: float, against: float, goal: float, unit: str, peer: str) -> None:
    ratio = round(ours / against, 3)
    figures = {"ours": round(ours, 3), "against": round(against, 3), "ratio": ratio, "goal": f"<= {goal}"}
    print(json.dumps({"name": name, **figures, "unit": unit, "peer": peer}), flush=True)


def report_case(num_vocab: int, num_asked: int) -> None:
    """Time and memory against every peer that can do this case."""
    peers = ["dense", "chunked_cross_entropy"] if num_asked == 1 else ["dense"]
    num_timed = TIMED_POSITIONS[num_vocab]
    seconds = in_fresh_process("time", ["ours", *peers], num_timed, num_vocab, num_asked)
    with ThreadPoolExecutor(max_workers=2) as pool:
        sizes = (MEMORY_POSITIONS, num_vocab, num_asked)
        jobs = [pool.submit(in_fresh_process, "memory", [name], *sizes) for name in ("ours", *peers)]
        mebibytes = {name: value for job in jobs for name, value in job.result().items()}
    for peer in peers:
        name, words = f"v{num_vocab}_m{num_asked}_vs_{peer}", PEER_NAMES[peer]
        report(
            f"kernel_time_n{num_timed}_{name}",
            seconds["ours"],
            seconds[peer],
            TIME_GOAL[peer],
            "CPU seconds",
            words,
        )
        report(
            f"kernel_memory_n{MEMORY_POSITIONS}_{name}",
            mebibytes["ours"],
            mebibytes[peer],
            MEMORY_GOAL[peer],
            "MiB",
            words,
        )


def report_growth(num_vocab: int) -> None:
    """Memory for four times the positions against once: only the gradient by hidden states may grow."""
    with ThreadPoolExecutor(max_workers=2) as pool:
        jobs = [pool.submit(in_fresh_process, "memory", ["ours"], n, num_vocab, 1) for n in (1024, 4096)]
    once, fourfold = (job.result()["ours"] for job in jobs)
    report(
        f"kernel_memory_growth_v{num_vocab}", fourfold, once, 1.2, "MiB", "ours: 4096 against 1024 positions"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    job = parser.parse_args().worker
    if job is not None:
        work(job)
        return
    for num_vocab in TIMED_POSITIONS:
        for num_asked in (1, 65):
            report_case(num_vocab, num_asked)
    report_growth(min(TIMED_POSITIONS))


if __name__ == "__main__":
    main()
