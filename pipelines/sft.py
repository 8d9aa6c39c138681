"""A teacher answers prompts, and a student is fine-tuned on the answers.

    lightopd sft --teacher TEACHER --student BASE --prompts prompts.jsonl --out RUN

Both halves can run alone (`part: answers`, `part: finetune`). Answers are kept like rollouts, ids and all,
in `RUN/answers`. The student in `RUN/student` takes over the teacher's tokenizer, chat template and end
tokens, and its folder records which teacher wrote its data: the proof that `precompute` needs later.
"""

import json
import time
from pathlib import Path

from lightopd.cache.store import Cache, content_id, create_cache, open_cache
from lightopd.engines.kinds import load_engine
from lightopd.files import json_bytes, write_atomically
from lightopd.lineage.checks import check_tokenizer
from lightopd.lineage.fingerprint import fingerprint_model, write_student_lineage
from lightopd.models.tokenizer import load_tokenizer
from lightopd.pipelines import precompute
from lightopd.pipelines.sampling.red_flags import response_flags
from lightopd.pipelines.sampling.rendering import taught_rendering
from lightopd.pipelines.sampling.sample import (
    LoadEngine,
    SamplingJob,
    SamplingPlan,
    plan_sampling,
    sample,
    sampling_figures,
)
from lightopd.pipelines.shared.model_card import write_model_card
from lightopd.pipelines.shared.preflight import check_dense_answers, check_head_holds
from lightopd.pipelines.shared.reports import Report, save_report
from lightopd.pipelines.shared.run_folder import leave_unless, save_config, writing
from lightopd.pipelines.shared.training_checks import check_training
from lightopd.prompts.tokens import identified_tokenizer, stop_ids
from lightopd.ranks import is_main
from lightopd.schemas.configs import PrecomputeConfig, SftConfig
from lightopd.schemas.manifest import ModelFingerprint, Override, SftLineage, StudentLineage
from lightopd.training.fit import fit
from lightopd.training.privacy.record import privacy_notes
from lightopd.training.student.adapters import trained_student


def run(config: SftConfig, *, dry_run: bool = False, load: LoadEngine = load_engine) -> Report:
    """Sample the teacher's answers, fine-tune the student on them, and record who taught it.

    Raises:
        LineageError: the base student's token-to-id map is not the teacher's.
        InputError, EngineError, OutputError, TrainingError: see their messages; finished work stays.
    """
    started_s = time.monotonic()
    overrides = _one_vocabulary(config)
    if config.part != "answers":
        check_training(config.finetune, config.objective, asks_student=False)
        check_dense_answers(config)
    teacher = fingerprint_model(config.teacher)
    job = SamplingJob(
        stage="sft",
        cache=config.out / "answers",
        origin="teacher",
        model=config.teacher,
        prompts=config.prompts,
        sampling=config.sampling,
        engine=config.engine,
        sft=SftLineage(proof="unknown"),
        shard_rollouts=config.shard_rollouts,
        overrides=overrides,
    )
    if dry_run:
        plan = plan_sampling(job, teacher)
        count = len(plan.prompts) * config.sampling.n
        return Report(
            "sft", str(config.out), {"answers": count, "steps": config.finetune.steps}, notes=("dry run",)
        )
    with writing(config.out):
        plan = plan_sampling(job, teacher)
        answers = _answers(config, plan, load)
        notes = (*plan.notes, *response_flags(answers))
        save_config(config, "sft", config.out)
        figures = {f"answers_{key}": value for key, value in sampling_figures(answers, started_s).items()}
        if config.top_k is not None:
            answers = _scored(config, load)
        if config.part != "answers":
            tuned, left_out = _finetune(config, answers)
            figures, notes = figures | tuned, (*notes, *left_out)
        report = Report("sft", str(config.out), figures, notes=notes, seconds=time.monotonic() - started_s)
        save_report(report, config.out)
    return report


def _answers(config: SftConfig, plan: SamplingPlan, load: LoadEngine) -> Cache:
    """The teacher's answers: sampled, or those that are there when they were made under these settings."""
    path = plan.job.cache
    if config.part != "finetune" and is_main():
        return sample(plan, load)
    answers = open_cache(path)
    create_cache(path, plan.manifest)  # refuses answers of another teacher, prompts or settings
    return answers


def _scored(config: SftConfig, load: LoadEngine) -> Cache:
    """The answers with the teacher's own top-k at each of their tokens."""
    path = config.out / "answers"
    scoring = PrecomputeConfig(
        cache=path, teacher=config.teacher, role="self", top_k=config.top_k or 0, engine=config.engine
    )
    if config.part != "finetune" and is_main():
        precompute.run(scoring, load=load)
    return open_cache(path, signals=[scoring.signal])


def _finetune(config: SftConfig, answers: Cache) -> tuple[dict[str, float | str | None], tuple[str, ...]]:
    base = fingerprint_model(config.student)
    result = fit(answers, config.student, config.out, config.finetune, config.objective)
    leave_unless(result.is_main)
    _take_over_tokenizer(config, result.student)
    _write_lineage(config, answers, base, result.student)
    figures = {f"finetune_{key}": value for key, value in result.metrics.items()}
    return {"finetune_steps": result.steps, **figures, **result.privacy}, (
        *privacy_notes(result.privacy),
        *result.notes,
    )


def _one_vocabulary(config: SftConfig) -> tuple[Override, ...]:
    """Token ids must agree; the student's template and end ids need not, since it learns the teacher's."""
    teacher, taught = identified_tokenizer(config.teacher)
    student, found = identified_tokenizer(config.student)
    learns = found.model_copy(update={"special_ids": taught.special_ids, "template": taught.template})
    check_head_holds(config.student, teacher)
    return check_tokenizer(taught, learns, config.allow, "sft", (teacher.get_vocab(), student.get_vocab()))


def _take_over_tokenizer(config: SftConfig, folder: Path) -> None:
    """Tokenizer, chat template and end ids of the teacher, into the student's folder."""
    tokenizer = load_tokenizer(config.teacher)
    tokenizer.save_pretrained(folder)
    settings = folder / "generation_config.json"
    stored = json.loads(settings.read_text(encoding="utf-8")) if settings.is_file() else {}
    stored["eos_token_id"] = list(stop_ids(tokenizer, config.teacher))
    write_atomically(settings, json_bytes(stored))


def _write_lineage(config: SftConfig, answers: Cache, base: ModelFingerprint, folder: Path) -> None:
    student = fingerprint_model(trained_student(config.student, folder))
    lineage = StudentLineage(
        student=student,
        base=base,
        sft=SftLineage(proof="recorded", teacher=answers.manifest.sampler, data=content_id(answers, ())),
        made_by="sft",
        rendering=taught_rendering(answers.manifest.rendering),
        overrides=answers.manifest.overrides,
    )
    write_student_lineage(folder, lineage)
    rows = sum(marker.rows for marker in answers.markers)
    write_model_card(folder, lineage, config.student, config.finetune, {"answers": rows})
