"""Which rollouts every optimiser step trains on, and in which micro-batches: pure functions of the settings.

The trainable rollouts form an endless stream, epoch after epoch, each epoch in an order of its own. Step k
takes entries k * B to (k + 1) * B of that stream. So every batch is full; a batch may straddle two epochs,
and a rollout can then occur twice in it (always so when the cache holds fewer than B rollouts). Nothing here
communicates: each rank works out the whole step and takes its own part.

Where an objective compares the rollouts of a prompt, the index holds equal groups side by side, and order,
batches and micro-batches are made of whole groups.
"""

# P = trainable rollouts of the cache, S = shards, B = rollouts in one optimiser step
# G = rollouts that stay together, U = P / G of such groups

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightopd.errors import ConfigError, TrainingError
from lightopd.objectives.base.batch import BatchTotals
from lightopd.schemas.finetune import FinetuneConfig
from lightopd.training.data.row_layout import fill, lay_out
from lightopd.training.privacy.draws import PoissonDraws, make_draws

Integers = NDArray[np.int64]
GIB = 2**30


@dataclass(frozen=True, slots=True)
class CacheIndex:
    """Where each trainable rollout lies and how long it is; 28 bytes for each, however wide the signals."""

    shard_P: NDArray[np.int32]
    """Number of the shard."""
    row_P: NDArray[np.int32]
    """Row in the shard."""
    prompts_P: NDArray[np.int32]
    """Prompt tokens, at least 1."""
    responses_P: NDArray[np.int32]
    """Response tokens, at least 1."""
    trained_P: NDArray[np.int32]
    """Response tokens inside the loss mask, at least 1."""
    groups_P: Integers
    """Number of the prompt; rollouts of one prompt share it."""
    bytes_S: Integers
    """Upper bound of a decoded shard's size in memory."""
    num_left_out: int = 0
    """Rollouts of the cache without a trained token; they are in no batch."""
    columns: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    """What `objectives.prepare` made of the whole cache: `TERM/NAME` to [P]."""
    group_size: int = 1
    """G: entries u * G to (u + 1) * G stay together in one micro-batch."""

    @property
    def lengths_P(self) -> NDArray[np.int32]:
        """Tokens of prompt and response."""
        lengths: NDArray[np.int32] = self.prompts_P + self.responses_P
        return lengths

    def take(self, entries: NDArray[Any], group_size: int = 1) -> "CacheIndex":
        """Some of the entries, in the order given: places int64, or bool [P]."""
        return replace(
            self,
            **{name: getattr(self, name)[entries] for name in _PER_ROLLOUT},
            columns={name: values[entries] for name, values in self.columns.items()},
            group_size=group_size,
        )


_PER_ROLLOUT = ("shard_P", "row_P", "prompts_P", "responses_P", "trained_P", "groups_P")


@dataclass(frozen=True, slots=True)
class TrainingPlan:
    """Everything that decides what a rank sees at a step."""

    index: CacheIndex
    batch_sequences: int
    micro_batch_tokens: int
    seed: int
    window_bytes: int
    row_tokens: int | None = None
    """Length of the rows that rollouts share; None where each has its own."""
    rank: int = 0
    world_size: int = 1
    draws: PoissonDraws | None = None
    """Draws the rollouts of a step at random, each prompt by itself; None takes them in the epochs' order."""
    is_private: bool = False
    """Whether each rollout is a micro-batch of its own."""
    _orders: dict[int, Integers] = field(default_factory=dict, repr=False, compare=False)

    def rollouts(self, step: int) -> Integers:
        """Entries of the index that step `step` (from 0) trains on, over all ranks: int64 [B]."""
        if self.draws is not None:
            return self.draws(step)
        stream_B = np.arange(step * self.batch_sequences, (step + 1) * self.batch_sequences)
        epoch_B, place_B = np.divmod(stream_B, len(self.index.row_P))
        return np.concatenate([self._order(epoch)[place_B[epoch_B == epoch]] for epoch in np.unique(epoch_B)])

    def totals(self, step: int) -> BatchTotals:
        """What the losses of step `step` are divided by, the same on every rank."""
        trained_B = self.index.trained_P[self.rollouts(step)]
        expected = len(trained_B) if self.draws is None else self.batch_sequences
        return BatchTotals(num_rollouts=expected, num_tokens=int(trained_B.sum()))

    def micro_batches(self, step: int) -> list[Integers]:
        """This rank's micro-batches of step `step`, largest first; every rank has the same number."""
        rollouts_B = self.rollouts(step)
        if self.is_private:
            return [np.array([place]) for place in rollouts_B]
        lengths_B = self.index.lengths_P[rollouts_B]
        dealt = pack(
            lengths_B, self.micro_batch_tokens, self.world_size, self.index.group_size, self.row_tokens
        )
        return [rollouts_B[places] for places in dealt[self.rank]]

    def _order(self, epoch: int) -> Integers:
        if epoch not in self._orders:
            for old in [known for known in self._orders if known < epoch - 1]:
                del self._orders[old]
            self._orders[epoch] = epoch_order(self.index, self.seed, epoch, self.window_bytes)
        return self._orders[epoch]


