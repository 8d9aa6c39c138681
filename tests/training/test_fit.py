"""The trainer as a whole: right numbers, the same however the work is cut, and resume to the last bit."""

import dataclasses
import logging
import math
import os
import signal

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from cache_cases import table_to_rollouts, table_to_scores
from training_runs import REVERSE_KL, SAMPLED, assert_close, assert_same_bits, rows_of
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from lightopd.cache.manifests import rollouts_folder, signal_folder
from lightopd.cache.shards import shard_path
from lightopd.errors import CacheError, ConfigError, OutputError, TrainingError
from lightopd.schemas.finetune import OptimizerConfig, StalenessLimits
from lightopd.training.checkpoints.checkpoint import newest_checkpoint
from lightopd.training.measures.metrics_file import read_metrics
from lightopd.training.student.memory import GIB, Memory


def test_the_first_step_is_lightning_opd_as_worked_out_in_float64(train, cache, student_folder):
    result = train(objective=SAMPLED, steps=1, batch_sequences=22, micro_batch_tokens=70)
    student = AutoModelForCausalLM.from_pretrained(student_folder, dtype=torch.float64)
    means, entropies = [], []
    for shard in cache.shards:
        rollouts = table_to_rollouts(pq.read_table(shard_path(rollouts_folder(cache.path), shard)))
        scores = table_to_scores(pq.read_table(shard_path(signal_folder(cache.path, "teacher"), shard)))
        for rollout, scored in zip(rollouts, scores, strict=True):
            ids = np.concatenate([rollout.prompt_ids, rollout.response_ids])
            logits_TV = student(input_ids=torch.from_numpy(ids).long()[None]).logits[0]
            logprobs_TV = logits_TV[len(rollout.prompt_ids) - 1 : -1].log_softmax(-1).detach().numpy()
            now_T = logprobs_TV[np.arange(len(logprobs_TV)), rollout.response_ids]
            advantage_T = np.clip(scored.logprobs - now_T, -10, 10)
            means.append(np.mean((-advantage_T * now_T)[rollout.loss_mask]))
            entropies += list(-(np.exp(logprobs_TV) * logprobs_TV).sum(1)[rollout.loss_mask])
    assert result.metrics["loss"] == pytest.approx(np.mean(means), abs=1e-5)
    assert result.metrics["entropy"] == pytest.approx(np.mean(entropies), rel=1e-5)
    assert result.metrics["w_mean"] == pytest.approx(1.0, abs=1e-5)
    assert result.metrics["ess"] == pytest.approx(1.0, abs=1e-5)
    assert result.metrics["log_ratio_lost"] == pytest.approx(0.0, abs=1e-5)


def test_training_brings_the_student_closer_to_the_teacher(train):
    settings = {"steps": 15, "batch_sequences": 22, "optimizer": OptimizerConfig(lr=5e-3)}
    rows = rows_of(train(objective={"target": {"kind": "divergence"}}, **settings))
    assert rows[-1]["loss"] < 0.5 * rows[0]["loss"]


@pytest.mark.parametrize("objective", [SAMPLED, {**SAMPLED, "reduce": "token_mean"}, REVERSE_KL])
def test_results_do_not_depend_on_the_size_of_micro_batches(train, objective):
    gentle = OptimizerConfig(lr=1e-4, eps=1e-3)
    one_by_one = train("small", objective, micro_batch_tokens=20, optimizer=gentle)
    at_once = train("large", objective, micro_batch_tokens=10_000, optimizer=gentle)
    assert_close(one_by_one, at_once)


@pytest.mark.parametrize("objective", [SAMPLED, REVERSE_KL])
def test_results_do_not_depend_on_the_layout(train, objective):
    settings = {"optimizer": OptimizerConfig(lr=1e-4, eps=1e-3), "held_out": 6, "held_out_every": 1}
    padded = train("padded", objective, **settings)
    packed = train("packed", objective, layout="packed", loader_workers=1, **settings)
    assert_close(padded, packed)


