"""Text columns as `lightopd rewrite` leaves them: numbers, and continuations with scores."""

import pyarrow as pa

from lightopd.cache.contexts import create_text, text_folder
from lightopd.cache.reader import read_columns
from lightopd.cache.shards import write_shard
from lightopd.schemas.cache import SCHEMA_VERSION
from lightopd.schemas.configs import SamplingConfig
from lightopd.schemas.manifest import ModelFingerprint, TextManifest, TokenizerFingerprint
from lightopd.schemas.rewriting import BRANCHES, TEXTS, BranchConfig

NOBODY = ModelFingerprint(identity="", weights="", config="", source="")


def written(name, cache, **more):
    """Manifest of a text column of nobody's."""
    nothing = TokenizerFingerprint(vocabulary="", size=1, special_ids={}, template=None)
    given = {
        "sampling": None,
        "engine": None,
        "precision": None,
        **more,
    }
    return TextManifest(
        schema_version=SCHEMA_VERSION,
        name=name,
        role="reference",
        rollouts=cache.manifest.fingerprint(),
        template="{{ response }}",
        prompts=name,
        tokenizer=nothing,
        model=NOBODY,
        **given,
    )


def write_confidences(cache):
    """Two text columns of numbers that differ from rollout to rollout."""
    for name, step in (("confidence", 7), ("second_confidence", 31)):
        manifest = written(name, cache)
        create_text(cache, manifest)
        folder = text_folder(cache.path, name)
        for shard in cache.shards:
            table = read_columns(cache, shard, ["rollout_id", "prompt_ids", "response_ids", "finish_reason"])
            values = [float(step * (shard + row) % 101) for row in range(table.num_rows)]
            table = table.append_column(TEXTS.field("text"), pa.array(map(str, values), pa.string()))
            table = table.append_column(TEXTS.field("value"), pa.array(values, pa.float32())).cast(TEXTS)
            fingerprint = manifest.fingerprint()
            write_shard(folder, shard, table, kind=manifest.kind, fingerprint=fingerprint)


def write_continuations(cache):
    """Two chunks of a rollout, each with two scored continuations, without the continuations' ids."""
    manifest = written("continuations", cache, branches=BranchConfig(), sampling=SamplingConfig(n=2))
    create_text(cache, manifest)
    folder = text_folder(cache.path, manifest.name)
    for shard in cache.shards:
        own = read_columns(cache, shard, ["rollout_id", "prompt_ids", "response_ids"]).to_pylist()
        rows = []
        for number, row in enumerate(own):
            places = [0, 2] if len(row["response_ids"]) > 2 else [0]
            scores = [((number + k) % 5) / 4 for k in range(2 * len(places))]
            rows.append(
                {
                    "rollout_id": row["rollout_id"],
                    "prompt_ids": row["prompt_ids"],
                    "response_ids": [],
                    "places": places,
                    "chunk_counts": [min(2, len(row["response_ids"]) - place) for place in places],
                    "forced_ids": [None] * len(places),
                    "drawn_counts": [0] * len(scores),
                    "scores": scores,
                }
            )
        table = pa.Table.from_pylist(rows, schema=BRANCHES)
        write_shard(folder, shard, table, kind=manifest.kind, fingerprint=manifest.fingerprint())


def write_shown(cache, name="feedback_shown"):
    """What a model was shown in place of each rollout's prompt: the prompt, and two more tokens a rollout."""
    manifest = written(name, cache)
    create_text(cache, manifest)
    for shard in cache.shards:
        own = read_columns(cache, shard, ["rollout_id", "prompt_ids"]).to_pylist()
        rows = [
            {**row, "prompt_ids": [*row["prompt_ids"], 1 + number % 7, 9], "response_ids": []}
            for number, row in enumerate(own)
        ]
        table = pa.Table.from_pylist(rows, schema=TEXTS)
        fingerprint, folder = manifest.fingerprint(), text_folder(cache.path, name)
        write_shard(folder, shard, table, kind=manifest.kind, fingerprint=fingerprint)