def make_plan(
    index: CacheIndex, finetune: FinetuneConfig, rank: int, world_size: int, key: int | None = None
) -> TrainingPlan:
    """The plan of one rank, after checks that no later step can fail on sizes; `key` is a private run's.

    Raises:
        ConfigError: the batch cannot be dealt equally to the ranks.
        TrainingError: nothing to train on, or one rollout does not fit into a micro-batch.
    """
    check_share(finetune.batch_sequences, world_size, index.group_size)
    if len(index.row_P) == 0:
        raise TrainingError(
            f"the cache has no rollout with a trained token ({index.num_left_out} without one); "
            "roll out again, and look at the loss masks if there should be some"
        )
    check_lengths(index, finetune.micro_batch_tokens)
    return TrainingPlan(
        index=index,
        batch_sequences=finetune.batch_sequences,
        micro_batch_tokens=finetune.micro_batch_tokens,
        seed=finetune.seed,
        window_bytes=int(finetune.shuffle_gib * GIB),
        row_tokens=row_tokens(index, finetune),
        rank=rank,
        world_size=world_size,
        draws=make_draws(finetune.privacy, index.groups_P, finetune.batch_sequences, key),
        is_private=finetune.privacy is not None,
    )


def check_share(batch_sequences: int, world_size: int, group_size: int = 1) -> None:
    """Refuse a batch that cannot be dealt equally to the ranks, in groups that stay together.

    Raises:
        ConfigError: names the numbers.
    """
    if batch_sequences % (world_size * group_size):
        groups = f" in groups of {group_size} rollouts" if group_size > 1 else ""
        raise ConfigError(
            f"batch_sequences is {batch_sequences}, which {world_size} devices cannot share equally{groups}; "
            f"set it to a multiple of {world_size * group_size}"
        )


def row_tokens(index: CacheIndex, finetune: FinetuneConfig) -> int | None:
    """Length of the rows that rollouts share, the same for all of a run; None where each has its own.

    It is that of the longest rollout: attention costs the square of a row, so longer rows would cost more
    than the padding that they save.
    """
    return int(index.lengths_P.max()) if finetune.layout == "packed" else None


def check_lengths(index: CacheIndex, micro_batch_tokens: int) -> None:
    """Refuse a rollout, or a group that stays together, that no micro-batch can hold.

    Raises:
        TrainingError: names row, shard and the number to change.
    """
    longest = int(np.argmax(index.lengths_P))
    length = int(index.lengths_P[longest])
    needed = length * index.group_size
    if needed > micro_batch_tokens:
        together = f", {index.group_size} rollouts stay together" if index.group_size > 1 else ""
        raise TrainingError(
            f"row {index.row_P[longest]} of rollout shard {index.shard_P[longest]} has {length} tokens "
            f"({index.prompts_P[longest]} prompt, {index.responses_P[longest]} response){together}, and "
            f"micro_batch_tokens is {micro_batch_tokens}; set micro_batch_tokens to {needed} or "
            "more, or roll out with a smaller max_tokens"
        )


