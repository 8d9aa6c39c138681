"""Time and memory of an optimiser step of the trainer against fine-tuning and against a live teacher.

    OMP_NUM_THREADS=1 python benchmarks/train_step.py

prints one JSON line per figure: ours, against, ratio (ours / against) and the goal for that ratio. The
student is a Llama with the width and vocabulary of SmolLM2-135M and fewer layers, in float32, the teacher one
with twice the layers. Ours is the whole step of `StudentModule` under Lightning, its loader included. Against
it stand

- SFT: the same micro-batches of the same tokens already in memory, cross-entropy on the response positions in
  checkpointed chunks, the same clipping and AdamW;
- `trl`: DistillationTrainer 1.16 (reverse KL over the vocabulary) with the teacher in process; it is handed
  the cached responses, so that neither its sampling nor other tokens count.

The compiled step (`compile: true`) takes turns with the eager one, after the first of each.

Time is CPU seconds on one thread. Ours and SFT take turns in one process, each with a student of its own,
and the ratio is the median over pairs. Memory is the growth of the peak resident set during two steps
(weights and libraries are there before) in a fresh process.
"""

# N = response tokens of a micro-batch, D = hidden size, V = vocabulary, C = positions of a chunk

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from support.peers import peer_python
from support.workers import in_process, main, peak_mib, report, write_cache

if TYPE_CHECKING:
    from torch import Tensor

    from lightopd.training.data.batches import Microbatch

SIZES = {
    "vocab_size": 49_152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
STUDENT_LAYERS, TEACHER_LAYERS = 4, 8
ROLLOUTS = 4
LENGTHS = (16, 160)
PROMPT_TOKENS = 16
MICRO_BATCH_TOKENS = 1024
CHUNK = 256
LEARNING_RATE = 1e-6
TIMED_STEPS = 4
TIMED_TRL_STEPS = 2
GOALS = {"sampled": "<= 1.05", "top64": "<= 1.15"}


def make_model(layers: int) -> Any:
    """A Llama with random weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, num_hidden_layers=layers))


def make_ours(path: Path, case: str, steps: int, layout: str) -> tuple[Any, Any]:
    """The module and the data of a run of `lightopd train`."""
    from support.synthetic_cache import open_data

    from lightopd.objectives.requirements import needs
    from lightopd.schemas.finetune import FinetuneConfig, OptimizerConfig
    from lightopd.schemas.objectives.objective import ObjectiveConfig
    from lightopd.training.data.batches import CacheData
    from lightopd.training.module import StudentModule
    from lightopd.training.student.training_mode import prepare_student

    target = {"sampled": {}, "top64": {"target": {"kind": "divergence"}}}[case]
    objective = ObjectiveConfig.model_validate(target)
    finetune = FinetuneConfig(
        steps=steps,
        batch_sequences=ROLLOUTS,
        micro_batch_tokens=MICRO_BATCH_TOKENS,
        layout=layout,
        optimizer=OptimizerConfig(lr=LEARNING_RATE),
    )
    store, index = open_data(path, objective)
    student = prepare_student(make_model(STUDENT_LAYERS), gradient_checkpointing=False)
    return StudentModule(student, objective, needs(objective), finetune), CacheData(store, index, finetune, 0)


def run_ours(module: Any, data: Any, callback: Any) -> None:
    """Lightning's loop over all steps."""
    import warnings

    from lightning.pytorch import Trainer

    warnings.simplefilter("ignore")
    Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        callbacks=[callback],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
    ).fit(module, datamodule=data)


