"""One cache of a teacher's answers and a student's rollouts, for methods that learn from both.

    lightopd join RUN/both RUN/sft/answers RUN/cache
    lightopd join RUN/pairs RUN/sft/answers RUN/cache --pairs

Rows stay as they are: ids, keys, masks, rewards, and who wrote them. Only log-probabilities and entropies of
the teacher's rows are left out, since those columns speak of the student at rollout. Signals are scored anew,
over the joined rows.
"""

import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import JsonValue

from lightopd.cache.index import refresh_index
from lightopd.cache.manifests import rollouts_folder
from lightopd.cache.reader import check_rollouts, read_columns
from lightopd.cache.shards import valid_shard, write_shard
from lightopd.cache.store import Cache, content_id, create_cache, open_cache
from lightopd.errors import CacheError, ConfigError
from lightopd.lineage.checks import all_overrides, check_student, check_teacher, check_tokenizer
from lightopd.pipelines.caches.join_plan import Plan, ShardRows, plan_rows
from lightopd.pipelines.shared.reports import Report, override_notes, save_report
from lightopd.pipelines.shared.run_folder import writing
from lightopd.schemas.base import canonical_hash
from lightopd.schemas.cache import ROLLOUTS, STUDENTS_OWN
from lightopd.schemas.configs import Allowed
from lightopd.schemas.manifest import CacheManifest, JoinedCache, Override


def join(out: Path, sources: Sequence[Path], *, pairs: bool = False, allow: Sequence[Allowed] = ()) -> Report:
    """Make the cache `out` of the rollouts of caches made by `sft` (`RUN/answers`) and by `rollout`.

    Stopped at any moment, the same call resumes after the last whole shard and gives the same bytes.

    Args:
        out: cache folder that is created.
        sources: at least one cache of each kind; all rollouts by one student, all answers by one teacher.
        pairs: keep one answer and one rollout, the first, of each prompt that has both.
        allow: refusals to set aside, recorded in the cache's manifest.

    Raises:
        ConfigError: `out` is one of the sources, or a kind of cache is missing.
        LineageError: the answers are not by the student's fine-tuning teacher, or tokenizers differ.
        CacheError: a source is damaged, or a prompt has other ids in another source.
        OutputError: `out` holds another cache.
    """
    started_s = time.monotonic()
    if out.resolve() in {path.resolve() for path in sources}:
        raise ConfigError(f"{out} is one of the caches to join; name a new folder")
    caches = [open_cache(path, signals=()) for path in sources]
    student, overrides = _agreed(caches, allow)
    for cache in caches:
        check_rollouts(cache)
    plan = plan_rows(caches, student.manifest.shard_rollouts, pairs=pairs)
    manifest = _manifest(caches, student, plan, overrides)
    with writing(out):
        create_cache(out, manifest)
        _write_missing(out, manifest, caches, plan)
        refresh_index(open_cache(out, incomplete=True))
        report = _report(open_cache(out, signals=()), plan, started_s)
        save_report(report, out)
    return report


def _agreed(caches: Sequence[Cache], allow: Sequence[Allowed]) -> tuple[Cache, tuple[Override, ...]]:
    """The student's first cache, after all sources were held to its lineage; overrides that were used."""
    for cache in caches:
        if cache.manifest.origin not in ("student", "teacher"):
            raise ConfigError(
                f"{cache.path} holds rollouts of origin {cache.manifest.origin}; join caches made by "
                "`lightopd rollout` and by `lightopd sft`, whose lineage says who wrote each row"
            )
    students = [cache for cache in caches if cache.manifest.origin == "student"]
    teachers = [cache for cache in caches if cache.manifest.origin == "teacher"]
    if not students or not teachers:
        raise ConfigError(
            f"join needs answers of the teacher and rollouts of the student, {len(teachers)} and "
            f"{len(students)} such caches were given; name RUN/sft/answers and a cache of rollouts"
        )
    student = students[0].manifest
    overrides = all_overrides(cache.manifest.overrides for cache in caches)
    for cache in caches:
        found = cache.manifest
        assert found.tokenizer is not None, "only an imported cache does not say"
        assert found.sampler is not None, "only an imported cache does not say"
        overrides += check_tokenizer(student.tokenizer, found.tokenizer, allow, "join")
        if found.origin == "teacher":
            overrides += check_teacher(student.sft, found.sampler, allow, "join")
            _same(teachers[0], cache, "sampler", "the model that answered")
        else:
            overrides += check_student(student.sampler, found.sampler, allow, "join")
            _same(students[0], cache, "sft", "the student's fine-tuning")
        _same(students[0], cache, "rendering", "how prompts became ids")
    return students[0], all_overrides([overrides])


