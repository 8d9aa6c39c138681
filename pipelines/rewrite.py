"""A model is shown each cached rollout, by a template, and writes a text: a column, a context, or a rollout.

    lightopd rewrite --cache CACHE --model TEACHER --template refine --prompts PROMPTS --name refined

The text lies in `CACHE/texts/NAME/`, row by row beside the rollouts: the ids that the model was shown, and
exactly those that it drew. `gives: context` stops at what is shown, for `precompute --set context.text=NAME`;
`gives: rollouts` goes on and makes the texts the responses of another cache.
"""

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from lightopd.cache.index import refresh_index
from lightopd.cache.reader import check_rollouts, read_columns
from lightopd.cache.shards import valid_shard, write_shard
from lightopd.cache.store import Cache, open_cache, schema_version_at
from lightopd.cache.tables import split_lists
from lightopd.cache.texts import create_text, open_text, read_texts, text_folder
from lightopd.engines.base import Engine
from lightopd.engines.kinds import describe_engine, load_engine
from lightopd.errors import InputError
from lightopd.lineage.checks import check_student, check_teacher, check_tokenizer
from lightopd.lineage.fingerprint import fingerprint_model
from lightopd.models.limits import model_limits
from lightopd.pipelines.caches.rewritten import make_rollouts
from lightopd.pipelines.sampling.rendering import shown_time
from lightopd.pipelines.sampling.sample import LoadEngine
from lightopd.pipelines.shared.preflight import said_now
from lightopd.pipelines.shared.progress import StageProgress, doing
from lightopd.pipelines.shared.reports import Report, override_notes, save_report
from lightopd.pipelines.shared.run_folder import save_config, writing
from lightopd.prompts.contexts import ContextRenderer
from lightopd.prompts.tokens import identified_tokenizer, response_text, stop_ids
from lightopd.schemas.base import canonical_hash
from lightopd.schemas.manifest import TEXT_MANIFEST, Override, TextManifest
from lightopd.schemas.records import Ids
from lightopd.schemas.rewriting import TEXTS, RewriteConfig

log = logging.getLogger(__name__)

SHOWN = ("rollout_id", "prompt_id", "prompt_ids", "response_ids", "sample_index", "reward")


@dataclass(frozen=True, slots=True)
class RewritePlan:
    """What would be written, under which contract; no model is loaded."""

    config: RewriteConfig
    cache: Cache
    manifest: TextManifest
    shown: list[list[tuple[str, Ids]]]
    """Rollout id and prompt of the writer, shard by shard."""
    renderer: ContextRenderer
    tokenizer: Any


def run(config: RewriteConfig, *, dry_run: bool = False, load: LoadEngine = load_engine) -> Report:
    """Write the texts, or with `dry_run` only say what would be written.

    Raises:
        InputError, LineageError, CacheError, EngineError, OutputError: see their messages; finished shards
            stay.
    """
    started_s = time.monotonic()
    plan = plan_rewrite(config)
    if dry_run:
        return _report(plan, ("dry run: nothing was written",), started_s, {})
    folder = text_folder(config.cache, config.name)
    with writing(config.cache):
        _write_missing(plan, load)
        save_config(config, "rewrite", folder)
        report = _report(plan, (), started_s, _figures(plan))
        save_report(report, folder)
    if config.out is not None:
        with writing(config.out):
            made = make_rollouts(config.out, plan.cache, plan.manifest, plan.renderer.prompts, plan.tokenizer)
            save_config(config, "rewrite", config.out)
            refresh_index(open_cache(config.out, incomplete=True))
            report = _report(plan, (f"rollouts: {made.path}",), started_s, report.figures)
            save_report(report, config.out)
    return report


def plan_rewrite(config: RewriteConfig) -> RewritePlan:
    """Render what the model is shown, and write down the contract; every refusal has its say."""
    cache = open_cache(config.cache, signals=())
    check_rollouts(cache)
    model = fingerprint_model(config.model)
    tokenizer, found = identified_tokenizer(config.model)
    declared = said_now(cache.manifest.sft, config.sft_teacher, "rewrite")
    overrides = cache.manifest.overrides
    if config.role == "teacher":
        overrides += check_teacher(declared or cache.manifest.sft, model, config.allow, "rewrite")
    elif config.role == "self":
        overrides += check_student(cache.manifest.sampler, model, config.allow, "rewrite")
    overrides += check_tokenizer(cache.manifest.tokenizer, found, config.allow, "rewrite")
    rendering, clock = cache.manifest.rendering, shown_time(cache.path)
    renderer = ContextRenderer(config.jinja, config.prompts, config.turn, "", tokenizer, rendering, clock)
    shown = _shown(config, cache, renderer, tokenizer)
    is_written = config.gives != "context"
    engine, precision = describe_engine(config.engine, config.model) if is_written else (None, None)
    manifest = TextManifest(
        schema_version=schema_version_at(text_folder(cache.path, config.name) / TEXT_MANIFEST),
        name=config.name,
        role=config.role,
        rollouts=cache.manifest.fingerprint(),
        model=model,
        precision=precision,
        tokenizer=found,
        sft_declared=declared,
        template=config.jinja,
        turn=config.turn,
        prompts=canonical_hash([[name, ids.tolist()] for rows in shown for name, ids in rows]),
        value=config.value,
        sampling=config.sampling if is_written else None,
        engine=engine,
        overrides=overrides,
    )
    return RewritePlan(config, cache, manifest, shown, renderer, tokenizer)


