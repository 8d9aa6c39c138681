"""Names of tensors: as a folder stores them, and as transformers calls them in the model it makes of them."""

import re
from collections.abc import Collection
from typing import Any

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import PrefixChange, WeightConverter, WeightRenaming, rename_source_key


def keep_stored_names(model: PreTrainedModel, stored: Collection[str]) -> None:
    """Let a model that was not loaded from files be saved under the names that these have.

    A model of text that lies within a larger one (`model.language_model.layers`) is loaded without that
    prefix, and saved with it again only where transformers remembers that it was there.
    """
    conversions = [
        change
        for change in get_model_conversion_mapping(model, add_legacy=False)
        if not isinstance(change, PrefixChange) or _occurs(change, stored)
    ]
    if conversions:
        model._weight_conversions = conversions


def unread(model: PreTrainedModel, stored: Collection[str]) -> list[str]:
    """Those of a folder's tensors that transformers does not read into the model."""
    changes = get_model_conversion_mapping(model)
    renamings: list[Any] = [change for change in changes if isinstance(change, WeightRenaming)]
    converters = [change for change in changes if isinstance(change, WeightConverter)]
    state = model.state_dict()
    prefix = model.base_model_prefix
    return [
        name
        for name in stored
        if rename_source_key(name, renamings, converters, prefix, state)[0] not in state
    ]


def _occurs(change: Any, stored: Collection[str]) -> bool:
    return any(re.search(pattern, name) for pattern in change.source_patterns for name in stored)
