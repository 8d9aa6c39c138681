"""Arrow schemas of the cache, one row per rollout, and the metadata of every shard.

Top-k entries of all positions of a rollout lie end to end; `topk_counts` says how many belong to
each position. docs/decisions/0001-cache-layout.md has the measurements behind this layout.
"""

import pyarrow as pa

SCHEMA_VERSION = 2
"""Of the manifests and shards written now; 1 hashes a manifest's defaults too."""


def list_of(value: pa.DataType) -> pa.ListType:
    """List whose values are never null, which spares Parquet a level for every value."""
    return pa.list_(pa.field("element", value, nullable=False))


ROLLOUTS = pa.schema(
    [
        pa.field("rollout_id", pa.string(), nullable=False),
        pa.field("prompt_id", pa.string(), nullable=False),
        pa.field("sample_index", pa.int32(), nullable=False),
        pa.field("origin", pa.string(), nullable=False),
        pa.field("domain", pa.string()),
        pa.field("prompt_ids", list_of(pa.int32()), nullable=False),
        pa.field("response_ids", list_of(pa.int32()), nullable=False),
        pa.field("loss_mask", list_of(pa.bool_()), nullable=False),
        pa.field("turns", list_of(pa.int32()), nullable=False),
        pa.field("logprobs", list_of(pa.float32())),
        pa.field("entropies", list_of(pa.float32())),
        pa.field("finish_reason", pa.string(), nullable=False),
        pa.field("truncated", pa.bool_(), nullable=False),
        pa.field("answer", pa.string()),
        pa.field("reward", pa.float32()),
        pa.field("prompt_text", pa.string()),
        pa.field("response_text", pa.string()),
    ]
)


SIGNALS = pa.schema(
    [
        pa.field("rollout_id", pa.string(), nullable=False),
        pa.field("logprobs", list_of(pa.float32()), nullable=False),
        pa.field("topk_counts", list_of(pa.int32()), nullable=False),
        pa.field("topk_ids", list_of(pa.int32()), nullable=False),
        pa.field("topk_logprobs", list_of(pa.float32()), nullable=False),
        pa.field("tail_logprobs", list_of(pa.float32()), nullable=False),
    ]
)
"""Columns of `signals/<name>`; row i of a shard speaks of row i of the rollout shard of that number.

Under `topk_dtype: float16` the writer rounds `topk_logprobs` to float16 values; the column stays float32,
which every reader knows, and the zero bits compress away."""


def shard_metadata(kind: str, fingerprint: str, version: int = SCHEMA_VERSION) -> dict[str, str]:
    """Key-value metadata of a shard: schema version, `rollouts` or `signals/<name>`, its manifest's hash."""
    return {
        "lightopd.schema_version": str(version),
        "lightopd.kind": kind,
        "lightopd.fingerprint": fingerprint,
    }
