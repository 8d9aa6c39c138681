"""A student trained under the prompts that a text column shows, in place of its rollouts' own."""

import pytest
import torch
from training_runs import CALM, assert_same_bits, rows_of
from transformers import AutoModelForCausalLM

from lightopd.cache.contexts import read_texts
from lightopd.cache.reader import read_columns
from lightopd.config import build
from lightopd.errors import CacheError, ConfigError
from lightopd.schemas.configs import TrainConfig

SHOWN = {"shown": "feedback_shown", "target": {"kind": "mle"}}


@pytest.fixture
def run(train, wide_caches):
    def trained(out="out", objective=SHOWN, **settings):
        defaults = {"steps": 2, "batch_sequences": 24, "optimizer": CALM, "checkpoint_every": 1}
        return train(out, objective, cache=wide_caches["plain"], **(defaults | settings))

    return trained


def negative_likelihood(student, prompt, response):
    ids = torch.tensor([[*prompt, *response]])
    logits = student(input_ids=ids).logits[0, len(prompt) - 1 : -1].double()
    chosen = logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None])
    return float(-chosen.mean())


def test_the_loss_is_that_of_the_responses_under_the_prompts_that_are_shown(run, wide_caches, student_folder):
    cache = wide_caches["plain"]
    student = AutoModelForCausalLM.from_pretrained(student_folder, dtype=torch.float32).eval()
    losses = {"shown": [], "own": []}
    with torch.no_grad():
        for shard in cache.shards:
            rollouts = read_columns(cache, shard, ["prompt_ids", "response_ids"]).to_pylist()
            for text, row in zip(
                read_texts(cache, "feedback_shown", shard).to_pylist(), rollouts, strict=True
            ):
                response = row["response_ids"]
                losses["shown"].append(negative_likelihood(student, text["prompt_ids"], response))
                losses["own"].append(negative_likelihood(student, row["prompt_ids"], response))
    wanted = {name: sum(values) / len(values) for name, values in losses.items()}
    assert abs(wanted["shown"] - wanted["own"]) > 1e-3
    assert rows_of(run("shown"))[0]["loss"] == pytest.approx(wanted["shown"], abs=1e-5)
    own = {"target": {"kind": "mle"}}
    assert rows_of(run("own", own))[0]["loss"] == pytest.approx(wanted["own"], abs=1e-5)


def test_shards_that_are_read_again_and_a_resumed_run_have_the_same_bits(run):
    whole = run("whole", steps=4, batch_sequences=8, shuffle_gib=1e-7)
    run("cut", steps=2, batch_sequences=8, shuffle_gib=1e-7)
    assert_same_bits(whole, run("cut", steps=4, batch_sequences=8, shuffle_gib=1e-7))


def test_drift_under_other_prompts_never_makes_a_cache_stale(run):
    rows = rows_of(run(steps=4, staleness=None))
    assert all(not row.get("stale") for row in rows)


def test_a_text_that_is_not_there_is_refused_with_the_command_that_makes_it(run):
    with pytest.raises(CacheError, match=r"no text hint, whose prompts .* --gives context"):
        run(objective=SHOWN | {"shown": "hint"})


def test_outcomes_of_a_step_have_no_measure_on_rollouts_held_out():
    settings = {"cache": "c", "student": "s", "out": "o", "held_out": 8}
    with pytest.raises(ConfigError, match="target unpaired compares the rollouts of a step"):
        build(TrainConfig, {**settings, "objective": {"target": "unpaired"}})
