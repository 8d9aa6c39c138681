"""A model is shown each cached rollout by a template, and writes: a column, a context, rollouts, prompts.

    lightopd rewrite --cache CACHE --model TEACHER --template refine --prompts PROMPTS --name refined

The text lies in `CACHE/texts/NAME/`, row by row beside the rollouts: the ids that the model was shown, and
exactly those that it drew. `gives: context` stops at what is shown, for `precompute --set context.text=NAME`;
`gives: rollouts` goes on and makes the texts the responses of another cache; `gives: prompts` makes a file;
`gives: branches` continues the responses themselves from several of their tokens on.
"""

import json
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from lightopd.cache.contexts import create_text, read_texts, text_folder
from lightopd.cache.index import refresh_index
from lightopd.cache.manifests import as_begun, schema_version_at
from lightopd.cache.reader import check_rollouts
from lightopd.cache.shards import valid_shard, write_shard
from lightopd.cache.store import Cache, open_cache
from lightopd.cache.tables import split_lists
from lightopd.engines.base import Engine
from lightopd.engines.kinds import describe_engine, load_engine
from lightopd.errors import InputError
from lightopd.files import write_atomically
from lightopd.lineage.checks import check_role
from lightopd.lineage.fingerprint import fingerprint_model
from lightopd.models.limits import model_limits
from lightopd.pipelines.caches.rewritten import make_rollouts
from lightopd.pipelines.sampling.branches import (
    Branches,
    branch_columns,
    check_room,
    plan_branches,
    read_signals,
)
from lightopd.pipelines.sampling.rendering import shown_time
from lightopd.pipelines.sampling.sample import LoadEngine
from lightopd.pipelines.sampling.splices import splice
from lightopd.pipelines.sampling.template_rows import TemplateRow, template_rows
from lightopd.pipelines.shared.preflight import said_now
from lightopd.pipelines.shared.progress import StageProgress
from lightopd.pipelines.shared.reports import Report, override_notes, save_report
from lightopd.pipelines.shared.run_folder import save_config, writing
from lightopd.prompts.contexts import ContextRenderer
from lightopd.prompts.tokens import identified_tokenizer, response_text, stop_ids
from lightopd.schemas.base import canonical_hash
from lightopd.schemas.manifest import TEXT_MANIFEST, TextManifest
from lightopd.schemas.records import Ids
from lightopd.schemas.rewriting import RewriteConfig
from lightopd.under_way import doing

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RewritePlan:
    """What would be written, under which contract; no model is loaded."""

    config: RewriteConfig
    cache: Cache
    manifest: TextManifest
    rows: list[list[TemplateRow]]
    """Shard by shard, as the lists below."""
    shown: list[list[Ids]]
    """What the model is shown; of a spliced response, the student's own prompt."""
    spliced: list[list[Ids | None]] | None
    """Responses with their span replaced, None where there is none; None where a model writes."""
    branches: Branches | None
    """Where each response is cut; None where none is."""
    renderer: ContextRenderer
    tokenizer: Any

    @property
    def stops(self) -> list[int]:
        """Ids that end what is written."""
        config = self.config
        return sorted({*stop_ids(self.tokenizer, config.model), *config.sampling.stop_ids})


def run(config: RewriteConfig, *, dry_run: bool = False, load: LoadEngine = load_engine) -> Report:
    """Write the texts, or with `dry_run` only say what would be written.

    Raises:
        InputError, LineageError, CacheError, EngineError, OutputError: see their messages; finished shards
            stay.
    """
    started_s = time.monotonic()
    plan = plan_rewrite(config)
    if dry_run:
        return _report(plan, started_s, {}, "dry run: nothing was written")
    if config.gives == "prompts":
        return _write_prompts(plan, started_s)
    folder = text_folder(config.cache, config.name)
    with writing(config.cache):
        _write_missing(plan, load)
        save_config(config, "rewrite", folder)
        figures = _figures(plan)
        report = _report(plan, started_s, figures)
        save_report(report, folder)
    refresh_index(config.cache)
    if config.out is not None:
        with writing(config.out):
            made = make_rollouts(config.out, plan.cache, plan.manifest, plan.renderer.prompts, plan.tokenizer)
            save_config(config, "rewrite", config.out)
            refresh_index(open_cache(config.out, incomplete=True))
            report = _report(plan, started_s, figures, f"rollouts: {made.path}")
            save_report(report, config.out)
    return report


