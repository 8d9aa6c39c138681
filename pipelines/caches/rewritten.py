"""The texts that a model wrote about rollouts, as the responses of another cache.

Prompts are the student's own, responses exactly the ids that the model drew, shown more than the student is.
The rows are the writer's, in a cache of the student: they have no log-probabilities of it. What the writer
was shown lies beside them as a text column of the same name; `precompute` can score under the same prompts.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from lightopd.cache.contexts import create_text, read_texts, text_folder
from lightopd.cache.manifests import rollouts_folder
from lightopd.cache.reader import read_columns
from lightopd.cache.shards import valid_shard, write_shard
from lightopd.cache.store import Cache, content_id, create_cache, open_cache
from lightopd.cache.tables import rollout_id, rollouts_to_table, split_lists
from lightopd.errors import CacheError
from lightopd.prompts.tokens import response_text
from lightopd.rewards.reward import reward_of
from lightopd.schemas.base import canonical_hash
from lightopd.schemas.cache import ROLLOUTS
from lightopd.schemas.manifest import CacheManifest, JoinedCache, TextManifest
from lightopd.schemas.records import Prompt, Rollout


def make_rollouts(
    out: Path, source: Cache, text: TextManifest, prompts: Mapping[str, Prompt], tokenizer: Any
) -> Cache:
    """Make the cache `out` of a finished text column; stopped at any moment, it resumes with the same bytes.

    Args:
        out: cache folder that is created.
        source: whose rollouts the texts are about.
        text: manifest of the text column.
        prompts: by id, with the verifiers that judge the texts.
        tokenizer: of the writer.

    Raises:
        CacheError: a text has a token that the student cannot give.
        OutputError: `out` holds another cache.
    """
    shards = [_rollouts(source, text, shard, prompts, tokenizer) for shard in source.shards]
    names = [row.rollout_id for rows in shards for row in rows]
    writer = JoinedCache(
        origin="teacher", sampler=text.model, content=content_id(source, ()), source=str(source.path)
    )
    changed = {
        "origin": "mixed",
        "joined": (writer,),
        "prompts": canonical_hash([text.fingerprint(), *names]),
        "overrides": text.overrides,
    }
    manifest = source.manifest.model_copy(update=changed)
    create_cache(out, manifest)
    folder, fingerprint = rollouts_folder(out), manifest.fingerprint()
    for index, rows in enumerate(shards):
        if valid_shard(folder, index, fingerprint) is None:
            table = rollouts_to_table(rows)
            write_shard(folder, index, table, kind="rollouts", fingerprint=fingerprint, made_from=manifest)
    made = open_cache(out, signals=())
    _write_shown(made, manifest, source, text, shards)
    return made


def _rollouts(
    source: Cache, text: TextManifest, shard: int, prompts: Mapping[str, Prompt], tokenizer: Any
) -> list[Rollout]:
    names = [
        name
        for name in ROLLOUTS.names
        if name not in ("logprobs", "behavior_logprobs", "entropies", "loss_mask", "turns")
    ]
    rows = read_columns(source, shard, names).to_pylist()
    texts = read_texts(source, text.name, shard)
    written = split_lists(texts.column("response_ids"))
    reasons = texts.column("finish_reason").to_pylist()
    limit = source.manifest.vocabulary_size
    made = []
    for row, ids, reason in zip(rows, written, reasons, strict=True):
        assert ids is not None, "never null on disk"
        if not len(ids) or int(ids.max()) >= limit:
            what = f"token {int(ids.max())}, the student's output has {limit}" if len(ids) else "no token"
            raise CacheError(f"text {text.name} of rollout {row['rollout_id']} has {what}; rewrite it")
        said = response_text(ids, tokenizer)
        prompt_ids = np.asarray(row["prompt_ids"], np.int32)
        # The number of a rewritten rollout is that of its original, so that none is taken for another.
        number = row["sample_index"]
        own = {
            "rollout_id": rollout_id(prompt_ids, ids, text.model.identity, number),
            "origin": "teacher",
            "prompt_ids": prompt_ids,
            "response_ids": ids,
            "loss_mask": np.ones(len(ids), np.bool_),
            "turns": np.zeros(len(ids), np.int32),
            "logprobs": None,
            "behavior_logprobs": None,
            "entropies": None,
            "finish_reason": reason,
            "truncated": reason == "length",
            "reward": reward_of(prompts[row["prompt_id"]], said),
            "response_text": said if row["response_text"] is not None else None,
        }
        made.append(Rollout(**{**row, **own}))
    return made


def _write_shown(
    made: Cache, manifest: CacheManifest, source: Cache, text: TextManifest, shards: list[list[Rollout]]
) -> None:
    """The text column again, beside the new rows."""
    column = text.model_copy(update={"rollouts": manifest.fingerprint()})
    create_text(made, column)
    folder, fingerprint = text_folder(made.path, text.name), column.fingerprint()
    for index, rows in enumerate(shards):
        if valid_shard(folder, index, fingerprint) is not None:
            continue
        table = read_texts(source, text.name, source.shards[index])
        names = pa.array([row.rollout_id for row in rows], pa.string())
        table = table.set_column(0, table.schema.field("rollout_id"), names)
        write_shard(folder, index, table, kind=column.kind, fingerprint=fingerprint)