def test_a_run_goes_on_in_the_other_layout(train):
    train(steps=3)
    assert train(steps=6, layout="packed").steps == 6


def test_loader_processes_and_gradient_checkpointing_change_no_bit(train):
    plain = train("plain", steps=3)
    assert_same_bits(plain, train("workers", steps=3, loader_workers=2))
    assert_same_bits(plain, train("recomputed", steps=3, gradient_checkpointing=True))


def test_the_rate_of_the_schedule_is_the_one_the_optimiser_uses(train):
    warming = train("warming", steps=1, optimizer=OptimizerConfig(lr=1e-3, warmup_steps=10))
    assert warming.metrics["lr"] == 1e-4
    assert_same_bits(warming, train("warm", steps=1, optimizer=OptimizerConfig(lr=1e-4)))


TIGHT = StalenessLimits(max_log_ratio=0.0, min_overlap=1.0, max_chi2=0.0)
"""Limits that every student passes once it has moved."""


class StopAt(logging.Handler):
    """Sends this process Ctrl-C when a line of the log has the given words."""

    def __init__(self, words):
        super().__init__()
        self.words = words

    def emit(self, record):
        if self.words in record.getMessage():
            os.kill(os.getpid(), signal.SIGINT)


def interrupt(train, words, *args, **settings):
    logger, handler = logging.getLogger("lightopd"), StopAt(words)
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        with pytest.raises(KeyboardInterrupt):
            train(*args, **settings)
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


@pytest.mark.parametrize("objective", [SAMPLED, REVERSE_KL])
def test_an_interrupted_run_goes_on_to_the_same_bits(train, objective, tmp_path):
    whole = train("whole", objective)
    interrupt(train, "checkpoint", "cut", objective)
    assert newest_checkpoint(tmp_path / "cut" / "checkpoints")[1].step == 3
    assert_same_bits(train("cut", objective), whole)


def test_rows_after_the_last_checkpoint_are_made_again_and_stand_there_once(train):
    interrupt(train, "the cache is stale", "cut", staleness=TIGHT)
    with_limits = train("cut", staleness=TIGHT)
    assert [row["step"] for row in rows_of(with_limits)] == [1, 2, 3, 4, 5, 6]
    assert_same_bits(with_limits, train("whole", staleness=TIGHT))


def test_ctrl_c_is_passed_on_and_works_again_afterwards(train):
    before = signal.getsignal(signal.SIGINT)
    interrupt(train, "checkpoint")
    assert signal.getsignal(signal.SIGINT) is before


def test_a_finished_run_is_not_trained_again(train):
    first = train()
    file = first.student.parent / "checkpoints" / "step-000006" / "model.safetensors"
    stamp = file.stat().st_mtime_ns
    again = train()
    assert file.stat().st_mtime_ns == stamp
    assert (again.metrics, again.tokens, again.steps) == (first.metrics, first.tokens, 6)


def test_more_steps_go_on_where_a_constant_schedule_ended(train):
    train("longer", steps=4)
    assert_same_bits(train("longer", steps=6), train("at once", steps=6))


def test_a_checkpoint_of_another_recipe_is_refused_with_the_difference(train):
    train(steps=3)
    with pytest.raises(TrainingError, match=r"optimizer.lr is 0.002, there it was 0.001; set these back"):
        train(optimizer=OptimizerConfig(lr=2e-3, eps=1e-3))
    with pytest.raises(TrainingError, match=r"objective.terms.0.target.*, there it was "):
        train(objective=SAMPLED)
    with pytest.raises(TrainingError, match=r"seed is 1, there it was 0"):
        train(seed=1)
    with pytest.raises(TrainingError, match=r"has a checkpoint of step 3, and steps is 2"):
        train(steps=2)


def test_a_checkpoint_of_another_cache_or_student_is_refused(train, make_cache, teacher, tmp_path):
    train(steps=3)
    with pytest.raises(TrainingError, match=r"cache is .*, there it was"):
        train(cache=make_cache(tmp_path / "other", num_rollouts=20))
    teacher.save_pretrained(tmp_path / "other student")
    with pytest.raises(TrainingError, match=r"student is .*, there it was"):
        train(student=tmp_path / "other student")


