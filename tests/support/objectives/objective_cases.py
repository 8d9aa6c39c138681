"""A small world for objective tests: every rollout, teacher and student as full float64 tables.

R = rollouts, N = their response tokens laid end to end, V = vocabulary, K = support.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightopd.cache.reader import ShardColumns, SignalColumns
from lightopd.objectives.base.batch import BatchTotals, RolloutBatch, SignalBatch, StudentTokens
from lightopd.objectives.loss import Loss, collect_step_sums, compute_loss
from lightopd.objectives.preparation.prepare import PreparedRollouts, prepare_rollouts
from lightopd.objectives.requirements import needs
from lightopd.objectives.state import ObjectiveState, visible_tokens
from lightopd.pipelines.methods import read_method
from lightopd.schemas.objectives.objective import ObjectiveConfig

METHODS = Path(__file__).parents[3] / "pipelines" / "recipes" / "methods"
SIGNALS = ("teacher", "reference", "privileged", "negative", "dpo", "reverse_dpo", "warmup", "code_teacher")

CONFIDENCES = {
    "confidence": (90, 20, 55, 70, 0, 100, 40, 35),
    "second_confidence": (10, 60, 55, 5, 80, 30, 95, 0),
}
"""Numbers of text columns, by rollout of the world."""

CHUNKS = (
    ((0, 2, 1.5), (3, 4, 0.0)),
    ((1, 3, 2.0),),
    ((0, 3, 0.25), (3, 5, 1.0)),
    (),
    ((2, 4, 0.5),),
    ((0, 1, 2.0), (2, 3, 0.75)),
    ((1, 4, 1.25),),
    ((0, 2, 0.0), (2, 5, 1.75)),
)
"""Chunks by rollout of the world: first token, token after the last, and the sum of two similarities."""

torch.set_num_threads(1)


@dataclass(frozen=True)
class World:
    """Rollouts with the full distributions of everyone who scored them."""

    vocabulary: int
    lengths: tuple[int, ...]
    row_N: Tensor
    index_N: Tensor
    ids_N: Tensor
    loss_mask_N: Tensor
    turns_N: Tensor
    student_NV: Tensor
    """Logits of the live student."""
    tables: dict[str, Tensor]
    """Log-probabilities [N, V] of each signal, and of `rollout_student`."""
    groups: tuple[int, ...]
    rewards: tuple[float, ...]
    origins: tuple[str, ...]
    domains: tuple[str | None, ...]
    teacher_rewards: tuple[float, ...]
    names: tuple[str, ...] = field(default=())

    @property
    def size(self) -> int:
        return len(self.lengths)

    def tokens(self, row: int) -> list[int]:
        """Places of a rollout's trained tokens."""
        return [n for n in range(len(self.row_N)) if self.row_N[n] == row and self.loss_mask_N[n]]


@cache
def make_world(seed: int = 0, vocabulary: int = 7, spread: float = 1.0, drift: float = 0.3) -> World:
    """Eight rollouts of four prompts; the live student has moved by `drift` from the one that sampled."""
    random = torch.Generator().manual_seed(seed)
    lengths = (4, 3, 5, 2, 6, 3, 4, 5)
    total = sum(lengths)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    row_N = torch.repeat_interleave(torch.tensor(lengths))
    index_N = torch.cat([torch.arange(length) for length in lengths])
    loss_mask_N = torch.ones(total, dtype=torch.bool)
    loss_mask_N[[2, 9, 17]] = False
    base_NV = spread * noise(total, vocabulary)
    tables = {name: (base_NV + noise(total, vocabulary)).log_softmax(-1) for name in SIGNALS}
    tables["rollout_student"] = base_NV.log_softmax(-1)
    other = torch.Generator().manual_seed(seed + 1000)
    moved_NV = torch.randn(total, vocabulary, generator=other, dtype=torch.float64)
    tables["second_teacher"] = (base_NV + moved_NV).log_softmax(-1)
    for level in range(5):
        shown_NV = torch.randn(total, vocabulary, generator=other, dtype=torch.float64)
        tables[f"exposure_{level}"] = (base_NV + shown_NV).log_softmax(-1)
    ids_N = torch.multinomial(tables["rollout_student"].exp(), 1, generator=random)[:, 0]
    return World(
        vocabulary=vocabulary,
        lengths=lengths,
        row_N=row_N,
        index_N=index_N,
        ids_N=ids_N,
        loss_mask_N=loss_mask_N,
        turns_N=index_N // 2,
        student_NV=base_NV + drift * noise(total, vocabulary),
        tables=tables,
        groups=(5, 5, 9, 9, 2, 2, 7, 7),
        rewards=(1.0, 0.0, 1.0, 0.0, 0.0, 1.0, 1.0, 1.0),
        origins=("teacher", "student") * 4,
        domains=("math", "code", None, "code", "math", "math", "code", "other"),
        teacher_rewards=(1.0, 1.0, 0.25, 0.25, 0.75, 0.75, 1.0, 1.0),
        names=tuple(f"rollout-{number}" for number in range(8)),
    )


