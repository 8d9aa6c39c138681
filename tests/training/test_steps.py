"""Learning rate, weight decay, drift, and the file of metrics."""

import math
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from lightopd.objectives.base.batch import BatchTotals
from lightopd.objectives.requirements import needs
from lightopd.schemas.finetune import FinetuneConfig, OptimizerConfig, StalenessLimits
from lightopd.schemas.objectives.objective import ObjectiveConfig
from lightopd.training.data.batches import collect_rows
from lightopd.training.measures.metrics_file import append_metrics, global_sums, keep_metrics, read_metrics
from lightopd.training.module import StudentModule
from lightopd.training.optimizer import clip_gradients, learning_rate, make_optimizer
from lightopd.training.student.drift import DriftWatch, drift_metrics, drift_sums, exceeded_limits
from lightopd.training.student.training_mode import prepare_student


def rates(steps=6, **settings):
    config = OptimizerConfig(lr=1.0, **settings)
    return [learning_rate(config, step, steps) for step in range(steps)]


def test_a_constant_rate_is_the_peak_throughout():
    assert rates() == [1.0] * 6


def test_warm_up_rises_linearly_to_the_peak():
    assert rates(warmup_steps=4) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_linear_and_cosine_fall_from_the_peak_towards_zero():
    assert rates(schedule="linear", warmup_steps=2) == [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    expected = [(1 + math.cos(math.pi * step / 6)) / 2 for step in range(6)]
    assert rates(schedule="cosine") == pytest.approx(expected)


def test_only_matrices_decay():
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LayerNorm(2))
    groups = make_optimizer(model, OptimizerConfig(weight_decay=0.1)).param_groups
    assert [(group["weight_decay"], len(group["params"])) for group in groups] == [(0.1, 1), (0.0, 3)]


def test_clipping_returns_the_norm_before_it():
    model = torch.nn.Linear(1, 1, bias=False)
    model.weight.grad = torch.full((1, 1), 5.0)
    assert float(clip_gradients(model, None)) == 5.0
    assert float(model.weight.grad) == 5.0
    assert float(clip_gradients(model, 1.0)) == 5.0
    assert float(model.weight.grad) == pytest.approx(1.0, abs=1e-5)


def drift_totals(now, ref, trained=None, behavior=None):
    """The sums of one step as plain numbers."""
    now, ref = torch.as_tensor(now), torch.as_tensor(ref)
    trained = torch.ones(len(now), dtype=torch.bool) if trained is None else torch.tensor(trained)
    sums = drift_sums(now, ref, None if behavior is None else torch.as_tensor(behavior), trained)
    return {name: (float(total), float(weight)) for name, (total, weight) in sums.items()}


def drift_of(*sides, **others):
    return drift_metrics(drift_totals(*sides, **others))


def test_drift_of_an_unchanged_student_is_none():
    drift = drift_of([-1.0, -2.0], [-1.0, -2.0])
    assert drift == {
        "w_mean": 1.0,
        "w_std": 0.0,
        "ess": 1.0,
        "chi2": 0.0,
        "chi2_error": 0.0,
        "overlap": 1.0,
        "log_ratio_lost": 0.0,
    }


def test_drift_is_as_worked_out_by_hand():
    # w = 1/2 and 3/2: mean 1, mean square 5/4, (w - 1)^2 is 1/4 at both.
    drift = drift_of([math.log(0.5), math.log(1.5), 9.0], [0.0, 0.0, 0.0], [True, True, False])
    assert drift["w_mean"] == pytest.approx(1.0, rel=1e-6)
    assert drift["w_std"] == pytest.approx(0.5, rel=1e-6)
    assert drift["chi2"] == pytest.approx(0.25, rel=1e-6)
    assert drift["chi2_error"] == pytest.approx(0.0, abs=1e-6)
    assert drift["ess"] == pytest.approx(0.8, rel=1e-6)
    assert drift["overlap"] == pytest.approx(((0.5**0.5 + 1.5**0.5) / 2) ** 2, rel=1e-6)
    assert drift["log_ratio_lost"] == pytest.approx(-math.log(0.75) / 2, rel=1e-6)


def test_chi_square_of_one_batch_is_never_negative():
    drift = drift_of([math.log(0.5), math.log(0.6)], [0.0, 0.0])  # mean w^2 - 1 is -0.7 here
    assert drift["chi2"] == pytest.approx((0.25 + 0.16) / 2, rel=1e-6)


def test_a_temperature_alone_is_no_drift_and_makes_w_an_importance_ratio():
    torch.manual_seed(0)
    ref_V = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    mu_V = (ref_V / 0.8).log_softmax(0)
    ids_N = torch.multinomial(mu_V.exp(), 4000, replacement=True)
    drift = drift_of(ref_V[ids_N], ref_V[ids_N], behavior=mu_V[ids_N])
    assert drift["overlap"] == 1.0
    assert drift["log_ratio_lost"] == drift["chi2_error"] == 0.0
    assert drift["w_mean"] == pytest.approx(1.0, abs=0.02)
    assert drift["chi2"] == pytest.approx(float((ref_V.exp() ** 2 / mu_V.exp()).sum() - 1), abs=0.01)


def test_only_passed_limits_are_named():
    limits = StalenessLimits(min_overlap=0.9, max_chi2=1.0, max_log_ratio=0.2)
    well = {"ess": 0.01, "overlap": 0.95, "chi2": 9.0, "chi2_error": 8.0, "log_ratio_lost": 0.1}
    assert exceeded_limits(well, 9.0, limits) == []
    passed = exceeded_limits({**well, "overlap": 0.8, "log_ratio_lost": 0.3}, 9.0, limits)
    assert passed == ["log_ratio_lost 0.3 (limit 0.2)", "overlap 0.8 (limit 0.9)"]
    assert exceeded_limits({**well, "chi2_error": 3.0}, 9.0, limits) == ["chi2 9 (limit 1)"]


