"""What an objective reads of a cache's signals beside their columns: shapes of tails, and heads."""

from transformers import PreTrainedModel

from lightopd.cache.signals.hidden import head_of_signal
from lightopd.cache.signals.tail_shape import shape_of
from lightopd.cache.store import Cache
from lightopd.models.head import Head, head_of
from lightopd.objectives.base.hidden_states import hidden_signals
from lightopd.objectives.base.part import Needs
from lightopd.objectives.base.whole_vocabulary import SpreadTail, spread_tails


def cached_tails(cache: Cache, wanted: Needs, student: PreTrainedModel) -> tuple[SpreadTail, ...]:
    """The tails that an objective compares token by token, with the shapes of the cache's signals.

    Raises:
        CacheError: a shape is damaged.
        ConfigError: a signal has none, or one of another vocabulary than the student's head.
    """
    names = {tail.signal for tail in wanted.tails if tail.target.tail == "shaped"}
    found = {name: shape_of(cache, name) for name in sorted(names)}
    shapes = {name: shape for name, shape in found.items() if shape is not None}
    return spread_tails(wanted.tails, shapes, len(head_of(student).weight_VD))


def cached_heads(cache: Cache, wanted: Needs, student: PreTrainedModel) -> dict[str, Head]:
    """The heads of the signals whose hidden states are read; signals of one teacher share one.

    Raises:
        CacheError: a head is not there, or is damaged.
        ConfigError: a head is one of another vocabulary than the student's.
    """
    files = {name: kept.head for name in wanted.hidden if (kept := cache.signals[name].manifest.hidden)}
    first = {file: name for name, file in reversed(files.items())}
    read = {file: head_of_signal(cache, name) for file, name in first.items()}
    heads = {name: read[file] for name, file in files.items()}
    hidden_signals(wanted, heads, len(head_of(student).weight_VD))
    return heads