def test_a_schedule_with_an_end_counts_the_steps(train):
    cosine = OptimizerConfig(lr=1e-3, schedule="cosine")
    train(steps=3, optimizer=cosine)
    with pytest.raises(TrainingError, match=r"steps is 6, there it was 3"):
        train(steps=6, optimizer=cosine)


def test_a_loss_that_is_not_finite_names_its_rollouts_and_keeps_the_last_checkpoint(train, cache, tmp_path):
    wild = OptimizerConfig(lr=1e30, weight_decay=0)
    with pytest.raises(TrainingError, match=r"of step 2 is not finite; rollouts in it: [0-9a-f]{32}"):
        train(optimizer=wild, checkpoint_every=1, batch_sequences=4)
    assert newest_checkpoint(tmp_path / "out" / "checkpoints")[1].step == 1
    assert [row["step"] for row in read_metrics(tmp_path / "out" / "metrics.csv")] == [1]


def test_a_stale_cache_is_said_once_and_recorded(train, caplog):
    result = train(staleness=TIGHT)
    lines = [record for record in caplog.records if "the cache is stale" in record.getMessage()]
    assert len(lines) == 1
    assert lines[0].levelno == logging.WARNING
    assert "chi2" in lines[0].getMessage()
    assert "roll out again from the current student" in lines[0].getMessage()
    stale = [row["stale"] for row in rows_of(result)]
    assert result.stale_steps == tuple(step for step, is_stale in enumerate(stale, 1) if is_stale)
    assert result.stale_steps[0] > 2


def test_answers_of_a_teacher_are_fitted_without_drift_or_signal(train, make_cache, tmp_path):
    answers = make_cache(tmp_path / "answers", origin="teacher")
    result = train("sft", {"target": "mle"}, cache=answers, steps=2)
    assert "w_mean" not in result.metrics
    assert "log_ratio" not in result.metrics
    with pytest.raises(CacheError, match="come from: teacher"):
        train("ratio", REVERSE_KL, cache=answers)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_held_out_rollouts_are_measured_with_the_weights_after_the_step(train, precision):
    held_out = {"steps": 1, "held_out": 6, "precision": precision}
    trained = train("out", REVERSE_KL, optimizer=OptimizerConfig(lr=1e-2), **held_out)
    unmoved = OptimizerConfig(lr=1e-30, weight_decay=0)
    again = train("again", REVERSE_KL, student=trained.student, optimizer=unmoved, **held_out)
    before = train("before", REVERSE_KL, optimizer=unmoved, **held_out)
    assert trained.metrics["held_out"] == again.metrics["held_out"] != before.metrics["held_out"]


def test_only_the_newest_checkpoints_stay(train, tmp_path):
    train(checkpoint_every=1, keep_checkpoints=2)
    names = sorted(path.name for path in (tmp_path / "out" / "checkpoints").iterdir())
    assert names == ["step-000005", "step-000006"]


def test_the_student_is_a_model_folder_with_the_tokenizer_and_without_trainer_files(train, student_folder):
    result = train()
    last = result.student.parent / "checkpoints" / "step-000006"
    assert (result.student / "model.safetensors").read_bytes() == (last / "model.safetensors").read_bytes()
    assert (result.student / "tokenizer.json").read_bytes() == (
        student_folder / "tokenizer.json"
    ).read_bytes()
    names = {path.name for path in result.student.iterdir()}
    assert names == {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}


def test_mixed_precision_stays_close_and_weights_stay_float32(train):
    full, mixed = train("full", steps=3), train("mixed", steps=3, precision="bf16-mixed")
    assert mixed.metrics["loss"] == pytest.approx(full.metrics["loss"], rel=0.1)
    assert mixed.metrics["loss"] != full.metrics["loss"]
    saved = AutoModelForCausalLM.from_pretrained(mixed.student)
    assert {parameter.dtype for parameter in saved.parameters()} == {torch.float32}


def test_dropout_is_off(train, make_cache, tmp_path):
    config = GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=64)
    assert config.resid_pdrop == config.attn_pdrop == 0.1
    torch.manual_seed(0)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    one = train("one", student=tmp_path / "gpt2", steps=2)
    assert_same_bits(one, train("two", student=tmp_path / "gpt2", steps=2))


def test_nothing_but_the_log_reaches_the_screen(train, capfd):
    capfd.readouterr()
    train()
    assert capfd.readouterr() == ("", "")


def test_a_logger_without_its_package_is_refused(train, monkeypatch):
    monkeypatch.setattr("lightopd.training.loggers.importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="logger wandb needs the package wandb"):
        train(loggers=("wandb",))


def test_a_sampler_with_more_outputs_than_the_student_is_fine_where_it_used_none_of_them(
    train, make_cache, tmp_path
):
    result = train(cache=make_cache(tmp_path / "wide", vocabulary_size=100), steps=1)
    assert result.steps == 1


def test_ids_that_the_student_does_not_have_are_refused(train, make_cache, tmp_path):
    def with_a_large_id(rollout):
        return dataclasses.replace(rollout, response_ids=np.array([*rollout.response_ids[:-1], 64], np.int32))

    wide = make_cache(tmp_path / "wide", vocabulary_size=100, change=with_a_large_id)
    with pytest.raises(TrainingError, match=r"part-00000.parquet has token id 64, .* has 64 outputs"):
        train(cache=wide)


def test_a_signal_that_is_missing_or_too_narrow_is_refused(train, make_cache, tmp_path):
    with pytest.raises(CacheError, match=r"no signal other \(there: teacher \(top 4\)\)"):
        train(objective={"signal": "other"})
    with pytest.raises(CacheError, match="signal teacher has 0 top-k entries and 1 or more are needed"):
        train(objective=REVERSE_KL, cache=make_cache(tmp_path / "narrow", top_k=0))


def test_a_strategy_that_does_not_exist_is_refused(train):
    with pytest.raises(ConfigError, match=r"strategy dpp do not work here: .*'dpp'"):
        train(strategy="dpp")


def test_an_out_folder_that_cannot_be_made_is_refused(train, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="a file lies where a folder is needed"):
        train("file")
    with pytest.raises(OutputError, match="a file lies where a folder is needed"):
        train("file/out")


def test_a_jump_without_rollouts_to_score_it_is_refused(train):
    with pytest.raises(ConfigError, match="held_out is 0; set held_out to 50 or more"):
        train(objective={"jump": {}})


def test_a_shard_that_changes_during_the_run_stops_it(train, cache, tmp_path):
    class Touch(logging.Handler):
        def emit(self, record):
            if "checkpoint" in record.getMessage():
                os.utime(shard_path(rollouts_folder(cache.path), 1))

    logger, handler = logging.getLogger("lightopd"), Touch()
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        with pytest.raises(CacheError, match="has changed or is gone since training began"):
            train(shuffle_gib=1e-9)
    finally:
        logger.removeHandler(handler)
        logger.setLevel(logging.NOTSET)
    assert newest_checkpoint(tmp_path / "out" / "checkpoints")[1].step == 3
    assert not math.isnan(read_metrics(tmp_path / "out" / "metrics.csv")[-1]["loss"])


@pytest.mark.parametrize(("size", "level"), [(GIB, "INFO"), (1000, "WARNING")])
def test_a_run_begins_with_what_memory_will_go_to(train, caplog, monkeypatch, size, level):
    caplog.set_level("INFO", "lightopd")
    monkeypatch.setattr("lightopd.training.fit.available_memory", lambda finetune: Memory("the GPU", size))
    train("out", steps=1)
    (said,) = [one for one in caplog.records if one.getMessage().startswith("estimated memory: ")]
    assert said.levelname == level
    for part in ("weights", "gradients", "moments", "activations", "kernel", "cache"):
        assert f"{part} " in said.getMessage()
    assert said.getMessage().endswith("GiB of the GPU")