def draws_of_moved_student(move, tokens, seed):
    """Log-probabilities now and at rollout of tokens that the student at rollout drew, from 50 ids."""
    random = torch.Generator().manual_seed(seed)
    ref_CV = (2 * torch.randn(200, 50, generator=random, dtype=torch.float64)).log_softmax(1)
    now_CV = (ref_CV + move * torch.randn(200, 50, generator=random, dtype=torch.float64)).log_softmax(1)
    rows_N = torch.randint(200, (tokens,), generator=random)
    ids_N = torch.multinomial(ref_CV[rows_N].exp(), 1, generator=random)[:, 0]
    return now_CV[rows_N, ids_N], ref_CV[rows_N, ids_N]


def verdicts(move, steps=6, tokens=2000, outlier=None):
    """Whether the cache is stale at each of several steps of a student that has moved so far."""
    watch, found = DriftWatch(StalenessLimits(), steps=100), []
    for step in range(1, steps + 1):
        now_N, ref_N = draws_of_moved_student(move, tokens, step)
        if outlier is not None:
            now_N[0] = ref_N[0] + math.log(outlier)
        found.append(watch.metrics(step, drift_totals(now_N, ref_N), is_speaking=False)["stale"])
    return found


def test_a_really_stale_cache_is_called_so_and_not_by_its_first_steps():
    assert verdicts(move=1.0) == [0, 0, 1, 1, 1, 1]


def test_a_student_that_hardly_moved_is_never_called_stale_nor_is_one_with_a_runaway_token():
    assert verdicts(move=0.3) == [0] * 6
    now_N, ref_N = draws_of_moved_student(0.1, 2000, 1)
    now_N[0] = ref_N[0] + math.log(476.0)  # as one of 77,516 tokens had it
    assert drift_of(now_N, ref_N)["ess"] < 0.05
    assert verdicts(move=0.1, outlier=476.0) == [0] * 6


def test_one_step_past_a_limit_decides_nothing_and_a_resumed_run_counts_on():
    still, moved = ([0.0] * 4, [0.0] * 4), ([-1.0] * 4, [0.0] * 4)
    watch = DriftWatch(StalenessLimits(), steps=100)
    told = [
        watch.metrics(1, drift_totals(*each), is_speaking=False)["stale"] for each in (moved, still, moved)
    ]
    assert told == [0, 0, 0]
    assert watch.num_exceeded == 1
    resumed = DriftWatch(StalenessLimits(), steps=100, num_exceeded=2)
    assert resumed.metrics(4, drift_totals(*moved), is_speaking=False)["stale"] == 1


def test_sums_add_up_over_micro_batches_and_are_reduced_once():
    calls = []

    def double(flat):
        calls.append(flat)
        return flat * 2

    pair = (torch.tensor(1.5), torch.tensor(2.0))
    assert global_sums([{"a": pair, "b": pair}, {"a": pair, "b": pair}], double) == {
        "a": (6.0, 8.0),
        "b": (6.0, 8.0),
    }
    assert len(calls) == 1


def test_metrics_survive_the_file_to_the_last_bit(tmp_path):
    path = tmp_path / "metrics.csv"
    rows = [{"step": 1, "loss": 0.1 + 0.2}, {"step": 2, "loss": float("nan")}]
    for row in rows:
        append_metrics(path, row)
    read = read_metrics(path)
    assert read[0] == {"step": 1.0, "loss": 0.1 + 0.2}
    assert math.isnan(read[1]["loss"])


def test_rows_after_the_checkpoint_and_half_written_rows_are_dropped(tmp_path):
    path = tmp_path / "metrics.csv"
    for step in (1, 2, 3):
        append_metrics(path, {"step": step, "loss": step / 3})
    whole = path.read_text()
    path.write_text(whole + "4,0.1")
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 3]
    keep_metrics(path, 2)
    assert path.read_text() == whole[: whole.index("3,")]
    keep_metrics(path, 0)
    assert read_metrics(path) == []
    append_metrics(path, {"step": 1, "loss": 1.0})
    assert path.read_text() == "step,loss\n1,1.0\n"


@dataclass
class Strategy:
    """What a module asks of Lightning's strategy."""

    def backward(self, loss, *_):
        loss.backward()


@dataclass
class Trainer:
    """What a module asks of Lightning's trainer."""

    world_size: int
    strategy: Strategy = field(default_factory=Strategy)


def gradient_norm(data, student_folder, world_size):
    """Of this rank's share of a step, as it reaches a strategy that takes the mean over the ranks."""
    model = AutoModelForCausalLM.from_pretrained(student_folder, dtype=torch.float32)
    objective, finetune = ObjectiveConfig(), FinetuneConfig()
    student = prepare_student(model, gradient_checkpointing=False)
    module = StudentModule(student, objective, needs(objective), finetune)
    module._trainer = Trainer(world_size)
    store, index = data
    totals = BatchTotals(len(index.row_P), int(index.trained_P.sum()))
    rows = collect_rows(store, index, np.arange(len(index.row_P)), totals)
    module._backward(rows, {}, None, is_last=True)
    return float(clip_gradients(model, None))


def test_a_rank_gives_its_share_times_the_number_of_ranks_because_ddp_takes_their_mean(data, student_folder):
    alone, of_four = (gradient_norm(data, student_folder, size) for size in (1, 4))
    assert of_four == pytest.approx(4 * alone, rel=1e-6)
