"""Signals and texts of the sources, carried over to the cache that is made of their rows."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from lightopd.cache.contexts import contexts_hash, open_text, read_contexts, take_contexts
from lightopd.cache.manifests import signal_folder
from lightopd.cache.reader import read_columns
from lightopd.cache.signals.channels import CHANNELS
from lightopd.cache.signals.tail_shape import TAIL_SHAPE, read_shape, write_shape
from lightopd.cache.store import Cache, content_id, open_cache
from lightopd.lineage.checks import all_overrides
from lightopd.pipelines.maintenance.remade import Remade, copy_files, make_signal, make_text
from lightopd.schemas.base import canonical_hash
from lightopd.schemas.cache import SCHEMA_VERSION
from lightopd.schemas.manifest import NoiseFloor, SignalManifest
from lightopd.schemas.signals.kinds import TailShape


def carry_signals(made: Cache, plan: Remade, names: Sequence[str]) -> None:
    """Write the signals of these names beside the new rollouts, those first that others take entries of.

    Raises:
        CacheError: a file of a source is damaged.
        OutputError: no permission or no space.
    """
    for name in sorted(
        names, key=lambda name: (plan.sources[0].signals[name].manifest.support is not None, name)
    ):
        _carry_signal(made, plan, name)


def carry_text(made: Cache, plan: Remade, name: str) -> None:
    """Write a text column beside the new rollouts.

    Raises:
        CacheError: a file of a source is damaged.
        OutputError: no permission or no space.
    """
    manifests = [open_text(source, name) for source in plan.sources]
    changed = {
        "schema_version": SCHEMA_VERSION,
        "rollouts": made.manifest.fingerprint(),
        "prompts": canonical_hash([made.manifest.prompts, *(manifest.prompts for manifest in manifests)]),
        "overrides": all_overrides([manifest.overrides for manifest in manifests]),
    }
    make_text(made, manifests[0].model_copy(update=changed), plan)


def _carry_signal(made: Cache, plan: Remade, name: str) -> None:
    manifests = [source.signals[name].manifest for source in plan.sources]
    folder = signal_folder(made.path, name)
    changed: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "rollouts": made.manifest.fingerprint(),
        "overrides": all_overrides([manifest.overrides for manifest in manifests]),
        "noise": _noise([manifest.noise for manifest in manifests]),
        "cross_check": _noise([manifest.cross_check for manifest in manifests]),
        "tail_shape": _shape(made, plan, manifests),
    }
    first = plan.sources[0].path
    copy_files(signal_folder(first, name), folder, (CHANNELS, "precompute.yaml"))
    hidden, support = manifests[0].hidden, manifests[0].support
    if hidden is not None:
        copy_files(first / "heads", made.path / "heads", (f"{hidden.head}.safetensors",))
    if manifests[0].context.get("kind") != "plain":
        changed["context"] = manifests[0].context | {"prompts": _contexts(made, plan, manifests)}
    if support is not None and support["signal"] in plan.sources[0].signals:
        named = str(support["signal"])
        changed["support"] = support | {
            "content": content_id(open_cache(made.path, signals=[named]), [named])
        }
    make_signal(made, manifests[0].model_copy(update=changed), plan)


def _contexts(made: Cache, plan: Remade, manifests: Sequence[SignalManifest]) -> str:
    """Store the contexts of the new rollouts; their hash. A written context is a rollout's own."""
    name, described = manifests[0].name, manifests[0].context
    folders = [signal_folder(source.path, name) for source in plan.sources]
    for folder, manifest in zip(folders, manifests, strict=True):
        read_contexts(folder, manifest.context)  # refuses what is damaged
    key = "rollout_id" if described.get("kind") == "written" else "prompt_id"
    wanted: list[tuple[int, str, str]] = []
    for index, parts in enumerate(plan.shards):
        new = iter(read_columns(made, index, [key]).column(key).to_pylist())
        for part in parts:
            own = read_columns(plan.sources[part.cache], part.shard, [key]).column(key).to_pylist()
            wanted += [(part.cache, own[row], next(new)) for row in part.rows]
    return contexts_hash(take_contexts(signal_folder(made.path, name), folders, wanted))


def _shape(made: Cache, plan: Remade, manifests: Sequence[SignalManifest]) -> TailShape | None:
    """The mean of the sources' shapes, each as heavy as the tokens it was made from."""
    if manifests[0].tail_shape is None:
        return None
    folder, name = signal_folder(made.path, manifests[0].name), manifests[0].name
    if len({manifest.tail_shape for manifest in manifests}) == 1:
        copy_files(signal_folder(plan.sources[0].path, name), folder, (TAIL_SHAPE,))
        return manifests[0].tail_shape
    tokens, width = 0, made.manifest.vocabulary_size
    sums_V = np.zeros(width)
    for source, manifest in zip(plan.sources, manifests, strict=True):
        assert manifest.tail_shape is not None, "the sources were compared"
        own_V = read_shape(signal_folder(source.path, name), manifest.tail_shape, width)
        sums_V += own_V.astype(np.float64) * manifest.tail_shape.tokens
        tokens += manifest.tail_shape.tokens
    return write_shape(folder, sums_V, tokens)


def _noise(floors: Sequence[NoiseFloor | None]) -> NoiseFloor | None:
    """The noise of all sources together; None where one does not know its own."""
    known = [floor for floor in floors if floor is not None]
    tokens = sum(floor.tokens for floor in known)
    if len(known) != len(floors) or not tokens:
        return floors[0] if len(floors) == 1 else None
    mean = sum(floor.mean_nats * floor.tokens for floor in known) / tokens
    return NoiseFloor(mean_nats=mean, max_nats=max(floor.max_nats for floor in known), tokens=tokens)
