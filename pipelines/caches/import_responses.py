"""Responses that exist already, taken over as a cache: scored by the student for its log-probabilities.

    lightopd import responses.jsonl --format responses --student STUDENT --cache CACHE

The teacher then scores the cache as any other. The student's log-probabilities are the reference that drift
and importance weights are measured against; nobody says here that the student drew these responses.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import JsonValue

from lightopd import __version__
from lightopd.cache.manifests import as_begun, schema_version_at
from lightopd.cache.tables import rollout_id
from lightopd.engines.base import Engine
from lightopd.engines.kinds import describe_engine, load_engine
from lightopd.errors import InputError
from lightopd.lineage.fingerprint import declared_teacher, fingerprint_model, read_student_lineage
from lightopd.models.limits import model_limits
from lightopd.pipelines.sampling.rendering import rendering_of, shown_time
from lightopd.pipelines.sampling.sample import LoadEngine, sampling_figures, write_missing_shards
from lightopd.pipelines.shared.reports import Report, save_report
from lightopd.pipelines.shared.run_folder import save_config, writing
from lightopd.prompts.responses import Response, Writer, read_responses
from lightopd.prompts.tokens import identified_tokenizer, prompt_text, response_text, stop_ids, template_clock
from lightopd.rewards.reward import reward_of
from lightopd.schemas.base import canonical_hash
from lightopd.schemas.configs import ImportConfig
from lightopd.schemas.manifest import CACHE_MANIFEST, CacheManifest, SftLineage
from lightopd.schemas.records import Rollout
from lightopd.schemas.records import Sequence as TokenSequence

NOTE = "the responses are taken as they are; log-probabilities are the student's, drawn or not"


@dataclass(frozen=True, slots=True)
class _Plan:
    """Responses by prompt, cut into shards, with the contract they are stored under."""

    config: ImportConfig
    tokenizer: Any
    groups: list[list[Response]]
    """One list for each prompt, in the order of the file."""
    manifest: CacheManifest
    identity: str
    """Of the student."""


def import_responses(config: ImportConfig, load: LoadEngine = load_engine) -> Report:
    """Turn a file of prompts and responses into a cache.

    Raises:
        InputError: a row that cannot be taken; the message names file and row.
        OutputError, EngineError: see their messages; finished shards stay.
    """
    started_s = time.monotonic()
    plan = _plan(config)
    with writing(config.cache):
        cache = write_missing_shards(
            "import",
            config.cache,
            plan.manifest,
            lambda: load(config.engine, config.student),
            lambda engine, index: _shard(plan, engine, index),
        )
        save_config(config, "import", config.cache)
        figures: dict[str, JsonValue] = sampling_figures(cache, started_s)
        report = Report(
            "import", str(config.cache), figures, notes=(NOTE,), seconds=time.monotonic() - started_s
        )
        save_report(report, config.cache)
    return report


def _plan(config: ImportConfig) -> _Plan:
    student = fingerprint_model(config.student)
    tokenizer, identified = identified_tokenizer(config.student)
    limits = model_limits(config.student)
    clock = shown_time(config.cache) or template_clock(tokenizer)
    writer = Writer(tokenizer, stop_ids(tokenizer, config.student), config.responses, clock)
    responses = list(read_responses(writer))
    if not responses:
        raise InputError(f"{config.responses.path} has no rows; give at least one prompt with a response")
    _refuse_unfit(responses, limits.context_length, limits.vocabulary_size, config)
    groups = _by_prompt(responses)
    engine, precision = describe_engine(config.engine, config.student)
    per_shard = _groups_per_shard(config, groups)
    manifest = CacheManifest(
        schema_version=schema_version_at(config.cache / CACHE_MANIFEST),
        lightopd_version=__version__,
        origin="imported",
        sampler=student,
        precision=precision,
        sft=_sft(config),
        tokenizer=identified,
        vocabulary_size=limits.vocabulary_size,
        rendering=rendering_of(config.responses, [group[0].prompt for group in groups]),
        rendered_at=clock.isoformat() if clock else None,
        sampling=None,
        prompts=canonical_hash([_content(response) for group in groups for response in group]),
        num_prompts=len(groups),
        shard_rollouts=config.shard_rollouts,
        num_shards=-(-len(groups) // per_shard),
        engine=engine,
    )
    manifest = as_begun(manifest, config.cache / CACHE_MANIFEST)
    assert manifest.sampler is not None, "given above"
    return _Plan(config, tokenizer, groups, manifest, manifest.sampler.identity)


def _sft(config: ImportConfig) -> SftLineage:
    lineage = read_student_lineage(config.student, fingerprint_model(config.student))
    if lineage is not None and lineage.sft.proof != "unknown":
        return lineage.sft
    return declared_teacher(config.sft_teacher) if config.sft_teacher else SftLineage(proof="unknown")


def _refuse_unfit(
    responses: Sequence[Response], context_length: int, vocabulary_size: int, config: ImportConfig
) -> None:
    for one in responses:
        length = len(one.prompt_ids) + len(one.response_ids)
        if length > context_length:
            raise InputError(
                f"{one.where} has {length} tokens, the context of {config.student.path} is {context_length}; "
                "shorten or remove the row"
            )
        largest = max(int(one.prompt_ids.max()), int(one.response_ids.max()))
        if largest >= vocabulary_size:
            raise InputError(
                f"{one.where} has token {largest}, the output of {config.student.path} has "
                f"{vocabulary_size}; these ids are of another tokenizer: give the text"
            )


def _by_prompt(responses: Sequence[Response]) -> list[list[Response]]:
    """Responses to the same prompt ids together; an `id` that names two prompts is refused."""
    groups: dict[bytes, list[Response]] = {}
    owners: dict[str, bytes] = {}
    for one in responses:
        key = one.prompt_ids.tobytes()
        if owners.setdefault(one.prompt.prompt_id, key) != key:
            raise InputError(
                f"{one.where} has id {one.prompt.prompt_id!r} of another prompt; "
                "give each prompt an id of its own"
            )
        groups.setdefault(key, []).append(one)
    return list(groups.values())


def _groups_per_shard(config: ImportConfig, groups: Sequence[Sequence[Response]]) -> int:
    """Prompts in a shard, so that even those with the most responses fill it to `shard_rollouts` at most."""
    return max(1, config.shard_rollouts // max(map(len, groups)))


def _content(one: Response) -> list[Any]:
    """What of a response decides the bytes of its row."""
    prompt = one.prompt
    ids = [one.prompt_ids.tolist(), one.response_ids.tolist(), one.loss_mask.tolist(), one.turns.tolist()]
    return [prompt.prompt_id, *ids, prompt.answer, prompt.domain, prompt.verifier, one.reward]


def _shard(plan: _Plan, engine: Engine, index: int) -> list[Rollout]:
    width = _groups_per_shard(plan.config, plan.groups)
    chosen = plan.groups[index * width : (index + 1) * width]
    rows = [(group[0].prompt, place, one) for group in chosen for place, one in enumerate(group)]
    scores = engine.score([TokenSequence(one.prompt_ids, one.response_ids) for _, _, one in rows], 0)
    pairs = zip(rows, scores, strict=True)
    return [_rollout(plan, *row, logprobs=score.logprobs) for row, score in pairs]


def _rollout(plan: _Plan, prompt: Any, place: int, one: Response, logprobs: Any) -> Rollout:
    own = one.response_ids[one.loss_mask]
    text = response_text(own, plan.tokenizer)
    return Rollout(
        rollout_id=rollout_id(one.prompt_ids, one.response_ids, plan.identity, place),
        prompt_id=prompt.prompt_id,
        sample_index=place,
        origin="imported",
        domain=one.prompt.domain,
        prompt_ids=one.prompt_ids,
        response_ids=one.response_ids,
        loss_mask=one.loss_mask,
        turns=one.turns,
        logprobs=logprobs,
        entropies=None,
        finish_reason="length" if one.is_truncated else "stop",
        truncated=one.is_truncated,
        answer=one.prompt.answer,
        reward=one.reward if one.reward is not None else reward_of(one.prompt, text),
        prompt_text=prompt_text(one.prompt_ids, plan.tokenizer),
        response_text=prompt_text(one.response_ids, plan.tokenizer) if not one.loss_mask.all() else text,
    )