shipped = cache(read_method)


def recipe(name: str, **changes: object) -> ObjectiveConfig:
    """A shipped recipe's objective; `changes` replace keys of its only term."""
    objective = shipped(METHODS / f"{name}.yaml").objective
    if not changes:
        return objective
    plain = objective.model_dump(mode="json")
    plain["terms"][0].update(changes)
    return ObjectiveConfig.model_validate(plain)


def objective(**keys: object) -> ObjectiveConfig:
    return ObjectiveConfig.model_validate(keys)


def evaluate(
    config: ObjectiveConfig,
    world: World,
    *,
    top_k: int | None = None,
    splits: Sequence[Sequence[int]] | None = None,
    state: ObjectiveState | None = None,
    student_NV: Tensor | None = None,
    order: Sequence[int] | None = None,
    device: str = "cpu",
) -> tuple[float, Tensor, dict[str, float]]:
    """Value, gradient by the student's logits [N, V], and mean metrics, as the trainer would make them.

    `splits` divides the rollouts into micro-batches; `order` is the order of the cache's rows; the loss is
    made on `device`.
    """
    logits_NV = (world.student_NV if student_NV is None else student_NV).clone().requires_grad_()
    losses = _step(config, world, logits_NV, top_k or world.vocabulary, splits, state, order, device)
    value = torch.stack([loss.value for loss in losses]).sum()
    (gradient_NV,) = torch.autograd.grad(value, logits_NV)
    names = losses[0].metrics
    sums = {name: [sum(float(loss.metrics[name][i]) for loss in losses) for i in (0, 1)] for name in names}
    return value.item(), gradient_NV, {name: a / b if b else float("nan") for name, (a, b) in sums.items()}


def _step(
    config: ObjectiveConfig,
    world: World,
    logits_NV: Tensor,
    top_k: int,
    splits: Sequence[Sequence[int]] | None,
    state: ObjectiveState | None,
    order: Sequence[int] | None,
    device: str,
) -> list[Loss]:
    wanted = needs(config)
    rows = list(order or range(world.size))
    prepared = prepare_rollouts(config, [view_of(world, rows)])
    kept = [row for row, is_kept in zip(rows, prepared.keep_R, strict=True) if is_kept]
    shown = shown_world(config, world, state)
    groups = [[row for row in split if row in kept] for split in (splits or [kept])]
    batches = [make_batch(shown, split, kept, top_k, prepared, rows) for split in groups if split]
    students = [make_student(shown, logits_NV, batch, wanted.supports, split) for batch, split in batches]
    batches = [(_moved(batch, device), split) for batch, split in batches]
    students = [_moved(student, device) for student in students]
    with torch.no_grad():
        found = [
            collect_step_sums(config, batch, student)
            for (batch, _), student in zip(batches, students, strict=True)
        ]
    totals = {
        name: (sum(one[name][0] for one in found), sum(one[name][1] for one in found)) for name in found[0]
    }
    return [
        compute_loss(config, batch, student, totals, state)
        for (batch, _), student in zip(batches, students, strict=True)
    ]