def plan_rewrite(config: RewriteConfig) -> RewritePlan:
    """Render what the model is shown, and write down the contract; every refusal has its say."""
    cache = open_cache(config.cache, signals=read_signals(config))
    check_rollouts(cache)
    model = fingerprint_model(config.model)
    tokenizer, found = identified_tokenizer(config.model)
    declared = said_now(cache.manifest.sft, config.sft_teacher, "rewrite")
    overrides = check_role(config.role, cache.manifest, declared, model, found, config.allow, "rewrite")
    rendering, clock = cache.manifest.rendering, shown_time(cache.path)
    renderer = ContextRenderer(config.jinja, config.prompts, config.turn, "", tokenizer, rendering, clock)
    rows = template_rows(cache, config.texts, tokenizer)
    shown, spliced = _shown(config, rows, renderer), _spliced(config, rows, renderer, tokenizer)
    branches = None
    if config.gives == "branches":
        branches = plan_branches(config, cache, renderer.prompts)
        check_room(branches, rows, shown, model_limits(config.model).context_length)
    writes = config.is_written
    engine, precision = describe_engine(config.engine, config.model) if writes else (None, None)
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
        prompts=_hash(rows, shown if spliced is None else spliced, branches),
        value=config.value,
        splice=config.splice,
        branches=None if branches is None else config.branches,
        sampling=config.sampling if writes else None,
        engine=engine,
        overrides=overrides,
    )
    manifest = as_begun(manifest, text_folder(cache.path, config.name) / TEXT_MANIFEST)
    return RewritePlan(config, cache, manifest, rows, shown, spliced, branches, renderer, tokenizer)


def _hash(
    rows: list[list[TemplateRow]], ids: Sequence[Sequence[Ids | None]], branches: Branches | None
) -> str:
    """Over what the template decided of each rollout, and where it is cut."""
    pairs = (pair for both in zip(rows, ids, strict=True) for pair in zip(*both, strict=True))
    said = [[row.rollout_id, None if each is None else each.tolist()] for row, each in pairs]
    if branches is None:
        return canonical_hash(said)
    cuts = [[[one.kept, one.chunk_count, one.forced] for one in own] for some in branches for own in some]
    return canonical_hash([said, cuts])


def _shown(
    config: RewriteConfig, rows: list[list[TemplateRow]], renderer: ContextRenderer
) -> list[list[Ids]]:
    """What the model is shown for each rollout.

    Raises:
        InputError: a template cannot be filled, or leaves no room in the model's context.
    """
    if config.splice is not None or config.gives == "prompts":
        return [[row.prompt_ids for row in shard] for shard in rows]
    limit = model_limits(config.model).context_length
    found: list[list[Ids]] = []
    for shard in rows:
        found.append([])
        for row in shard:
            ids = renderer.shown_ids(row.prompt_id, row.prompt_ids, row.variables)
            needed = len(ids) + (1 if config.is_written else len(row.response_ids))
            if needed > limit:
                raise InputError(
                    f"rollout {row.rollout_id}: the template makes a prompt of {len(ids)} tokens, the "
                    f"context of {config.model.path} is {limit} and must hold {needed}; shorten the template"
                )
            found[-1].append(ids)
    return found


def _spliced(
    config: RewriteConfig, rows: list[list[TemplateRow]], renderer: ContextRenderer, tokenizer: Any
) -> list[list[Ids | None]] | None:
    """Each response with the span replaced by the filled template; None where nothing is spliced."""
    if config.splice is None:
        return None

    def spliced(row: TemplateRow, pattern: str) -> Ids | None:
        text = renderer.text(row.prompt_id, row.prompt_ids, row.variables)
        return splice(row.response_ids, pattern, text, tokenizer, row.rollout_id)

    return [[spliced(row, config.splice) for row in shard] for shard in rows]


def _write_prompts(plan: RewritePlan, started_s: float) -> Report:
    """`prompts.jsonl`: the filled template of each prompt, where it is not empty."""
    config, out = plan.config, plan.config.out
    assert out is not None, "the config refuses prompts without a folder"
    first = {row.prompt_id: row for shard in reversed(plan.rows) for row in reversed(shard)}
    lines: list[str] = []
    for prompt_id in dict.fromkeys(row.prompt_id for shard in plan.rows for row in shard):
        row, prompt = first[prompt_id], plan.renderer.prompts[prompt_id]
        text = plan.renderer.text(prompt_id, row.prompt_ids, row.variables)
        given = {"answer": prompt.answer, "domain": prompt.domain, **prompt.metadata}
        line = {"id": f"{prompt_id}-{config.name}", "prompt": text} | given
        if text.strip():
            lines.append(json.dumps({k: v for k, v in line.items() if v is not None}, ensure_ascii=False))
    if not lines:
        raise InputError(
            f"the template is empty for each of the {len(first)} prompts of {config.cache}, so there is none "
            "to write; the rollouts may lack rewards, or answers of the teacher (lightopd join)"
        )
    with writing(out):
        write_atomically(out / "prompts.jsonl", "".join(f"{line}\n" for line in lines).encode())
        save_config(config, "rewrite", out)
        figures = {"prompts": len(lines), "left_out": len(first) - len(lines)}
        report = _report(plan, started_s, figures, f"prompts: {out / 'prompts.jsonl'}")
        save_report(report, out)
    return report