def _shown(
    config: RewriteConfig, cache: Cache, renderer: ContextRenderer, tokenizer: Any
) -> list[list[tuple[str, Ids]]]:
    """What the model is shown for each rollout.

    Raises:
        InputError: a template cannot be filled, or leaves no room in the model's context.
    """
    rows = [_rows(cache, shard, config, tokenizer) for shard in cache.shards]
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in (row for shard in rows for row in shard):
        groups.setdefault(row["prompt_id"], []).append(row["variables"])
    limit = model_limits(config.model).context_length
    found: list[list[tuple[str, Ids]]] = []
    for shard in rows:
        found.append([])
        for row in shard:
            group = groups[row["prompt_id"]]
            rewards = [one["reward"] for one in group if one["reward"] is not None]
            more = {"responses": group, "pass_rate": sum(rewards) / len(rewards) if rewards else None}
            ids = renderer.shown_ids(row["prompt_id"], row["prompt_ids"], row["variables"] | more)
            needed = len(ids) + (len(row["response_ids"]) if config.gives == "context" else 1)
            if needed > limit:
                raise InputError(
                    f"rollout {row['rollout_id']}: the template makes a prompt of {len(ids)} tokens, the "
                    f"context of {config.model.path} is {limit} and must hold {needed}; shorten the template"
                )
            found[-1].append((row["rollout_id"], ids))
    return found


def _rows(cache: Cache, shard: int, config: RewriteConfig, tokenizer: Any) -> list[dict[str, Any]]:
    table = read_columns(cache, shard, SHOWN)
    texts = {name: read_texts(cache, name, shard).column("text").to_pylist() for name in config.texts}
    responses = split_lists(table.column("response_ids"))
    plain = table.drop_columns(["prompt_ids", "response_ids"]).to_pylist()
    prompts = split_lists(table.column("prompt_ids"))
    return [
        {
            **row,
            "prompt_ids": prompt_ids,
            "response_ids": response_ids,
            "variables": {
                "response": response_text(response_ids if response_ids is not None else (), tokenizer),
                "reward": row["reward"],
                "sample_index": row["sample_index"],
                "texts": {name: values[place] for name, values in texts.items()},
            },
        }
        for place, (row, prompt_ids, response_ids) in enumerate(zip(plain, prompts, responses, strict=True))
    ]


def _write_missing(plan: RewritePlan, load: LoadEngine) -> None:
    config, manifest = plan.config, plan.manifest
    create_text(plan.cache, manifest)
    folder, fingerprint, total = (
        text_folder(config.cache, config.name),
        manifest.fingerprint(),
        len(plan.shown),
    )
    missing = [index for index in range(total) if valid_shard(folder, index, fingerprint) is None]
    if not missing:
        log.info("rewrite: nothing to do, all %d shards are there", total)
        return
    engine = None
    if config.gives != "context":
        with doing(f"rewrite: loading {config.model.path} with engine {config.engine.kind}"):
            engine = load(config.engine, config.model)
    progress = StageProgress("rewrite", folder / "journal.jsonl", "shards", total, total - len(missing))
    try:
        for index in missing:
            with doing(f"rewrite: making shard {index + 1} of {total}"):
                table = _written(plan, plan.shown[index], engine)
            marker = write_shard(folder, index, table, kind=manifest.kind, fingerprint=fingerprint)
            progress.advance(tokens=marker.tokens)
    finally:
        if engine is not None:
            engine.close()


def _written(plan: RewritePlan, shown: list[tuple[str, Ids]], engine: Engine | None) -> pa.Table:
    """The texts of one shard; of a context, what is shown alone."""
    names, prompts = [name for name, _ in shown], [ids for _, ids in shown]
    if engine is None:
        written: list[Ids] = [np.zeros(0, np.int32) for _ in shown]
        nothing = [None] * len(shown)
        return _table(names, prompts, written, nothing, nothing, nothing)
    config, stops = plan.config, stop_ids(plan.tokenizer, plan.config.model)
    drawn = engine.generate(prompts, config.sampling, names, sorted({*stops, *config.sampling.stop_ids}))
    told = [response_text(each.response_ids, plan.tokenizer) for each in drawn]
    ids, reasons = [each.response_ids for each in drawn], [each.finish_reason for each in drawn]
    return _table(names, prompts, ids, reasons, told, [config.number_in(text) for text in told])


def _table(*columns: Any) -> pa.Table:
    arrays = [pa.array(column, field.type) for column, field in zip(columns, TEXTS, strict=True)]
    return pa.table(arrays, schema=TEXTS)


def _tables(plan: RewritePlan) -> Iterator[pa.Table]:
    opened = open_text(plan.cache, plan.config.name)
    return (read_texts(plan.cache, opened.name, shard) for shard in plan.cache.shards)


def _figures(plan: RewritePlan) -> dict[str, Any]:
    if plan.config.gives == "context":
        return {}
    table = pa.concat_tables(list(_tables(plan)))
    reasons, values = table.column("finish_reason").to_pylist(), table.column("value").drop_null().to_pylist()
    found = {"truncated_share": reasons.count("length") / max(1, len(reasons))}
    if plan.config.value is not None:
        found["without_value"] = len(reasons) - len(values)
        found["mean_value"] = sum(values) / len(values) if values else float("nan")
    written = sum(len(ids) for ids in split_lists(table.column("response_ids")) if ids is not None)
    return {"written_tokens": written, **found}


def _report(plan: RewritePlan, notes: tuple[str, ...], started_s: float, figures: dict[str, Any]) -> Report:
    shown = [ids for rows in plan.shown for _, ids in rows]
    overrides: tuple[Override, ...] = plan.manifest.overrides
    counts = {"rollouts": len(shown), "prompt_tokens": sum(map(len, shown))}
    return Report(
        stage="rewrite",
        out=str(plan.config.out or text_folder(plan.config.cache, plan.config.name)),
        figures={**counts, **figures},
        notes=(*notes, *override_notes(overrides)),
        seconds=time.monotonic() - started_s,
    )
