"""What any stage of a pipeline would refuse, refused before the first one; no weights are read.

Of stages that are finished nothing is checked: their models may be gone.
"""

import shutil
from collections.abc import Callable
from pathlib import Path

from lightopd.cache.store import open_cache
from lightopd.config import build, of_phase
from lightopd.errors import ConfigError, OutputError
from lightopd.lineage.checks import check_teacher
from lightopd.lineage.fingerprint import fingerprint_model, model_folder, read_student_lineage
from lightopd.models.limits import model_limits
from lightopd.objectives.preparation.serving import CacheFacts, missing
from lightopd.objectives.requirements import needs
from lightopd.pipelines.multi_round.phases import phase_folder
from lightopd.pipelines.shared.preflight import (
    check_dense_answers,
    check_head_holds,
    check_ids,
    check_reads,
    check_top_k,
    said_now,
)
from lightopd.pipelines.shared.scoring.horizons import check_horizon_below
from lightopd.pipelines.shared.training_checks import check_training
from lightopd.prompts.render import RenderedPrompts, render_prompts
from lightopd.prompts.tokens import identified_tokenizer
from lightopd.schemas.configs import (
    EvalConfig,
    ModelConfig,
    PrecomputeConfig,
    RolloutConfig,
    SftConfig,
    TrainConfig,
)
from lightopd.schemas.manifest import CACHE_MANIFEST, SftLineage
from lightopd.schemas.run import RunConfig

CHECKPOINT_TIMES_WEIGHTS = 3
"""Weights and Adam's two moments."""


def check_pipeline(config: RunConfig, is_finished: Callable[[str], bool], *, trainings: int = 1) -> None:
    """Refuse devices, lineage, token ids, widths, contexts, columns, signals and a disk that cannot serve.

    Args:
        is_finished: whether the step of a name has left its report.
        trainings: how many students are trained and kept, as in a sweep.

    Raises:
        LightopdError: whatever the stage itself would raise.
    """
    if not config.phases:
        _check_once(config, is_finished, trainings)
    for place, phase in enumerate(config.phases):
        if not (phase_folder(config, place) / "round.report.json").is_file():
            finished = {"sft"} if is_finished("sft") else set()
            is_scored = phase.precompute is not None
            own, trainings = of_phase(config, phase), len(config.phases)
            _check_once(own, finished.__contains__, trainings, is_scored=is_scored)


def _check_once(
    config: RunConfig, is_finished: Callable[[str], bool], trainings: int, *, is_scored: bool = True
) -> None:
    sft = None if config.sft is None else build(SftConfig, config.settings("sft"))
    rollout = build(RolloutConfig, config.settings("rollout"))
    precompute = build(PrecomputeConfig, config.settings("precompute"))
    train = build(TrainConfig, config.settings("train"))
    sampler = rollout.student if sft is None or is_finished("sft") else sft.student
    if not is_finished("train"):
        check_training(train, train.objective, asks_student=train.accuracy is not None)
        _check_disk(config, sft, train, sampler, trainings)
    if sft is not None and not is_finished("sft"):
        check_training(sft.finetune, sft.objective, asks_student=False)
        check_dense_answers(sft)
        tokenizer, taught = identified_tokenizer(sft.teacher)
        check_ids(sft.student, taught, sft.allow, "sft")
        check_head_holds(sft.student, tokenizer)
    if is_finished("rollout"):
        return
    # The fine-tuned student takes over its teacher's tokenizer, and keeps the base's width and context.
    speaks = sft.teacher if sft is not None and not is_finished("sft") else sampler
    rendered = render_prompts(rollout.prompts, speaks)
    _check_objective(train, rollout, precompute if is_scored else None, rendered)
    if is_scored and not is_finished("precompute"):
        _check_scoring(rollout, precompute, sampler, speaks, sft, rendered)
    _check_evaluation(config, speaks)


