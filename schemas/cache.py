"""Arrow schemas of the cache, one row per rollout, and the metadata of every shard.

Top-k entries of all positions of a rollout lie end to end; `topk_counts` says how many belong to
each position. docs/decisions/0001-cache-layout.md has the measurements behind this layout.
"""

from dataclasses import fields
from types import NoneType
from typing import get_args, get_type_hints

import pyarrow as pa

from lightopd.schemas.records import Bools, Floats, Ids, Rollout, RolloutSignal
from lightopd.schemas.signals.kinds import HiddenStates

SCHEMA_VERSION = 3
"""Of the manifests and shards written now; 1 hashes a manifest's defaults too, 1 and 2 have no
`behavior_logprobs`."""


def list_of(value: pa.DataType) -> pa.ListType:
    """List whose values are never null, which spares Parquet a level for every value."""
    return pa.list_(pa.field("element", value, nullable=False))


_ARROW_TYPES = {
    str: pa.string(),
    int: pa.int32(),
    float: pa.float32(),
    bool: pa.bool_(),
    Ids: list_of(pa.int32()),
    Floats: list_of(pa.float32()),
    Bools: list_of(pa.bool_()),
}


def schema_of(record: type, version: int = SCHEMA_VERSION) -> pa.Schema:
    """Columns of a record's table in a file of a schema version; those that may be None may be null."""
    hints = get_type_hints(record)
    columns = [
        one.name
        for one in fields(record)
        if one.metadata.get("since", 1) <= version and "kind" not in one.metadata
    ]
    options = {name: get_args(hints[name]) for name in columns}
    return pa.schema(
        [
            pa.field(name, _ARROW_TYPES[options[name][0]])
            if NoneType in options[name]
            else pa.field(name, _ARROW_TYPES[hints[name]], nullable=False)
            for name in columns
        ]
    )


ROLLOUTS = schema_of(Rollout)

TOKEN_COLUMNS = tuple(
    field.name for field in ROLLOUTS if pa.types.is_list(field.type) and field.name != "prompt_ids"
)
"""Columns of rollouts with one value for each response token."""

STUDENTS_OWN = tuple(name for name in TOKEN_COLUMNS if ROLLOUTS.field(name).nullable)
"""Those that speak of the student at rollout, null in rows that another model wrote."""

SIGNALS = pa.schema([ROLLOUTS.field("rollout_id"), *schema_of(RolloutSignal)])
"""Columns of `signals/<name>`; row i of a shard speaks of row i of the rollout shard of that number.

The writer rounds `topk_logprobs` to the values of the signal's `topk_dtype`, and `tail_logprobs` too under
steps of a nat; the columns stay float32, which every reader knows, and bytes that repeat compress away."""


HIDDEN_COLUMNS = (
    pa.field("hidden", pa.large_binary(), nullable=False),
    pa.field("hidden_scales", list_of(pa.float32()), nullable=False),
)
"""Columns that a signal of kind `hidden` has beside those of `SIGNALS`: the hidden states of a rollout's
tokens end to end, D bytes a token as int8 or 2 D as little-endian bfloat16; and the scales of int8."""


def signal_columns(hidden: HiddenStates | None) -> pa.Schema:
    """Columns of the shards of a signal that keeps such hidden states, or none."""
    if hidden is None:
        return SIGNALS
    return pa.schema([*SIGNALS, *HIDDEN_COLUMNS[: 1 if hidden.channels is None else 2]])


def shard_metadata(kind: str, fingerprint: str, version: int = SCHEMA_VERSION) -> dict[str, str]:
    """Key-value metadata of a shard: schema version, `rollouts` or `signals/<name>`, its manifest's hash."""
    return {
        "lightopd.schema_version": str(version),
        "lightopd.kind": kind,
        "lightopd.fingerprint": fingerprint,
    }
