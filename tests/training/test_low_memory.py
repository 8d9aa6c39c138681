"""Weights in bfloat16 that are rounded at random, and moments in 8 bits."""

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from torch import nn

from lightopd.schemas.finetune import FinetuneConfig, OptimizerConfig
from lightopd.training.distributed.fsdp import moments_of
from lightopd.training.optimizer import SIGNED, make_optimizer, narrow_moments, set_learning_rate

pytest.importorskip("torchao")
RATE = 2e-6


def weights_after(optimizer_of, steps=100):
    """The mean of weights that begin at 1, each with a gradient of 1."""
    model = nn.Linear(64, 64, bias=False).to(torch.bfloat16)
    nn.init.ones_(model.weight)
    optimizer = optimizer_of(model, OptimizerConfig(lr=RATE, weight_decay=0.0))
    for _ in range(steps):
        model.weight.grad = torch.ones_like(model.weight)
        optimizer.step()
    return model, optimizer


@pytest.mark.slow
def test_a_rate_too_small_for_bfloat16_moves_the_mean_of_weights_as_in_float32():
    torch.manual_seed(0)
    still, _ = weights_after(lambda model, config: torch.optim.AdamW(model.parameters(), lr=config.lr))
    moved, _ = weights_after(lambda model, config: make_optimizer(model, config, low_memory=True))
    assert (still.weight == 1).all()
    # 100 steps of 2e-6; a weight of 4096 moves by 2**-8 or not at all, so that the mean is known to 1.2e-5.
    assert float(1 - moved.weight.double().mean()) == pytest.approx(100 * RATE, abs=4e-5)


@pytest.mark.slow
def test_moments_of_a_checkpoint_come_back_as_they_were():
    model, optimizer = weights_after(lambda model, config: make_optimizer(model, config, low_memory=True), 3)
    stored = moments_of(model, optimizer)
    assert stored["exp_avg/weight"].dtype == torch.float32
    codes = {name: optimizer.state[model.weight][name].codes.clone() for name in SIGNED}
    optimizer.state[model.weight] = {name: stored[f"{name}/weight"] for name in ("step", *SIGNED)}
    narrow_moments(optimizer)
    for name in SIGNED:
        assert torch.equal(optimizer.state[model.weight][name].codes, codes[name])


@pytest.mark.slow
def test_a_run_follows_that_in_float32_and_is_resumed(train, tmp_path):
    slow = {"optimizer": OptimizerConfig(lr=1e-4), "checkpoint_every": 2}
    full = train("full", steps=4, **slow)
    train("small", steps=2, precision="bf16-true", gradient_checkpointing=True, **slow)
    small = train("small", steps=4, precision="bf16-true", gradient_checkpointing=True, **slow)
    # Weights of two to three digits.
    assert small.metrics["loss"] == pytest.approx(full.metrics["loss"], abs=0.02)
    exported = load_file(tmp_path / "small" / "student" / "model.safetensors")
    assert {tensor.dtype for tensor in exported.values()} == {torch.bfloat16}


def test_the_rate_of_every_optimizer_can_be_set():
    model = nn.Linear(64, 64, bias=False).to(torch.bfloat16)
    optimizer = make_optimizer(model, OptimizerConfig(), low_memory=True)
    set_learning_rate(optimizer, 0.5)
    assert float(optimizer.param_groups[0]["lr"]) == 0.5


@pytest.mark.parametrize("setting", [{"ema_decay": 0.9}, {"strategy": "fsdp"}])
def test_what_bfloat16_weights_do_not_go_with_is_refused(setting):
    with pytest.raises(ValidationError, match="precision bf16-true does not go with"):
        FinetuneConfig(precision="bf16-true", **setting)