def _same(one: Cache, other: Cache, field: str, what: str) -> None:
    """Refuse sources that differ in a field of their manifests; of a model, its identity is compared."""
    before, now = (getattr(cache.manifest, field) for cache in (one, other))
    if field == "sampler":
        before, now = before.identity, now.identity
    if before != now:
        raise CacheError(
            f"{one.path} and {other.path} differ in {what}: {before} and {now}; join caches of one run, or "
            "make one of them again"
        )


def _manifest(
    caches: Sequence[Cache], student: Cache, plan: Plan, overrides: tuple[Override, ...]
) -> CacheManifest:
    joined = []
    for cache in caches:
        own = cache.manifest
        assert own.sampler is not None, "only an imported cache does not say"
        assert own.origin in ("student", "teacher"), "checked when the sources were compared"
        joined.append(
            JoinedCache(
                origin=own.origin, sampler=own.sampler, content=content_id(cache, ()), source=str(cache.path)
            )
        )
    changed = {
        "origin": "mixed",
        "joined": tuple(joined),
        "prompts": canonical_hash(list(plan.rollout_ids)),
        "num_prompts": plan.num_prompts,
        "num_shards": len(plan.shards),
        "overrides": overrides,
    }
    return student.manifest.model_copy(update=changed)


def _write_missing(out: Path, manifest: CacheManifest, caches: Sequence[Cache], plan: Plan) -> None:
    folder, fingerprint = rollouts_folder(out), manifest.fingerprint()
    for index, parts in enumerate(plan.shards):
        if valid_shard(folder, index, fingerprint) is not None:
            continue
        table = pa.concat_tables(list(_tables(caches, parts, manifest.vocabulary_size)))
        write_shard(folder, index, table, kind="rollouts", fingerprint=fingerprint, made_from=manifest)


def _tables(caches: Sequence[Cache], parts: Sequence[ShardRows], vocabulary_size: int) -> Iterator[pa.Table]:
    """Rows of one shard, from wherever they lie; the teacher's without the columns of the student."""
    for part in parts:
        cache = caches[part.cache]
        path = cache.file(part.shard)
        table = read_columns(cache, part.shard, ROLLOUTS.names).take(pa.array(part.rows))
        largest = max(
            pc.max(pc.list_flatten(table.column(name))).as_py() for name in ("prompt_ids", "response_ids")
        )
        if largest >= vocabulary_size:
            raise CacheError(
                f"{path} has token {largest}, the student's output has {vocabulary_size}; these answers use "
                "tokens that the student cannot give"
            )
        if cache.manifest.origin == "teacher":
            for name in STUDENTS_OWN:
                field = ROLLOUTS.field(name)
                nulls = pa.nulls(table.num_rows, field.type)
                table = table.set_column(table.schema.get_field_index(name), field, nulls)
        yield table


def _report(cache: Cache, plan: Plan, started_s: float) -> Report:
    figures: dict[str, JsonValue] = {
        "rollouts": cache.num_rollouts,
        "response_tokens": cache.num_tokens,
        "prompts": plan.num_prompts,
        "teacher_rollouts": plan.num_teacher,
        "student_rollouts": cache.num_rollouts - plan.num_teacher,
    }
    return Report(
        "join",
        str(cache.path),
        figures,
        dropped=dict(plan.dropped),
        notes=(
            "signals are scored over the joined rows: lightopd precompute",
            *override_notes(cache.manifest.overrides),
        ),
        seconds=time.monotonic() - started_s,
    )