def _write_missing(plan: RewritePlan, load: LoadEngine) -> None:
    config, manifest, total = plan.config, plan.manifest, len(plan.rows)
    create_text(plan.cache, manifest)
    folder, fingerprint = text_folder(config.cache, config.name), manifest.fingerprint()
    missing = [index for index in range(total) if valid_shard(folder, index, fingerprint) is None]
    if not missing:
        log.info("rewrite: nothing to do, all %d shards are there", total)
        return
    engine = None
    if config.is_written:
        with doing(f"rewrite: loading {config.model.path} with engine {config.engine.kind}"):
            engine = load(config.engine, config.model)
    progress = StageProgress("rewrite", folder / "journal.jsonl", "shards", total, total - len(missing))
    try:
        for index in missing:
            with doing(f"rewrite: making shard {index + 1} of {total}"):
                table = _table(plan, index, engine)
            marker = write_shard(folder, index, table, kind=manifest.kind, fingerprint=fingerprint)
            progress.advance(tokens=marker.tokens)
    finally:
        if engine is not None:
            engine.close()


def _table(plan: RewritePlan, index: int, engine: Engine | None) -> pa.Table:
    """One shard of the text column."""
    rows = plan.rows[index]
    columns: list[Sequence[Any]] = [[row.rollout_id for row in rows], plan.shown[index]]
    if plan.branches is not None:
        assert engine is not None, "branches are drawn"
        known = (plan.renderer.prompts, plan.tokenizer, plan.stops)
        columns += branch_columns(plan.config, engine, rows, plan.shown[index], plan.branches[index], *known)
    elif engine is not None:
        columns += _drawn(plan, index, engine)
    elif plan.spliced is not None:
        pairs = zip(rows, plan.spliced[index], strict=True)
        new = [row.response_ids if ids is None else ids for row, ids in pairs]
        texts = [response_text(ids, plan.tokenizer) for ids in new]
        columns += [new, [row.finish_reason for row in rows], texts, [None] * len(rows)]
    else:
        nothing = [None] * len(rows)
        columns += [[np.zeros(0, np.int32) for _ in rows], nothing, nothing, nothing]
    schema = plan.manifest.columns
    arrays = [pa.array(column, field.type) for column, field in zip(columns, schema, strict=True)]
    return pa.table(arrays, schema=schema)


def _drawn(plan: RewritePlan, index: int, engine: Engine) -> list[Sequence[Any]]:
    """Ids, finish reason, text and number of what the model writes about a shard."""
    config = plan.config
    names = [row.rollout_id for row in plan.rows[index]]
    drawn = engine.generate(plan.shown[index], config.sampling, names, plan.stops)
    texts = [response_text(each.response_ids, plan.tokenizer) for each in drawn]
    ids, reasons = [each.response_ids for each in drawn], [each.finish_reason for each in drawn]
    return [ids, reasons, texts, [config.number_in(text) for text in texts]]


def _figures(plan: RewritePlan) -> dict[str, Any]:
    if plan.spliced is not None:
        return {"without_span": sum(ids is None for shard in plan.spliced for ids in shard)}
    if not plan.config.is_written:
        return {}
    table = pa.concat_tables([read_texts(plan.cache, plan.config.name, n) for n in plan.cache.shards])
    reasons, values = table.column("finish_reason").to_pylist(), table.column("value").drop_null().to_pylist()
    if plan.branches is not None:
        counts = [len(own) for some in plan.branches for own in some]
        mean = sum(values) / len(values) if values else float("nan")
        return {"branches": sum(counts), "without_branch": counts.count(0), "mean_score": mean}
    found = {"truncated_share": reasons.count("length") / max(1, len(reasons))}
    if plan.config.value is not None:
        found["without_value"] = len(reasons) - len(values)
        found["mean_value"] = sum(values) / len(values) if values else float("nan")
    written = sum(len(ids) for ids in split_lists(table.column("response_ids")) if ids is not None)
    return {"written_tokens": written, **found}


def _report(plan: RewritePlan, started_s: float, figures: dict[str, Any], *notes: str) -> Report:
    shown = [len(ids) for rows in plan.shown for ids in rows]
    return Report(
        stage="rewrite",
        out=str(plan.config.out or text_folder(plan.config.cache, plan.config.name)),
        figures={"rollouts": len(shown), "prompt_tokens": sum(shown), **figures},
        notes=(*notes, *override_notes(plan.manifest.overrides)),
        seconds=time.monotonic() - started_s,
    )
