"""The toy engine: its logits are known exactly, and it fails where it is told to."""

import numpy as np
import pytest
from fake_engine import FakeEngine, exact_scores

from lightopd.errors import EngineError
from lightopd.schemas.configs import SamplingConfig
from lightopd.schemas.records import Sequence

IDS = np.array([3, 1, 4, 1, 5], dtype=np.int32)
SEQUENCE = Sequence(IDS[:2], IDS[2:])


def test_scores_are_the_softmax_of_its_logits():
    engine = FakeEngine(seed=4)
    (score,) = engine.score([SEQUENCE], 2)
    for position, token in enumerate(SEQUENCE.response_ids):
        probabilities = np.exp(engine.logits(IDS[: 2 + position]))
        probabilities /= probabilities.sum()
        assert score.logprobs[position] == pytest.approx(np.log(probabilities[token]), abs=1e-6)
        kept = np.sort(probabilities)[::-1][:2]
        assert np.exp(score.topk_logprobs[2 * position :][:2]) == pytest.approx(kept, abs=1e-6)
        assert np.exp(score.tail_logprobs[position]) == pytest.approx(1 - kept.sum(), abs=1e-6)


def test_logits_depend_on_the_last_two_tokens_and_the_position():
    engine = FakeEngine()
    base = engine.logits(IDS)
    for other in ([3, 1, 4, 1, 6], [3, 1, 4, 2, 5], [1, 4, 1, 5]):
        assert np.abs(engine.logits(np.array(other)) - base).max() > 0.1


def test_equal_seeds_are_equal_models():
    one, two, other = FakeEngine(seed=1), FakeEngine(seed=1), FakeEngine(seed=2)
    assert (one.logits(IDS) == two.logits(IDS)).all()
    assert (one.logits(IDS) != other.logits(IDS)).any()


def test_ties_go_to_the_lowest_id():
    scores = exact_scores(np.zeros((1, 4)), np.array([3]), 2, 0.0)
    assert scores.topk_ids.tolist() == [0, 1]


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), SystemExit(9), OSError("disk")])
def test_it_fails_at_the_call_it_is_told(failure):
    engine = FakeEngine(fail_at_call=2, failure=failure)
    engine.score([SEQUENCE], 0)
    with pytest.raises(type(failure)):
        engine.generate([IDS], SamplingConfig(max_tokens=2), ["k"], [])
    engine.score([SEQUENCE], 0)
    assert engine.num_calls == 3


def test_nan_logits_are_an_engine_error_that_names_the_row():
    with pytest.raises(EngineError, match="sequence 0"):
        FakeEngine(nan_at_call=1).score([SEQUENCE], 0)
    with pytest.raises(EngineError, match="rollout k"):
        FakeEngine(nan_at_call=1).generate([IDS], SamplingConfig(max_tokens=2), ["k"], [])


def test_noise_differs_from_call_to_call():
    engine = FakeEngine(noise_nats=0.01)
    (one,), (two,) = engine.score([SEQUENCE], 0), engine.score([SEQUENCE], 0)
    difference = np.abs(one.logprobs - two.logprobs).max()
    assert 0 < difference < 0.1