def _moved(value: Any, device: str) -> Any:
    """A tensor, or all tensors of a record or a dictionary, on the device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {name: _moved(one, device) for name, one in value.items()}
    if is_dataclass(value):
        return replace(value, **{one.name: _moved(getattr(value, one.name), device) for one in fields(value)})
    return value


def shown_world(config: ObjectiveConfig, world: World, state: ObjectiveState | None) -> World:
    """The world as the curriculum shows it."""
    is_shown_N = visible_tokens(
        config, state or ObjectiveState(), world.index_N.numpy(), world.turns_N.numpy()
    )
    return replace(world, loss_mask_N=world.loss_mask_N & torch.from_numpy(is_shown_N))


def places_of(world: World, rows: Sequence[int]) -> Tensor:
    return torch.cat([(world.row_N == row).nonzero()[:, 0] for row in rows])


def signals_of(
    logprobs_N: dict[str, np.ndarray], tables: dict[str, np.ndarray] | None = None
) -> dict[str, SignalColumns]:
    """Signals of sampled tokens; with tables [N, V], every token in its order as the top-k."""
    found = {name: SignalColumns(values, None, None, None, None) for name, values in logprobs_N.items()}
    for name, table_NV in (tables or {}).items():
        order_NV = np.argsort(-table_NV, axis=1)
        offsets = np.arange(len(table_NV) + 1) * table_NV.shape[1]
        sorted_C = np.take_along_axis(table_NV, order_NV, axis=1).ravel()
        found[name] = replace(
            found[name], topk_offsets=offsets, topk_ids_C=order_NV.ravel(), topk_logprobs_C=sorted_C
        )
    return found


def make_columns(
    *, signals: dict[str, np.ndarray], tables: dict[str, np.ndarray] | None = None, **given: object
) -> ShardColumns:
    """Columns of rollouts; what no selection and no column reads is left empty."""
    num_rollouts, num_tokens = len(given["rollout_ids"]), int(given["offsets"][-1])
    unread = {
        "prompt_ids_by_user": [""] * num_rollouts,
        "prompt_offsets": np.zeros(num_rollouts + 1, np.int64),
        "prompt_ids_P": np.zeros(0, np.int32),
        "response_ids_N": np.zeros(num_tokens, np.int32),
        "turns_N": np.zeros(num_tokens, np.int32),
        "entropies_N": None,
        "is_truncated_R": np.zeros(num_rollouts, bool),
    }
    return ShardColumns(**unread, **given, signals=signals_of(signals, tables))


def view_of(world: World, rows: Sequence[int]) -> ShardColumns:
    """The cache with its rollouts in the given order."""
    places_N = places_of(world, rows)
    ids_N1 = world.ids_N[places_N][:, None]
    sampled = {
        name: table_NV[places_N].gather(1, ids_N1)[:, 0].numpy() for name, table_NV in world.tables.items()
    }
    return make_columns(
        rollout_ids=[world.names[row] for row in rows],
        groups_R=np.array([world.groups[row] for row in rows]),
        rewards_R=np.array([world.rewards[row] for row in rows], np.float32),
        origins=[world.origins[row] for row in rows],
        domains=[world.domains[row] for row in rows],
        offsets=np.concatenate([[0], np.cumsum([world.lengths[row] for row in rows])]),
        loss_mask_N=world.loss_mask_N[places_N].numpy(),
        logprobs_N=sampled["rollout_student"],
        signals=sampled,
        tables={name: table_NV[places_N].numpy() for name, table_NV in world.tables.items()},
        text_values_R={
            name: np.array([values[row] for row in rows], np.float32) for name, values in CONFIDENCES.items()
        },
        chunks_RM4={"continuations": np.stack([_chunks(row) for row in rows])},
        teacher_rewards_R=np.array([world.teacher_rewards[row] for row in rows], np.float32),
    )


def _chunks(row: int) -> np.ndarray:
    found = np.full((2, 4), np.nan, np.float32)
    for place, chunk in enumerate(CHUNKS[row]):
        found[place] = (*chunk, 2)
    return found


def make_batch(
    world: World,
    rows: Sequence[int],
    step_rows: Sequence[int],
    top_k: int,
    prepared: PreparedRollouts | None = None,
    cache_rows: Sequence[int] = (),
) -> tuple[RolloutBatch, list[int]]:
    """The micro-batch of `rows` in a step of `step_rows`."""
    places_N = places_of(world, rows)
    number = {row: place for place, row in enumerate(rows)}
    trained = {row: len(world.tokens(row)) for row in step_rows}
    columns = {} if prepared is None else prepared.columns
    cache_place = [list(cache_rows).index(row) for row in rows] if cache_rows else []
    return RolloutBatch(
        ids_N=world.ids_N[places_N],
        row_N=torch.tensor([number[int(row)] for row in world.row_N[places_N]]),
        index_N=world.index_N[places_N],
        loss_mask_N=world.loss_mask_N[places_N],
        turns_N=world.turns_N[places_N],
        ref_logprobs_N=_sampled(world, "rollout_student", places_N),
        signals={name: _signal(world, name, places_N, top_k) for name in world.tables},
        lengths_R=torch.tensor([trained[row] for row in rows]),
        rewards_R=torch.tensor([world.rewards[row] for row in rows]),
        is_truncated_R=torch.zeros(len(rows), dtype=torch.bool),
        groups_R=torch.tensor([world.groups[row] for row in rows]),
        domains=tuple(world.domains[row] for row in rows),
        rollout_ids=tuple(world.names[row] for row in rows),
        totals=BatchTotals(sum(1 for count in trained.values() if count), sum(trained.values())),
        longest=int(world.index_N[places_N].max()) + 1,
        num_turns=int(world.turns_N[places_N].max()) + 1,
        prepared_R={name: torch.from_numpy(column[cache_place]).double() for name, column in columns.items()},
    ), list(rows)


def _sampled(world: World, name: str, places_N: Tensor) -> Tensor:
    return world.tables[name][places_N].gather(1, world.ids_N[places_N][:, None])[:, 0]


def _signal(world: World, name: str, places_N: Tensor, top_k: int) -> SignalBatch:
    table_NV = world.tables[name][places_N]
    topk_NK, ids_NK = table_NV.topk(top_k, dim=1)
    return SignalBatch(_sampled(world, name, places_N), ids_NK, topk_NK, tail_of(table_NV, ids_NK))


def tail_of(logprobs_NV: Tensor, ids_NK: Tensor) -> Tensor:
    """Log of the probability outside the ids, exactly; -inf where nothing is outside."""
    inside_NV = torch.zeros_like(logprobs_NV, dtype=torch.bool).scatter(1, ids_NK.clamp(min=0), ids_NK >= 0)
    if inside_NV.all():
        return torch.full((len(ids_NK),), float("-inf"), dtype=logprobs_NV.dtype)
    return logprobs_NV.masked_fill(inside_NV, float("-inf")).logsumexp(1)


def make_student(
    world: World, logits_NV: Tensor, batch: RolloutBatch, supports: Sequence[str], rows: Sequence[int]
) -> StudentTokens:
    """What the kernel would return for these logits."""
    logprobs_NV = logits_NV[places_of(world, rows)].log_softmax(-1)
    ids = {name: batch.signals[name].topk_ids_NK for name in supports}
    return StudentTokens(
        logprobs_N=logprobs_NV.gather(1, batch.ids_N[:, None])[:, 0],
        entropies_N=-(logprobs_NV.exp() * logprobs_NV).sum(1).detach(),
        topk_logprobs_NK={
            name: logprobs_NV.gather(1, ids_NK.clamp(min=0)).masked_fill(ids_NK < 0, 0.0)
            for name, ids_NK in ids.items()
        },
        tail_logprobs_N={name: tail_of(logprobs_NV, ids_NK) for name, ids_NK in ids.items()},
    )
