"""Loggers: every step once with its numbers in a run that was cut; real packages where installed."""

from types import SimpleNamespace

import pytest
from lightning.pytorch.loggers.logger import DummyLogger

from lightopd.schemas.configs import ModelConfig
from lightopd.schemas.finetune import FinetuneConfig, OptimizerConfig
from lightopd.schemas.objectives.objective import ObjectiveConfig
from lightopd.training import fit as fitting
from lightopd.training.loggers import StepwiseWandb
from lightopd.training.measures.metrics_file import read_metrics

STEPS, CUT = 6, 5


class Recorder(DummyLogger):
    """A logger that keeps what it hears."""

    def __init__(self):
        super().__init__()
        self.heard = []

    def log_metrics(self, metrics, step=None):
        self.heard.append((step, dict(metrics)))


@pytest.fixture
def cut_run(make_cache, student_folder, tmp_path, monkeypatch):
    """Function that trains, dies in step 5 with a checkpoint of step 4, and goes on; metrics by step."""

    def run(**settings):
        cache, out = make_cache(tmp_path / "cache"), tmp_path / "out"
        calm = OptimizerConfig(lr=1e-3, eps=1e-3)
        plain = {"steps": STEPS, "batch_sequences": 8, "micro_batch_tokens": 60, "optimizer": calm}
        plain |= {"checkpoint_every": 2, "held_out": 4, "held_out_every": 3}
        finetune = FinetuneConfig(**plain, **settings)
        append = fitting.MetricsFile.on_train_batch_end

        def dies(self, trainer, module, *rest):
            append(self, trainer, module, *rest)
            if module.step == CUT:
                raise SystemExit("killed")

        def train():
            student = ModelConfig(path=str(student_folder))
            fitting.fit(cache, student, out, finetune, ObjectiveConfig())

        with monkeypatch.context() as patch:
            patch.setattr(fitting.MetricsFile, "on_train_batch_end", dies)
            with pytest.raises(SystemExit):
                train()
        train()
        return {int(row["step"]): row for row in read_metrics(out / "metrics.csv")}

    return run


def test_a_logger_hears_every_step_once_and_no_number_that_was_not_measured(cut_run, monkeypatch):
    made = []

    def recorder(*_):
        made.append(Recorder())
        return [made[-1]]

    monkeypatch.setattr(fitting, "make_loggers", recorder)
    rows = cut_run()
    assert [step for step, _ in made[0].heard] == [1, 2, 3, 4, 5]
    assert [step for step, _ in made[1].heard] == [1, 2, 3, 4, 5, 6]
    for step, heard in made[1].heard:
        assert heard == {k: v for k, v in rows[step].items() if k != "step" and v == v}
        assert ("held_out" in heard) == (step in (3, 6))


def test_wandb_is_not_told_a_step_that_it_has():
    told = []
    run = SimpleNamespace(starting_step=4, log=lambda metrics, step: told.append((metrics["loss"], step)))
    for step in (3, 4, 5):
        StepwiseWandb.log_metrics(SimpleNamespace(experiment=run), {"loss": step / 10}, step=step)
    assert told == [(0.4, 4), (0.5, 5)]


def test_tensorboard_shows_every_step_once(cut_run, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    rows = cut_run(loggers=("tensorboard",))
    events = EventAccumulator(str(tmp_path / "out" / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    assert [event.step for event in events.Scalars("held_out")] == [3, 6]
    assert [event.step for event in events.Scalars("loss")] == [*range(1, STEPS + 1)]
    for event in events.Scalars("loss"):
        assert event.value == pytest.approx(rows[event.step]["loss"], rel=1e-6)


def test_wandb_has_a_run_of_its_own_for_each_training_of_a_process(cut_run, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    cut_run(loggers=("wandb",))
    assert wandb.run is None
    assert len(list((tmp_path / "out" / "wandb").glob("offline-run-*/*.wandb"))) == 2
