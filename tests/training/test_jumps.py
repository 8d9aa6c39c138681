"""Jumps of the weights along their own update."""

import torch
from torch import Tensor, nn

from lightopd.schemas.objectives.weights import WeightJump
from lightopd.training.jumps import anchor_of, is_jump_step, jump, movable


class Small(nn.Module):
    """Names as in transformers models."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(3, 2)
        self.self_attn = nn.Linear(2, 2)
        self.mlp = nn.Linear(2, 2)
        self.norm = nn.LayerNorm(2)


def parameters_at(value: float) -> dict[str, Tensor]:
    model = Small()
    for tensor in model.parameters():
        nn.init.constant_(tensor, value)
    return dict(model.named_parameters())


def test_jumps_come_after_powers_of_two():
    steps = [step for step in range(40) if is_jump_step(step)]
    assert steps == [1, 2, 4, 8, 16, 32]


def test_only_attention_and_feed_forward_matrices_move():
    assert list(movable(parameters_at(0.0))) == ["self_attn.weight", "mlp.weight"]


def test_candidates_lie_at_two_four_six_eight_ten_times_the_update():
    parameters, anchor = parameters_at(1.0), anchor_of(parameters_at(0.0))
    seen: list[float] = []

    def score() -> float:
        seen.append(parameters["mlp.weight"][0, 0].item())
        return seen[-1]

    found = jump(WeightJump(), parameters, anchor, score)
    assert seen == [1, 3, 5, 7, 9, 11]
    assert (found.accepted, found.scores) == (5, (1, 3, 5, 7, 9, 11))
    assert parameters["mlp.weight"][0, 0].item() == 11
    assert parameters["norm.weight"][0].item() == 1


def test_the_search_stops_at_the_first_failure_and_goes_back_to_the_best():
    parameters, anchor = parameters_at(1.0), anchor_of(parameters_at(0.0))
    scores = iter([0.1, 0.2, 0.2, 9.0])
    found = jump(WeightJump(), parameters, anchor, lambda: next(scores))
    assert (found.accepted, found.scores) == (1, (0.1, 0.2, 0.2))
    assert parameters["mlp.weight"][0, 0].item() == 3


def test_a_rejected_jump_leaves_every_bit_as_it_was():
    parameters = {name: tensor.detach().bfloat16() for name, tensor in parameters_at(0.3).items()}
    before = {name: tensor.clone() for name, tensor in parameters.items()}
    scores = iter([1.0, 0.5])
    found = jump(WeightJump(), parameters, anchor_of(parameters_at(0.1)), lambda: next(scores))
    assert found.accepted == 0
    assert all(torch.equal(parameters[name], before[name]) for name in before)
