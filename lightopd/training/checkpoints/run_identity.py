"""What decides the trained weights, so that a run is resumed only under the settings it began with."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from pydantic import JsonValue

from lightopd.cache.contexts import text_contents
from lightopd.cache.store import Cache, content_id, open_cache
from lightopd.lineage.fingerprint import fingerprint_model
from lightopd.objectives.base.part import Needs
from lightopd.schemas.base import canonical_hash
from lightopd.schemas.configs import ModelConfig
from lightopd.schemas.finetune import FinetuneConfig
from lightopd.schemas.objectives.objective import ObjectiveConfig

DECIDES_NOTHING = (
    "steps",
    "micro_batch_tokens",
    "layout",
    "gradient_checkpointing",
    "compile",
    "accelerator",
    "devices",
    "nodes",
    "strategy",
    "loader_workers",
    "held_out_every",
    "checkpoint_every",
    "keep_checkpoints",
    "loggers",
    "accuracy",
    "adapter.merge",
    "best",
    "best.metric",
    "best.patience",
)
"""Settings that may change between a checkpoint and the run that resumes from it: they move results by
rounding at most (`steps` counts under a schedule that depends on it)."""


def recipe_of(
    cache: Cache,
    student: ModelConfig,
    finetune: FinetuneConfig,
    objective: ObjectiveConfig,
    needed: Needs,
    begun: Mapping[str, JsonValue] = MappingProxyType({}),
) -> dict[str, JsonValue]:
    """Everything that decides the trained weights, by dotted name.

    Args:
        begun: the recipe of a run that is resumed: it may know the student by an earlier spelling.
    """
    free, texts = {*DECIDES_NOTHING}, (*needed.texts, *needed.chunks, *needed.shown)
    if finetune.optimizer.schedule != "constant":
        free.remove("steps")
    settings = _flat(finetune.model_dump(mode="json", include={*FinetuneConfig.model_fields}))
    return {
        "cache": content_id(cache, needed.signals),
        "student": fingerprint_model(student).known_as(begun.get("student")),
        **({"texts": canonical_hash(text_contents(cache, texts))} if texts else {}),
        **{f"answers.{path}": content_id(open_cache(path, signals=()), ()) for path in needed.answers},
        **{name: value for name, value in settings.items() if name not in free},
        **_flat(objective.model_dump(mode="json"), "objective."),
    }


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, JsonValue]:
    flat: dict[str, JsonValue] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat
