"""Every shipped recipe trains through the whole path, and what an objective keeps of a run survives it."""

import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from host_reads import NoHostReads
from transformers import AutoModelForCausalLM

from lightopd.cache.manifests import signal_folder
from lightopd.cache.shards import shard_path, write_shard
from lightopd.cache.store import open_cache
from lightopd.errors import CacheError, ConfigError, TrainingError
from lightopd.objectives.requirements import needs
from lightopd.pipelines.methods import read_method
from lightopd.schemas.configs import ModelConfig
from lightopd.schemas.finetune import FinetuneConfig, OptimizerConfig
from lightopd.schemas.objectives.objective import ObjectiveConfig
from lightopd.training.checkpoints.checkpoint import newest_checkpoint
from lightopd.training.data.split import select_rollouts
from lightopd.training.fit import fit
from lightopd.training.measures.metrics_file import read_metrics
from lightopd.training.module import StudentModule

METHODS = Path(__file__).parents[2] / "pipelines" / "recipes" / "methods"
MIXED = ("soda", "raft", "brts", "trd", "decoupling_teacher_fkl", "decoupling_teacher_rkl")
"""Recipes over answers of both the teacher and the student."""


def objective_of(name, caches):
    """A recipe's objective, its teacher's answers where this test has them."""
    plain = read_method(METHODS / f"{name}.yaml").objective.model_dump(mode="json")
    for selection in plain["select"]:
        if "answers" in selection:
            selection |= {"answers": str(caches["answers"].path), "prompts": 4}
    for term in plain["terms"]:
        if term["extrapolate"] and term["extrapolate"]["kind"] == "by_distance":
            term["extrapolate"]["max_tail"] = 1.0  # models without training leave much to the tail
    return ObjectiveConfig.model_validate(plain)


@pytest.fixture(autouse=True)
def _micro_batches_wait_for_nothing(monkeypatch):
    """In all tests here students attend as on a GPU, and no micro-batch reads a tensor on the host."""
    backward = StudentModule._backward

    def watched(self, *arguments, **options):
        with NoHostReads():
            return backward(self, *arguments, **options)

    monkeypatch.setattr("lightopd.training.fit.uses_gpu", lambda finetune: True)
    monkeypatch.setattr(StudentModule, "_backward", watched)


@pytest.fixture
def train(wide_caches, student_folder, tmp_path):
    """Function that trains on all selected rollouts at every step."""

    def run(name, out="out", objective=None, cache=None, **settings):
        config = objective or objective_of(name, wide_caches)
        cache = cache or wide_caches["pairs" if name in MIXED else "plain"]
        held_out = 4 if config.jump or config.exposure else 0
        index = select_rollouts(cache, config, needs(config), held_out).trained
        defaults = {
            "steps": 2,
            "batch_sequences": len(index.row_P),
            "micro_batch_tokens": 88,
            "held_out": held_out,
            "optimizer": OptimizerConfig(lr=2e-3, eps=1e-3),
        }
        finetune = FinetuneConfig(**(defaults | settings))
        return fit(cache, ModelConfig(path=str(student_folder)), tmp_path / out, finetune, config)

    return run


def rows_of(result):
    rows = read_metrics(result.student.parent / "metrics.csv")
    return [{k: v for k, v in row.items() if k not in ("seconds", "tokens_per_second")} for row in rows]


TEACHERLESS = ("zppo",)
"""Where each step begins the surrogate of a reward is 0 and tells no direction; the reference test does."""


def distance(objective, row):
    """What falls when the student moves the right way: its losses, or, where the value of a loss says nothing
    (an advantage, a stopped gradient), the teacher's lead on the sampled tokens."""
    targets = [term.target for term in objective.terms]
    if targets[0].kind == "constant":
        return targets[0].value * row["log_ratio_lost"]
    leads = [value for name, value in row.items() if name.endswith("log_ratio")]
    if len(leads) > 1 and all("stop_gradient" in dict(one).values() for one in targets):
        return sum(map(abs, leads))
    if any(one.kind in ("log_ratio", "reward") or "stop_gradient" in dict(one).values() for one in targets):
        return abs(leads[0])
    parts = [value for name, value in row.items() if name.endswith("/loss")]
    return sum(parts) if parts else row["loss"]


@pytest.mark.parametrize("name", sorted(path.stem for path in METHODS.glob("*.yaml")))
def test_every_recipe_trains_and_moves_its_objective_the_right_way(train, wide_caches, name):
    first, second = rows_of(train(name))
    if name in TEACHERLESS:
        assert all(row["grad_norm"] > 0 for row in (first, second))
        return
    objective = objective_of(name, wide_caches)
    assert distance(objective, second) < distance(objective, first)


RAISING = ObjectiveConfig.model_validate(
    {"curriculum": {"kind": "lengths", "lengths": [2, 4, 8], "every": 1}, "target": {"kind": "divergence"}}
)
JUMPING = ObjectiveConfig.model_validate({"target": {"kind": "divergence"}, "jump": {}})
EXPOSED = ObjectiveConfig.model_validate(
    {"signal": "exposure_2", "exposure": {"hold": 1}, "target": {"kind": "divergence"}}
)
KINDS = {
    "exposure": ("atesd", EXPOSED),
    "prepared": ("scope", None),
    "pairs": ("soda", None),
    "step_sums": ("renio", None),
    "balance": ("raft", None),
    "turns": ("tcod", None),
    "lengths": ("decoupling_lengths", RAISING),
    "answers": ("video_opd", None),
    "jump": ("effopd", JUMPING),
}


def test_the_ladder_reads_the_entropy_of_held_out_rollouts_every_so_many_steps(train, tmp_path, caplog):
    caplog.set_level("INFO", "lightopd")

    def climb(least, held_out=8):
        """The rung after three steps, the entropies that were read, and those of the steps."""
        caplog.clear()
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        ladder = {"kind": "lengths", "lengths": [2, 4, 8], "every": 2, "min_entropy": least}
        config = ObjectiveConfig.model_validate({"curriculum": ladder, "target": {"kind": "divergence"}})
        rows = rows_of(train("decoupling_lengths", objective=config, steps=3, held_out=held_out))
        lines = [one.getMessage() for one in caplog.records if "on the rollouts held out" in one.getMessage()]
        rung = newest_checkpoint(tmp_path / "out" / "checkpoints")[1].objective["rung"]
        return rung, [float(line.split("entropy ")[1].split(" ")[0]) for line in lines], rows[1]["entropy"]

    rung, (read,), of_step = climb(0.0)
    assert rung == 1
    assert abs(read - of_step) > 0.002  # no limit below tells them apart by accident
    assert climb(read - 0.001)[0] == 1
    assert climb(read + 0.001)[0] == 0
    assert climb(0.0, held_out=0)[1] == []


def weights_of(result):
    return AutoModelForCausalLM.from_pretrained(result.student, dtype=torch.float32).state_dict()


@pytest.mark.parametrize("kind", KINDS)
def test_results_do_not_depend_on_micro_batches_and_a_resumed_run_has_the_same_bits(train, kind):
    name, objective = KINDS[kind]
    gentle = OptimizerConfig(lr=1e-4, eps=1e-3)
    settings = {"batch_sequences": 8, "steps": 4, "checkpoint_every": 2, "optimizer": gentle}
    settings["held_out_every"] = 1
    whole = train(name, "whole", objective, **settings)
    train(name, "cut", objective, **(settings | {"steps": 2}))
    again = train(name, "cut", objective, **settings)
    assert rows_of(again) == rows_of(whole)
    one, other = weights_of(whole), weights_of(again)
    assert all(torch.equal(one[key], other[key]) for key in one)
    at_once = train(name, "at once", objective, **(settings | {"micro_batch_tokens": 10_000}))
    for left, right in zip(rows_of(whole), rows_of(at_once), strict=True):
        assert left == pytest.approx(right, rel=1e-5, abs=1e-6, nan_ok=True)
    for key, tensor in weights_of(at_once).items():
        torch.testing.assert_close(one[key], tensor, rtol=1e-6, atol=1e-6)


def test_a_balance_of_terms_goes_on_where_the_checkpoint_left_it(train, tmp_path):
    train("raft")
    state = newest_checkpoint(tmp_path / "out" / "checkpoints")[1].objective
    assert state["steps"] == 2
    assert set(state["averages"]) == {"sft", "kl"}
    assert all(value > 0 for value in state["averages"].values())