def epoch_order(index: CacheIndex, seed: int, epoch: int, window_bytes: int) -> Integers:
    """A permutation of the index: int64 [P].

    A cache that fits into `window_bytes` of memory is shuffled as a whole. A larger one is cut, in a random
    order of its shards, into windows that fit, and each window is shuffled, so that a reader that holds one
    window reads every shard once an epoch. Groups are shuffled as wholes; one that lies in two shards counts
    to that of its first rollout.
    """
    size = index.group_size
    shard_rank_S = np.empty(len(index.bytes_S), dtype=np.int64)
    shard_order_S = _random_order(len(index.bytes_S), seed, epoch, "shards")
    shard_rank_S[shard_order_S] = _windows(index.bytes_S[shard_order_S], window_bytes)
    shuffled_U = _random_order(len(index.row_P) // size, seed, epoch, "rollouts")
    window_U = shard_rank_S[index.shard_P[::size][shuffled_U]]
    return _members(shuffled_U[np.argsort(window_U, kind="stable")], size)


def pack(
    lengths_B: NDArray[np.int32],
    budget: int,
    world_size: int,
    group_size: int = 1,
    row_tokens: int | None = None,
) -> list[list[Integers]]:
    """Deal the rollouts of a step to ranks, in micro-batches of at most `budget` padded tokens.

    Rollouts of like length share a micro-batch, which keeps padding low; packed, short ones fill the rows of
    long ones. Every rank gets the same number of micro-batches (collective strategies need that) and about
    the same number of padded tokens.

    Args:
        lengths_B: tokens of each rollout; B is a multiple of `world_size` * `group_size`.
        budget: most padded tokens of a micro-batch; no group is larger.
        world_size: number of ranks.
        group_size: rollouts next to each other that stay together.
        row_tokens: length of the rows that rollouts share; None where each has its own.

    Returns:
        For each rank its micro-batches, largest first, as places in `lengths_B`.
    """
    lengths_UG = lengths_B.reshape(-1, group_size)
    filled = list(fill(lengths_UG, budget, row_tokens))
    while len(filled) % world_size:
        _split_largest(filled)
    micro_batches = [_members(units, group_size) for units in filled]
    costs = [lay_out(lengths_B[places], row_tokens).num_padded for places in micro_batches]
    by_cost = sorted(range(len(costs)), key=lambda index: -costs[index])
    share = len(micro_batches) // world_size
    dealt: list[list[Integers]] = [[] for _ in range(world_size)]
    loads = [0] * world_size
    for index in by_cost:
        rank = min((r for r in range(world_size) if len(dealt[r]) < share), key=lambda r: loads[r])
        dealt[rank].append(micro_batches[index])
        loads[rank] += costs[index]
    return dealt


def _members(units: Integers, size: int) -> Integers:
    """Places of the rollouts of whole groups."""
    return (units[:, None] * size + np.arange(size)).ravel()


def _split_largest(micro_batches: list[Integers]) -> None:
    largest = max(range(len(micro_batches)), key=lambda index: len(micro_batches[index]))
    whole = micro_batches.pop(largest)
    half = (len(whole) + 1) // 2
    micro_batches += [whole[:half], whole[half:]]


def _windows(bytes_S: Integers, window_bytes: int) -> list[int]:
    """Number of the window that each shard falls into, filling them one after the other."""
    windows, current, held = [], 0, 0
    for size in bytes_S:
        if held and held + size > window_bytes:
            current, held = current + 1, 0
        held += int(size)
        windows.append(current)
    return windows


def _random_order(length: int, seed: int, epoch: int, what: str) -> Integers:
    # Raw output of a bit generator is promised to stay the same across numpy versions (NEP 19);
    # Generator.permutation is not, and a resumed run may have another numpy.
    stream = np.random.Philox(key=np.array([seed, 2 * epoch + (what == "shards")], dtype=np.uint64))
    order: Integers = np.argsort(stream.random_raw(length), kind="stable")
    return order
