"""A model answers held-out prompts: accuracy over k answers, and full-vocabulary KL to a teacher.

lightopd eval --model STUDENT --prompts heldout.jsonl --out RUN/eval --teacher TEACHER
"""

import logging
import time
from typing import Any

from lightopd import __version__
from lightopd.cache.index import query
from lightopd.cache.store import Cache
from lightopd.engines.kinds import load_engine
from lightopd.lineage.fingerprint import fingerprint_model
from lightopd.models.limits import model_limits
from lightopd.pipelines.sampling.red_flags import response_flags
from lightopd.pipelines.sampling.sample import (
    LoadEngine,
    SamplingJob,
    SamplingPlan,
    missing_shards,
    plan_sampling,
    sample,
    sampling_figures,
)
from lightopd.pipelines.shared.preflight import check_ids, check_reads
from lightopd.pipelines.shared.reports import Report, finished_report, save_report
from lightopd.pipelines.shared.run_folder import save_config, writing
from lightopd.pipelines.shared.sequences import read_sequences
from lightopd.schemas.base import canonical_hash
from lightopd.schemas.configs import EvalConfig, HfEngine
from lightopd.schemas.manifest import SftLineage
from lightopd.training.measures.evaluation import accuracy, divergence

log = logging.getLogger(__name__)


def run(config: EvalConfig, *, dry_run: bool = False, load: LoadEngine = load_engine) -> Report:
    """Sample answers into `OUT/answers` and measure them; what is finished is not done again.

    Raises:
        InputError, EngineError, OutputError: see their messages.
    """
    started_s = time.monotonic()
    plan = plan_sampling(_job(config))
    _refuse_teacher(config, plan)
    if dry_run:
        count = len(plan.prompts) * config.sampling.n
        return Report("eval", str(config.out), {"answers": count}, notes=("dry run: nothing was written",))
    with writing(config.out):
        made_from = _made_from(config, plan)
        finished = finished_report("eval", config.out, made_from)
        if finished is not None and not missing_shards(plan):
            log.info("eval: nothing to do, the answers and figures in %s are reused", config.out)
            return finished
        answers = sample(plan, load)
        save_config(config, "eval", config.out)
        figures = {**_accuracy_figures(answers), **_divergence_figures(config, answers)}
        figures |= sampling_figures(answers, started_s)
        seconds = time.monotonic() - started_s
        notes = (*plan.notes, *response_flags(answers))
        report = Report("eval", str(config.out), figures, notes=notes, seconds=seconds, made_from=made_from)
        save_report(report, config.out)
    return report


def _refuse_teacher(config: EvalConfig, plan: SamplingPlan) -> None:
    """KL compares the probabilities of ids: they must mean the same tokens, and the teacher must read all."""
    if config.teacher is None:
        return
    check_ids(config.teacher, plan.manifest.tokenizer, None, "eval")
    longest = max(len(ids) for ids in plan.prompt_ids)
    check_reads(config.teacher, longest, config.sampling.max_tokens, model_limits(config.model))


def _made_from(config: EvalConfig, plan: SamplingPlan) -> str:
    """Hash of everything the figures follow from: the answers' contract, the code's version, the teacher."""
    teacher = None if config.teacher is None else fingerprint_model(config.teacher).identity
    how = None if config.teacher is None else [config.teacher.dtype, config.engine.model_dump(mode="json")]
    return canonical_hash([__version__, plan.manifest.fingerprint(), teacher, how])


def _job(config: EvalConfig) -> SamplingJob:
    return SamplingJob(
        stage="eval",
        cache=config.out / "answers",
        origin="student",
        model=config.model,
        prompts=config.prompts,
        sampling=config.sampling,
        engine=config.engine,
        sft=SftLineage(proof="unknown"),
        shard_rollouts=config.shard_rollouts,
    )


def _accuracy_figures(answers: Cache) -> dict[str, Any]:
    rows = query(answers.path, "select prompt_id, reward from rollouts").to_pydict()
    measured = accuracy(rows["prompt_id"], rows["reward"])
    if measured is None:
        return {}
    return {
        "avg_at_k": measured.avg_at_k,
        "pass_at_k": measured.pass_at_k,
        "standard_error": measured.standard_error,
    }


def _divergence_figures(config: EvalConfig, answers: Cache) -> dict[str, Any]:
    if config.teacher is None:
        return {}
    assert isinstance(config.engine, HfEngine), "the config refuses other engines beside a teacher"
    sequences = [s for shard in answers.shards for s in read_sequences(answers, shard)[1]]
    measured = divergence(config.model, config.teacher, sequences, config.engine)
    figures = {"reverse_kl_nats": measured.reverse_kl_nats, "forward_kl_nats": measured.forward_kl_nats}
    return figures if measured.outside_mass is None else {**figures, "outside_mass": measured.outside_mass}