def test_a_curriculum_trains_the_tokens_of_its_rung_and_divides_by_their_number(train):
    rows = rows_of(train("decoupling_lengths", objective=RAISING, steps=3, batch_sequences=24))
    assert [row["tokens"] for row in rows] == [24 * (3 + shown) for shown in (2, 4, 8)]


def test_a_jump_takes_the_weights_further_where_the_held_out_score_gains(train):
    settings = {"steps": 3, "held_out_every": 1, "held_out": 4}
    jumped = rows_of(train("effopd", objective=JUMPING, **settings))
    plain = JUMPING.model_copy(update={"jump": None})
    walked = rows_of(train("effopd", "walked", objective=plain, **settings, batch_sequences=20))
    assert jumped[0]["jump"] > 0
    assert jumped[2]["jump"] == 0
    assert jumped[0]["held_out"] < walked[0]["held_out"]


def test_held_out_prompts_are_never_trained_on(wide_caches):
    cache, objective = wide_caches["plain"], ObjectiveConfig()
    whole = select_rollouts(cache, objective, needs(objective), 0)
    parted = select_rollouts(cache, objective, needs(objective), 5)
    assert len(parted.held_out.row_P) == 8
    assert not set(parted.held_out.groups_P) & set(parted.trained.groups_P)
    assert len(parted.trained.row_P) + 8 == len(whole.trained.row_P)
    assert parted.notes == ("8 rollouts are held out",)


def test_pairs_stay_together_and_their_number_divides_the_batch(train, wide_caches):
    with pytest.raises(ConfigError, match="groups of 2 rollouts; set it to a multiple of 2"):
        train("soda", batch_sequences=7)
    with pytest.raises(TrainingError, match=r"2 rollouts stay together, .* set micro_batch_tokens to 22"):
        train("soda", micro_batch_tokens=21)


def test_warnings_and_what_was_dropped_are_said_once(train, wide_caches, caplog):
    caplog.set_level("INFO")
    bare = objective_of("exopd", wide_caches).model_dump(mode="json")
    bare["terms"][0]["token_weights"] = []
    result = train("exopd", objective=ObjectiveConfig(**bare))
    said = [record for record in caplog.records if "add baseline: expected" in record.getMessage()]
    assert [record.levelname for record in said] == ["WARNING"]
    assert "selection balance_outcomes dropped" in train("uni_opd", "uni").notes[0]
    assert result.notes == ()


def test_a_log_probability_that_is_not_finite_is_named_before_the_first_step(train, wide_caches, tmp_path):
    source = wide_caches["plain"]
    cache = open_cache(Path(shutil.copytree(source.path, tmp_path / "cache")))
    folder, marker = signal_folder(cache.path, "teacher"), cache.signals["teacher"].markers[1]
    table = pq.read_table(shard_path(folder, 1))
    values = table.column("logprobs").to_pylist()
    values[3][2] = float("nan")
    column = pa.array(values, table.schema.field("logprobs").type)
    broken = table.set_column(
        table.schema.get_field_index("logprobs"), table.schema.field("logprobs"), column
    )
    write_shard(folder, 1, broken, kind="signals/teacher", fingerprint=marker.fingerprint)
    with pytest.raises(CacheError, match=r"teacher/part-00001.parquet row 3: logprobs has nan at place 2"):
        train("lightning_opd", cache=open_cache(cache.path))


def test_rounded_top_k_never_makes_a_divergence_negative(train, wide_caches):
    plain = {"target": {"kind": "divergence"}, "signal": "rounded"}
    first = rows_of(train("", objective=ObjectiveConfig.model_validate(plain), steps=1))[0]
    assert 0 <= first["loss"] < 1e-5


def test_an_exposure_is_chosen_from_the_loss_held_out_and_said_at_every_step(train, tmp_path):
    rows = rows_of(train("atesd", objective=EXPOSED, steps=6, held_out=8))
    state = newest_checkpoint(tmp_path / "out" / "checkpoints")[1].objective["exposure"]
    assert rows[0]["exposure"] == 2
    assert len({row["exposure"] for row in rows}) > 1
    assert len(state["rewards"]) == 5


def test_an_exposure_without_rollouts_held_out_is_refused(train):
    with pytest.raises(ConfigError, match="chooses an exposure by the loss on held-out rollouts"):
        train("atesd", objective=EXPOSED, held_out=0)
