"""Which prompts a step draws, each by itself, as the accountants assume."""

import numpy as np
from numpy.typing import NDArray

from lightopd.schemas.finetune import PrivacyConfig

Integers = NDArray[np.int64]
LARGEST = 2**64


class PoissonDraws:
    """Draws prompts by independent coins of one probability, and one rollout of each drawn prompt.

    Of a prompt with answers of a teacher and of the student one is chosen at random, as in arXiv 2604.04461.

    Args:
        groups_P: number of the prompt of each rollout.
        batch_sequences: expected number of rollouts in a step.
        key: decides every draw, with the step.
    """

    def __init__(self, groups_P: Integers, batch_sequences: int, key: int) -> None:
        _, unit_P, self.counts_U = np.unique(groups_P, return_inverse=True, return_counts=True)
        self.members_P = np.argsort(unit_P, kind="stable")
        self.starts_U = np.cumsum(self.counts_U) - self.counts_U
        self.threshold = int(batch_sequences / len(self.counts_U) * LARGEST)
        self.key = key

    def __call__(self, step: int) -> Integers:
        """Places of the step's rollouts in the index; none of them may be."""
        # Raw output of a bit generator is promised to stay the same across numpy versions (NEP 19).
        stream = np.random.Philox(key=np.array([self.key % LARGEST, step], dtype=np.uint64))
        coins_U, choices_U = (stream.random_raw(len(self.counts_U)) for _ in range(2))
        drawn_U = np.array([int(coin) < self.threshold for coin in coins_U], bool)
        chosen_U = self.starts_U + (choices_U % self.counts_U.astype(np.uint64)).astype(np.int64)
        places: Integers = self.members_P[chosen_U[drawn_U]].astype(np.int64)
        return places


def make_draws(
    config: PrivacyConfig | None, groups_P: Integers, batch_sequences: int, key: int | None
) -> PoissonDraws | None:
    """The draws of a private run, None for batches of an order."""
    if config is None or config.sampling != "poisson" or key is None:
        return None
    return PoissonDraws(groups_P, batch_sequences, key)
