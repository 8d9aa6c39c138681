"""Controls: advantages with the teacher, or its credit for single tokens, taken out (arXiv 2608.31046).

N = tokens.
"""

from hashlib import sha256

import numpy as np
import torch
from torch import Tensor

from lightopd.objectives.base.part import Scene
from lightopd.schemas.objectives.targets import ConstantTarget, ShuffleAdvantage


def constant(config: ConstantTarget, scene: Scene) -> Tensor:
    """The same number at every token, [N]."""
    return torch.full_like(scene.student.logprobs_N, config.value).detach()


def shuffle(config: ShuffleAdvantage, scene: Scene, advantage_N: Tensor) -> Tensor:
    """Each rollout's advantages on its trained tokens in another order, [N]; other tokens keep theirs."""
    batch, shuffled_N = scene.batch, advantage_N.clone()
    for row, rollout_id in enumerate(batch.rollout_ids):
        places_n = ((batch.row_N == row) & batch.loss_mask_N).nonzero()[:, 0]
        digest = sha256(f"{config.seed}/{rollout_id}".encode()).digest()
        order_n = np.random.default_rng(int.from_bytes(digest[:8], "little")).permutation(len(places_n))
        shuffled_N[places_n] = advantage_N[places_n[torch.from_numpy(order_n).to(places_n.device)]]
    return shuffled_N
