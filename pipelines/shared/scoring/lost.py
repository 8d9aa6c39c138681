"""What a signal began with and lost: a head, statistics of hidden states, a tail's shape, made again.

They are made from the model and the cache's first rollouts, as before the first shard, and count only where
they come out with the very bytes that the manifest names.
"""

from pathlib import Path

from lightopd.cache.contexts import Contexts
from lightopd.cache.manifests import COPY_AGAIN, head_path, signal_folder
from lightopd.cache.signals.channels import CHANNELS
from lightopd.cache.signals.hidden import write_head
from lightopd.cache.signals.tail_shape import TAIL_SHAPE, begun_manifest
from lightopd.cache.store import Cache
from lightopd.engines.base import Engine, KeepsHiddenStates
from lightopd.errors import CacheError
from lightopd.pipelines.shared.scoring.frozen import make_channels, make_shape
from lightopd.schemas.configs import PrecomputeConfig
from lightopd.schemas.manifest import SignalManifest


def lost_files(config: PrecomputeConfig, cache: Cache) -> list[Path]:
    """Files that a signal began with and that are gone.

    Raises:
        CacheError: the signal's manifest is broken.
    """
    folder = signal_folder(cache.path, config.signal)
    begun = begun_manifest(folder, cache.manifest.num_shards)
    if begun is None:
        return []
    named = [folder / TAIL_SHAPE] if begun.tail_shape else []
    if begun.hidden is not None:
        named.append(head_path(cache.path, begun.hidden.head))
        named += [folder / CHANNELS] if begun.hidden.channels else []
    return [path for path in named if not path.exists()]


def make_lost(config: PrecomputeConfig, cache: Cache, contexts: Contexts | None, engine: Engine) -> None:
    """Make again what `lost_files` names.

    Raises:
        CacheError: a file comes out another than the one that the signal's manifest names.
    """
    begun = begun_manifest(signal_folder(cache.path, config.signal), cache.manifest.num_shards)
    assert begun is not None, "nothing is lost of what never began"
    for path in lost_files(config, cache):
        if not _is_made(path, config, cache, contexts, engine, begun):
            path.unlink(missing_ok=True)
            raise CacheError(
                f"{path} is gone, and with these settings on this machine it comes out another than the "
                f"signal began with; {COPY_AGAIN} under another name"
            )


def _is_made(
    path: Path,
    config: PrecomputeConfig,
    cache: Cache,
    contexts: Contexts | None,
    engine: Engine,
    begun: SignalManifest,
) -> bool:
    """Make a file again; whether it is the one that the signal began with."""
    if path.name == TAIL_SHAPE:
        shape = make_shape(config, cache, engine, contexts)
        return shape is not None and shape == begun.tail_shape
    hidden = begun.hidden
    if hidden is None or not isinstance(engine, KeepsHiddenStates):
        return False
    if path.name == CHANNELS:
        return make_channels(config, cache, engine, contexts) == (hidden.channels, hidden.tokens)
    return write_head(cache.path, engine.own_head()) == hidden.head
