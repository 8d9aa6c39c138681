"""Log-probabilities in float16 and in parts of a nat: how far off they are, and what stays exact."""

from dataclasses import replace

import numpy as np
import pytest
from cache_cases import make_cache, make_scores, write_rollouts, write_signal

from lightopd.cache.signals.rounding import largest_error, largest_tail_error, rounded, rounded_tails
from lightopd.cache.tables import flat_column, scores_to_table
from lightopd.cache.verify import verify
from lightopd.schemas.signals.precision import STEP_NATS

DTYPES = ("float32", "float16", *STEP_NATS)


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_value_is_further_off_than_its_precision_says(dtype):
    logprobs = -np.random.default_rng(0).exponential(4, 5000).astype(np.float32)
    stored = rounded(logprobs, dtype)
    assert stored.dtype == np.float32
    apart = np.abs(stored.astype(np.float64) - logprobs)
    assert (apart <= largest_error(logprobs.astype(np.float64), dtype)).all()


def test_steps_are_whole_multiples_and_never_minus_zero():
    for dtype, step_nats in STEP_NATS.items():
        stored = rounded(np.array([-1e-6, -1.03, -9.99, 0.0], np.float32), dtype)
        assert not np.signbit(stored[[0, 3]]).any()
        assert (np.mod(stored, step_nats) == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_tail_of_nothing_stays_nothing_and_only_steps_round_it(dtype):
    tails = np.array([-np.inf, -3.3, -0.01], np.float32)
    stored = rounded_tails(tails, dtype)
    assert stored[0] == -np.inf
    assert np.abs(stored[1:] - tails[1:]).max() <= largest_tail_error(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_sampled_tokens_log_probability_keeps_every_bit(dtype):
    scores = make_scores(np.random.default_rng(0), np.arange(9, dtype=np.int32), 7)
    table = scores_to_table(["a"], [scores], dtype)
    np.testing.assert_array_equal(flat_column(table.column("logprobs"))[0], scores.logprobs)
    np.testing.assert_array_equal(
        flat_column(table.column("topk_logprobs"))[0], rounded(scores.topk_logprobs, dtype)
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("smallest", [0.0, 0.02])
def test_a_sound_signal_of_any_precision_verifies(dtype, smallest, tmp_path):
    changes = {"topk_dtype": dtype, "top_k": 8, "min_probability": smallest}
    make_cache(tmp_path, {"teacher": changes}, lengths=[(40, 60, 50)])
    assert list(verify(tmp_path)) == []


@pytest.mark.parametrize("dtype", STEP_NATS)
def test_an_entry_two_steps_off_is_found(dtype, tmp_path):
    cache, (rollouts,), _ = make_cache(tmp_path / "sound", {}, lengths=[(5, 6)])
    rng = np.random.default_rng(3)
    scores = [make_scores(rng, row.response_ids, 8) for row in rollouts]
    sampled = scores[1].topk_ids[:1]  # the sampled token is the likeliest at the first position
    moved = [replace(rollouts[1], response_ids=np.concatenate([sampled, rollouts[1].response_ids[1:]]))]
    wrong = scores[1].logprobs.copy()
    wrong[0] = scores[1].topk_logprobs[0] - 2 * STEP_NATS[dtype]
    scores[1] = replace(scores[1], logprobs=wrong)
    cache = write_rollouts(tmp_path / "cache", [[rollouts[0], *moved]])
    rows = [(row.rollout_id, one) for row, one in zip([rollouts[0], *moved], scores, strict=True)]
    write_signal(cache, "teacher", [rows], topk_dtype=dtype, top_k=8)
    told = " ".join(str(finding) for finding in verify(tmp_path / "cache"))
    assert "the sampled token's log-probability is not that of its top-k entry" in told