class SftStep:
    """One fine-tuning step over the tokens of a cache."""

    def __init__(self, data: Any) -> None:
        import torch

        from lightopd.schemas.finetune import OptimizerConfig
        from lightopd.training.data.batches import StepDataset, collate
        from lightopd.training.data.plan import make_plan
        from lightopd.training.optimizer import make_optimizer
        from lightopd.training.student.training_mode import prepare_student

        rows = StepDataset(make_plan(data.index, data.finetune, 0, 1), data.store)[0]
        assert isinstance(rows, list)
        self.micro_batches = [collate(one, torch.device("cpu")) for one in rows]
        self.student = prepare_student(make_model(STUDENT_LAYERS), gradient_checkpointing=False)
        self.optimizer = make_optimizer(self.student, OptimizerConfig(lr=LEARNING_RATE))

    def run(self) -> None:
        import torch

        total = sum(len(batch.positions_N) for batch in self.micro_batches)
        for batch in self.micro_batches:
            (self._loss(batch) / total).backward()
        torch.nn.utils.clip_grad_norm_(self.student.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def _loss(self, batch: Microbatch) -> Tensor:
        import torch
        from torch.utils.checkpoint import checkpoint

        head_VD = self.student.lm_head.weight

        def chunk_loss(hidden_CD: Tensor, ids_C: Tensor) -> Tensor:
            return torch.nn.functional.cross_entropy(hidden_CD @ head_VD.T, ids_C, reduction="sum")

        hidden_BTD = self.student.model(input_ids=batch.input_ids_BT, use_cache=False).last_hidden_state
        hidden_ND = hidden_BTD.flatten(0, 1)[batch.positions_N]
        chunks = zip(hidden_ND.split(CHUNK), batch.rollouts.ids_N.split(CHUNK), strict=True)
        losses = [checkpoint(chunk_loss, hidden, ids, use_reentrant=False) for hidden, ids in chunks]
        return torch.stack(losses).sum()


def work_time(case: str, path: Path) -> dict[str, list[float]]:
    """CPU seconds of our steps and of the SFT steps between them, the first of each left out."""
    from lightning.pytorch import Callback

    layout = "packed" if case == "packed" else "padded"
    module, data = make_ours(path, "sampled" if case == "packed" else case, TIMED_STEPS + 1, layout)
    sft = SftStep(data)
    seconds: dict[str, list[float]] = {"ours": [], "sft": []}

    class TakeTurns(Callback):  # type: ignore[misc]
        def on_train_start(self, *_: Any) -> None:
            self.began = time.process_time()

        def on_train_batch_end(self, *_: Any) -> None:
            ended = time.process_time()
            seconds["ours"].append(ended - self.began)
            if case != "packed":
                sft.run()
            self.began = time.process_time()
            seconds["sft"].append(self.began - ended)

    run_ours(module, data, TakeTurns())
    return {name: values[1:] for name, values in seconds.items()}


def work_compiled(case: str, path: Path) -> dict[str, list[float]]:
    """CPU seconds of compiled and eager steps in turns, and wall seconds of the first, which compiles."""
    import torch._inductor
    from lightning.pytorch import Callback

    from lightopd.training.student.compile import compile_layers

    torch._inductor.config.force_disable_caches = True
    module, data = make_ours(path, case, 2 * (TIMED_STEPS + 1), "padded")
    compile_layers(module.student)
    seconds: dict[str, list[float]] = {"default": [], "force_eager": [], "wall": []}

    class TakeTurns(Callback):  # type: ignore[misc]
        def on_train_batch_start(self, *_: Any) -> None:
            self.stance = "force_eager" if module.step % 2 else "default"
            torch.compiler.set_stance(self.stance)
            self.began, self.wall = time.process_time(), time.perf_counter()

        def on_train_batch_end(self, *_: Any) -> None:
            seconds[self.stance].append(time.process_time() - self.began)
            seconds["wall"].append(time.perf_counter() - self.wall)

    run_ours(module, data, TakeTurns())
    return {
        "compiled": seconds["default"][1:],
        "eager": seconds["force_eager"][1:],
        "first": [seconds["wall"][0]],
    }


def work_memory(case: str, path: Path) -> dict[str, list[float]]:
    """MiB by which two steps raise the peak."""
    from lightning.pytorch import Callback

    module, data = make_ours(path, "sampled" if case == "sft" else case, 2, "padded")
    if case == "sft":
        del module
        sft = SftStep(data)
        before = peak_mib()
        sft.run()
        sft.run()
    else:
        before = peak_mib()
        run_ours(module, data, Callback())
    return {"peak": [peak_mib() - before]}


def work_trl(case: str, path: Path) -> dict[str, list[float]]:
    """CPU seconds of whole training steps of trl, the first left out."""
    from support.trl_step import time_steps

    from lightopd.cache.reader import read_shard_columns
    from lightopd.cache.store import open_cache

    columns = read_shard_columns(open_cache(path), 0, (), topk=())
    prompts = [
        columns.prompt_ids_P[columns.prompt_offsets[row] : columns.prompt_offsets[row + 1]].tolist()
        for row in range(ROLLOUTS)
    ]
    responses = [
        columns.response_ids_N[columns.offsets[row] : columns.offsets[row + 1]].tolist()
        for row in range(ROLLOUTS)
    ]
    student, teacher = make_model(STUDENT_LAYERS), make_model(TEACHER_LAYERS)
    return {"trl": time_steps(student, teacher, prompts, responses, TIMED_TRL_STEPS)}


def report_case(case: str, path: Path, sft_mib: float) -> float:
    """Against SFT; returns CPU seconds of our step."""
    seconds = in_process(__file__, "time", case, path)
    ratio = statistics.median(ours / sft for ours, sft in zip(seconds["ours"], seconds["sft"], strict=True))
    ours, sft = (statistics.median(seconds[name]) for name in ("ours", "sft"))
    peer = "SFT, chunked cross-entropy"
    report(f"step_time_{case}", ours, sft, ratio, GOALS[case], "CPU seconds", peer)
    (mib,) = in_process(__file__, "memory", case, path)["peak"]
    report(f"step_memory_{case}", mib, sft_mib, mib / sft_mib, GOALS[case], "MiB", peer)
    return ours


def report_compiled(path: Path) -> None:
    """The compiled step against the eager one, and how long the first step waits for the compiler."""
    seconds = in_process(__file__, "compiled", "sampled", path)
    compiled, eager = (statistics.median(seconds[name]) for name in ("compiled", "eager"))
    pairs = zip(seconds["compiled"], seconds["eager"], strict=True)
    ratio = statistics.median(ours / theirs for ours, theirs in pairs)
    report("step_time_compiled", compiled, eager, ratio, "-", "CPU seconds", "eager, compiling left out")
    (first,) = seconds["first"]
    report("first_step_compiled", first, eager, first / eager, "-", "wall seconds", "a later eager step")


def report_all(folder: Path) -> None:
    path = folder / "cache"
    write_cache(
        path,
        num_shards=1,
        per_shard=ROLLOUTS,
        lengths=LENGTHS,
        top_k=64,
        vocabulary_size=SIZES["vocab_size"],
        prompt_tokens=PROMPT_TOKENS,
    )
    (sft_mib,) = in_process(__file__, "memory", "sft", path)["peak"]
    ours = {case: report_case(case, path, sft_mib) for case in GOALS}
    packed = statistics.median(in_process(__file__, "time", "packed", path)["ours"])
    ratio = packed / ours["sampled"]
    report("step_time_packed", packed, ours["sampled"], ratio, "-", "CPU seconds", "padded rows")
    report_compiled(path)
    live = statistics.median(in_process(__file__, "trl", "live", path, str(peer_python()))["trl"])
    for case in GOALS:
        peer = "trl 1.16 DistillationTrainer, live teacher, no sampling"
        report(f"step_time_{case}_vs_trl", ours[case], live, ours[case] / live, "< 1", "CPU seconds", peer)


if __name__ == "__main__":
    main(
        __doc__,
        {"time": work_time, "compiled": work_compiled, "memory": work_memory, "trl": work_trl},
        report_all,
    )