def _check_scoring(
    rollout: RolloutConfig,
    precompute: PrecomputeConfig,
    sampler: ModelConfig,
    speaks: ModelConfig,
    sft: SftConfig | None,
    rendered: RenderedPrompts,
) -> None:
    check_top_k(precompute)
    check_horizon_below(precompute, rollout.sampling.max_tokens)
    check_ids(precompute.teacher, identified_tokenizer(speaks)[1], precompute.allow, "precompute")
    if precompute.context is None:
        longest = max(len(ids) for ids in rendered.prompt_ids)
        check_reads(precompute.teacher, longest, rollout.sampling.max_tokens, model_limits(sampler))
    if precompute.role != "teacher":
        return
    if speaks is sampler:
        lineage = read_student_lineage(sampler, fingerprint_model(sampler))
        recorded = lineage.sft if lineage else SftLineage(proof="unknown")
    else:
        assert sft is not None, "else the sampler speaks"
        recorded = SftLineage(proof="recorded", teacher=fingerprint_model(sft.teacher))
    taught = said_now(recorded, rollout.sft_teacher, "rollout") or recorded
    taught = said_now(taught, precompute.sft_teacher, "precompute") or taught
    check_teacher(taught, fingerprint_model(precompute.teacher), precompute.allow, "precompute")


def _check_objective(
    train: TrainConfig, rollout: RolloutConfig, precompute: PrecomputeConfig | None, rendered: RenderedPrompts
) -> None:
    """Whether the rollouts and the signal that are planned, and the signals that are there, can serve."""
    there = open_cache(train.cache, incomplete=True).signals if _is_cache(train.cache) else {}
    signals = {name: signal.manifest.top_k for name, signal in there.items()}
    if precompute is not None:
        signals[precompute.signal] = precompute.top_k
    columns = {"ref_logprobs"} | ({"ref_entropies"} if rollout.engine.kind == "hf" else set())
    columns |= {"reward"} if any(prompt.verifier for prompt in rendered.prompts) else set()
    columns |= {"domain"} if any(prompt.domain for prompt in rendered.prompts) else set()
    wanted = needs(train.objective)
    columns |= {"teacher_reward"} if wanted.answers and all(map(_is_cache, wanted.answers)) else set()
    planned = precompute.signal if precompute is not None else None
    horizons = {name: own for name, signal in there.items() if (own := signal.manifest.horizon) is not None}
    if precompute is not None and precompute.horizon is not None:
        horizons[precompute.signal] = precompute.horizon
    hidden = {name for name, signal in there.items() if signal.manifest.hidden is not None}
    hidden |= {precompute.signal} if precompute is not None and precompute.keep == "hidden" else set()
    facts = CacheFacts(
        str(train.cache),
        signals,
        frozenset(columns),
        hidden=frozenset(hidden),
        horizons=horizons,
        planned=planned,
    )
    lines = missing(train.objective, facts)
    if lines:
        raise ConfigError(f"the planned cache cannot serve train's objective: {'; '.join(lines)}")


def _check_evaluation(config: RunConfig, speaks: ModelConfig) -> None:
    if not config.eval_prompts:
        return
    evaluation = build(EvalConfig, config.settings("eval_before"))
    if evaluation.teacher is not None:
        check_ids(evaluation.teacher, identified_tokenizer(speaks)[1], None, "eval")


def _check_disk(
    config: RunConfig, sft: SftConfig | None, train: TrainConfig, sampler: ModelConfig, trainings: int
) -> None:
    """Refuse a disk on which the students and checkpoints alone, all weights trained, do not fit."""
    weights = sum(file.stat().st_size for file in model_folder(sampler).path.glob("*.safetensors"))
    tuned = [sft.finetune] if sft else []
    parts = [part for part in [*tuned, *[train] * trainings] if part.adapter is None]
    # One checkpoint of each is certain: further ones may replace it.
    wanted = len(parts) * weights * (1 + CHECKPOINT_TIMES_WEIGHTS)
    place = next(folder for folder in (config.out, *config.out.resolve().parents) if folder.exists())
    free = shutil.disk_usage(place).free
    if wanted > free and not (train.out / "checkpoints").exists():
        raise OutputError(
            f"{place} has {free / 1e9:.3g} GB free, students and checkpoints alone take {wanted / 1e9:.3g}; "
            "name an out folder on a larger disk, or train an adapter"
        )


def _is_cache(path: Path) -> bool:
    return (path / CACHE_MANIFEST).is_file()
