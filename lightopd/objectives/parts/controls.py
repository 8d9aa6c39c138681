"""Controls: advantages with the teacher, or its credit for single tokens, taken out (arXiv 2608.31046).

N = tokens, R = rollouts, L = length of the longest rollout.
"""

from hashlib import sha256

import numpy as np
import torch
from torch import Tensor

from lightopd.objectives.base.part import Scene
from lightopd.objectives.base.rollout_table import Floats
from lightopd.objectives.base.segments import flatten_rollouts, pad_rollouts
from lightopd.schemas.objectives.advantages import (
    ShuffleAdvantage,
)
from lightopd.schemas.objectives.targets import (
    ConstantTarget,
)


def constant(config: ConstantTarget, scene: Scene) -> Tensor:
    """The same number at every token, [N]."""
    return torch.full_like(scene.student.logprobs_N, config.value).detach()


def shuffle(config: ShuffleAdvantage, scene: Scene, advantage_N: Tensor) -> Tensor:
    """Each rollout's advantages on its trained tokens in another order, [N]; other tokens keep theirs."""
    batch = scene.batch
    keys_RL = np.stack([_keys(config.seed, name, batch.longest) for name in batch.rollout_ids])
    is_left_RL = ~pad_rollouts(batch.loss_mask_N, batch, False)
    # Trained places come dealt when sorted by key, in order when sorted by what they are; others come last.
    random_RL = torch.from_numpy(keys_RL).to(advantage_N.device).masked_fill(is_left_RL, torch.inf)
    from_RL = random_RL.argsort(dim=1, stable=True)
    to_RL = is_left_RL.to(torch.int8).argsort(dim=1, stable=True)
    advantage_RL = pad_rollouts(advantage_N, batch, 0)
    shuffled_RL = torch.zeros_like(advantage_RL).scatter(1, to_RL, advantage_RL.gather(1, from_RL))
    return flatten_rollouts(shuffled_RL, batch)


def _keys(seed: int, rollout_id: str, count: int) -> Floats:
    """Random numbers [L] that belong to a rollout: a longer batch only adds to them."""
    digest = sha256(f"{seed}/{rollout_id}".encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:8], "little")).random(count)
