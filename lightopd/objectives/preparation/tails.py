"""What an objective compares outside the supports, with what the cache knows of it."""

from transformers import PreTrainedModel

from lightopd.cache.signals.tail_shape import shape_of
from lightopd.cache.store import Cache
from lightopd.models.head import head_of
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
