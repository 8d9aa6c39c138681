"""How many rollouts are held out: whole prompts, and not one more than it takes."""

import numpy as np
import pytest

from lightopd.errors import ConfigError
from lightopd.training.data.plan import CacheIndex
from lightopd.training.data.split import split


def make_index(rollouts_per_prompt=(2, 2, 2, 2)):
    groups_P = np.repeat(np.arange(len(rollouts_per_prompt)) * 10, rollouts_per_prompt)
    ones_P = np.ones(len(groups_P), dtype=np.int32)
    places_P = np.arange(len(groups_P), dtype=np.int32)
    return CacheIndex(0 * places_P, places_P, ones_P, ones_P, ones_P, groups_P, np.array([100]))


@pytest.mark.parametrize(("wanted", "held"), [(1, 2), (2, 2), (3, 4), (4, 4), (5, 6), (6, 6)])
def test_the_fewest_whole_prompts_with_so_many_rollouts_are_held_out(wanted, held):
    trained, held_out = split(make_index(), wanted)
    assert held_out.row_P.tolist() == list(range(held))
    assert trained.row_P.tolist() == list(range(held, 8))


def test_holding_out_every_prompt_is_refused():
    with pytest.raises(ConfigError, match="held_out is 7, and the 4 prompts have 8 rollouts in all"):
        split(make_index(), 7)
