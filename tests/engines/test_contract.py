"""What holds for every engine; an engine joins by an entry in `engine_cases.ENGINES`."""

# R = response tokens, K = top-k, V = vocabulary; nats throughout

import numpy as np
import pytest
from engine_cases import ENGINES, behavior_logprobs, random_ids, random_sequences

from lightopd.errors import InputError
from lightopd.schemas.configs import SamplingConfig
from lightopd.schemas.records import Sequence

STOPS = (2, 5, 11)
MIXED = [(3, 7), (20, 1), (1, 12), (9, 30), (20, 2), (2, 9)]


@pytest.fixture(
    scope="module", params=[pytest.param(name, marks=case.marks) for name, case in ENGINES.items()]
)
def case(request):
    return ENGINES[request.param]


@pytest.fixture(scope="module")
def engine(case, tmp_path_factory):
    built = case.build(tmp_path_factory.mktemp("engine"))
    yield built
    built.close()


@pytest.fixture(scope="module")
def floor(case):
    return case.floor_nats


@pytest.fixture(scope="module")
def sequences(engine):
    return random_sequences(1, MIXED, engine.vocabulary_size)


def make_prompts(engine, lengths=(3, 17, 1, 8), n=3):
    """Groups of n equal prompts, and a key for every entry."""
    random = np.random.default_rng(7)
    groups = [random_ids(random, length, engine.vocabulary_size) for length in lengths]
    prompts = [prompt for prompt in groups for _ in range(n)]
    return prompts, [f"p{group}/{sample}" for group in range(len(groups)) for sample in range(n)]


def draw(engine, sampling=None, order=None):
    prompts, keys = make_prompts(engine)
    order = range(len(prompts)) if order is None else order
    sampling = sampling or SamplingConfig(max_tokens=12, temperature=1.3, top_p=0.95)
    return engine.generate([prompts[i] for i in order], sampling, [keys[i] for i in order], STOPS)


def positions(scores):
    """Ids and log-probabilities kept at each position."""
    ends = np.cumsum(scores.topk_counts)[:-1]
    return list(zip(np.split(scores.topk_ids, ends), np.split(scores.topk_logprobs, ends), strict=True))


def assert_close(first, second, floor):
    np.testing.assert_allclose(first.logprobs, second.logprobs, rtol=0, atol=floor)
    np.testing.assert_allclose(first.topk_logprobs, second.topk_logprobs, rtol=0, atol=floor)
    np.testing.assert_allclose(first.tail_logprobs, second.tail_logprobs, rtol=0, atol=20 * floor)
    np.testing.assert_array_equal(first.topk_counts, second.topk_counts)


def test_logprobs_of_drawn_ids_equal_a_score_at_temperature_one(engine, floor):
    prompts, _ = make_prompts(engine)
    samples = draw(engine)
    scores = engine.score([Sequence(p, s.response_ids) for p, s in zip(prompts, samples, strict=True)], 0)
    for sample, score in zip(samples, scores, strict=True):
        np.testing.assert_allclose(sample.logprobs, score.logprobs, rtol=0, atol=floor)


SAMPLINGS = {
    "raw": {},
    "cooler": {"temperature": 0.8},
    "nucleus": {"temperature": 1.3, "top_p": 0.8},
    "greedy": {"temperature": 0.0},
}


@pytest.mark.parametrize("name", SAMPLINGS)
def test_behavior_logprobs_are_those_of_the_distribution_that_was_drawn_from(engine, floor, name):
    sampling = SamplingConfig(max_tokens=9, **SAMPLINGS[name])
    prompts, _ = make_prompts(engine)
    samples = draw(engine, sampling)
    sequences = [Sequence(p, s.response_ids) for p, s in zip(prompts, samples, strict=True)]
    scores = engine.score(sequences, engine.vocabulary_size)
    if samples[0].behavior_logprobs is None:
        assert name in ("cooler", "nucleus")
        pytest.skip("this engine cannot tell")
    for sample, score in zip(samples, scores, strict=True):
        assert sample.behavior_logprobs.dtype == np.float32
        if name == "raw":
            np.testing.assert_array_equal(sample.behavior_logprobs, sample.logprobs)
            continue
        wanted = behavior_logprobs(score, sample.response_ids, sampling)
        np.testing.assert_allclose(sample.behavior_logprobs, wanted, rtol=0, atol=10 * floor + 1e-6)


def test_a_sample_ends_at_its_first_stop_id_or_at_the_limit(engine):
    samples = draw(engine)
    for sample in samples:
        is_stop = np.isin(sample.response_ids, STOPS)
        assert not is_stop[:-1].any()
        assert sample.finish_reason == ("stop" if is_stop[-1] else "length")
        assert is_stop[-1] or len(sample.response_ids) == 12
    assert {sample.finish_reason for sample in samples} == {"stop", "length"}


def test_every_drawn_id_has_a_logprob_the_end_token_too(engine):
    for sample in draw(engine):
        assert sample.response_ids.dtype == np.int32
        assert sample.logprobs.dtype == np.float32
        assert len(sample.logprobs) == len(sample.response_ids) > 0
        assert (sample.logprobs <= 0).all()


def test_entropy_is_that_of_the_whole_distribution(engine, floor):
    prompts, _ = make_prompts(engine)
    samples = draw(engine)
    if samples[0].entropies is None:
        pytest.skip("this engine does not measure entropies")
    sequences = [Sequence(p, s.response_ids) for p, s in zip(prompts, samples, strict=True)]
    for sample, score in zip(samples, engine.score(sequences, engine.vocabulary_size), strict=True):
        entropies = [-(np.exp(logprobs) * logprobs).sum() for _, logprobs in positions(score)]
        np.testing.assert_allclose(sample.entropies, entropies, rtol=0, atol=20 * floor)


def test_draws_depend_on_seed_and_key_and_not_on_the_batch(engine, floor):
    together = draw(engine)
    alone = [draw(engine, order=[index])[0] for index in range(len(together))]
    for first, second in zip(together, alone, strict=True):
        np.testing.assert_array_equal(first.response_ids, second.response_ids)
        np.testing.assert_allclose(first.logprobs, second.logprobs, rtol=0, atol=floor)


def test_samples_come_in_the_order_asked(engine):
    order = np.random.default_rng(0).permutation(12)
    straight, shuffled = draw(engine), draw(engine, order=order)
    for place, index in enumerate(order):
        np.testing.assert_array_equal(shuffled[place].response_ids, straight[index].response_ids)


def test_another_seed_draws_otherwise(engine):
    one, two = (draw(engine, SamplingConfig(max_tokens=12, seed=seed)) for seed in (0, 1))
    assert any(a.response_ids.tolist() != b.response_ids.tolist() for a, b in zip(one, two, strict=True))


def test_samples_of_one_group_differ(engine):
    samples = draw(engine, SamplingConfig(max_tokens=12))
    for start in range(0, len(samples), 3):
        group = {tuple(sample.response_ids.tolist()) for sample in samples[start : start + 3]}
        assert len(group) > 1


def test_temperature_zero_takes_the_most_likely_id(engine):
    prompts, _ = make_prompts(engine)
    samples = draw(engine, SamplingConfig(max_tokens=8, temperature=0))
    scores = engine.score([Sequence(p, s.response_ids) for p, s in zip(prompts, samples, strict=True)], 1)
    for sample, score in zip(samples, scores, strict=True):
        np.testing.assert_array_equal(sample.response_ids, score.topk_ids)


def test_scores_come_in_the_order_asked(engine, sequences, floor):
    order = [4, 0, 5, 2, 1, 3]
    straight = engine.score(sequences, 3)
    shuffled = engine.score([sequences[index] for index in order], 3)
    for place, index in enumerate(order):
        assert_close(shuffled[place], straight[index], floor)


def test_scores_alone_equal_scores_in_a_batch(engine, sequences, floor):
    for sequence, together in zip(sequences, engine.score(sequences, 5), strict=True):
        (alone,) = engine.score([sequence], 5)
        assert_close(alone, together, floor)


def test_a_group_scores_as_its_members_do(engine, floor):
    random = np.random.default_rng(5)
    prompt = random_ids(random, 20, engine.vocabulary_size)
    group = [Sequence(prompt, random_ids(random, length, engine.vocabulary_size)) for length in (4, 1, 0, 9)]
    for sequence, together in zip(group, engine.score(group, 5), strict=True):
        (alone,) = engine.score([sequence], 5)
        assert_close(alone, together, floor)


def test_topk_is_sorted_distinct_and_whole_with_the_tail(engine, sequences):
    for sequence, score in zip(sequences, engine.score(sequences, 6), strict=True):
        assert len(score.logprobs) == len(score.tail_logprobs) == len(sequence.response_ids)
        assert score.topk_counts.tolist() == [6] * len(sequence.response_ids)
        for (ids, logprobs), tail in zip(positions(score), score.tail_logprobs, strict=True):
            assert len(set(ids.tolist())) == 6
            assert (np.diff(logprobs) <= 0).all()
            assert np.exp(logprobs.astype(np.float64)).sum() + np.exp(tail) == pytest.approx(1, abs=1e-5)


def test_topk_of_the_whole_vocabulary_has_no_tail_and_every_id(engine, sequences, floor):
    for sequence, score in zip(sequences, engine.score(sequences, engine.vocabulary_size), strict=True):
        assert (score.tail_logprobs == -np.inf).all()
        for row, (ids, logprobs) in enumerate(positions(score)):
            assert sorted(ids.tolist()) == list(range(engine.vocabulary_size))
            asked = logprobs[ids == sequence.response_ids[row]]
            assert asked == pytest.approx(score.logprobs[row], abs=floor)


def test_a_smaller_topk_is_the_head_of_a_larger_one(engine, sequences, floor):
    few, many = engine.score(sequences, 4), engine.score(sequences, engine.vocabulary_size)
    for small, large in zip(few, many, strict=True):
        for (_, first), (_, whole), tail in zip(
            positions(small), positions(large), small.tail_logprobs, strict=True
        ):
            np.testing.assert_allclose(first, whole[:4], rtol=0, atol=floor)
            outside = np.log(np.exp(whole[4:].astype(np.float64)).sum())
            assert tail == pytest.approx(outside, abs=20 * floor)


def test_topk_zero_keeps_the_sampled_logprob_and_leaves_all_to_the_tail(engine, sequences, floor):
    for none, some in zip(engine.score(sequences, 0), engine.score(sequences, 3), strict=True):
        assert len(none.topk_ids) == len(none.topk_logprobs) == none.topk_counts.sum() == 0
        np.testing.assert_allclose(none.logprobs, some.logprobs, rtol=0, atol=floor)
        np.testing.assert_allclose(none.tail_logprobs, 0, atol=floor)


def test_unlikely_entries_go_to_the_tail(engine, sequences, floor):
    least = 0.03
    for full, cut in zip(engine.score(sequences, 20), engine.score(sequences, 20, least), strict=True):
        assert (cut.topk_counts < 20).any()
        np.testing.assert_allclose(cut.logprobs, full.logprobs, rtol=0, atol=floor)
        for (_, all_logprobs), (_, kept), tail in zip(
            positions(full), positions(cut), cut.tail_logprobs, strict=True
        ):
            assert (np.exp(kept) >= least - floor).all()
            np.testing.assert_allclose(kept, all_logprobs[: len(kept)], rtol=0, atol=floor)
            assert (np.exp(all_logprobs[len(kept) :]) < least + floor).all()
            assert np.exp(kept.astype(np.float64)).sum() + np.exp(tail) == pytest.approx(1, abs=1e-5)


def test_a_threshold_may_leave_no_entry(engine, sequences):
    for score in engine.score(sequences, 5, 0.9999):
        assert (score.tail_logprobs <= 0).all()
        bare = score.topk_counts == 0
        np.testing.assert_allclose(score.tail_logprobs[bare], 0, atol=1e-5)


def test_an_empty_response_has_empty_scores(engine, floor):
    sequences = random_sequences(4, [(5, 0), (6, 3), (7, 0)], engine.vocabulary_size)
    first, second, third = engine.score(sequences, 4)
    for score in (first, third):
        assert [len(score.logprobs), len(score.topk_ids), len(score.tail_logprobs)] == [0, 0, 0]
    assert_close(second, engine.score(sequences[1:2], 4)[0], floor)


def test_a_response_of_one_token_is_scored(engine, floor):
    (sequence,) = random_sequences(4, [(6, 4)], engine.vocabulary_size)
    (whole,) = engine.score([sequence], 0)
    (first,) = engine.score([Sequence(sequence.prompt_ids, sequence.response_ids[:1])], 0)
    assert first.logprobs.tolist() == pytest.approx(whole.logprobs[:1].tolist(), abs=floor)


def test_nothing_asked_is_nothing_returned(engine):
    assert engine.score([], 4) == []
    assert engine.generate([], SamplingConfig(), [], STOPS) == []


def test_special_ids_are_ids_like_any_other(engine, floor):
    last = engine.vocabulary_size - 1
    ids = np.array([0, 2, 0, last, 1, 2, 0], dtype=np.int32)
    sequence, plain = Sequence(ids[:3], ids[3:]), random_sequences(0, [(9, 9)], engine.vocabulary_size)[0]
    (alone,) = engine.score([sequence], 4)
    assert (np.isfinite(alone.logprobs)).all()
    assert_close(engine.score([plain, sequence], 4)[1], alone, floor)
    (sample,) = engine.generate([ids], SamplingConfig(max_tokens=5), ["special"], ())
    (score,) = engine.score([Sequence(ids, sample.response_ids)], 0)
    np.testing.assert_allclose(sample.logprobs, score.logprobs, rtol=0, atol=floor)


def test_a_response_ends_where_the_context_does(engine, floor):
    length = engine.context_length - 3
    random = np.random.default_rng(2)
    prompts = [
        random_ids(random, length, engine.vocabulary_size),
        random_ids(random, 4, engine.vocabulary_size),
    ]
    long, short = engine.generate(prompts, SamplingConfig(max_tokens=9), ["long", "short"], ())
    assert (len(long.response_ids), long.finish_reason) == (3, "length")
    assert (len(short.response_ids), short.finish_reason) == (9, "length")
    (score,) = engine.score([Sequence(prompts[0], long.response_ids)], 0)
    np.testing.assert_allclose(long.logprobs, score.logprobs, rtol=0, atol=floor)


def test_a_prompt_that_fills_the_context_is_refused_by_key(engine):
    prompt = np.ones(engine.context_length, dtype=np.int32)
    with pytest.raises(InputError, match=r"rollout p4/0 .* context"):
        engine.generate([prompt], SamplingConfig(), ["p4/0"], STOPS)


def test_a_sequence_longer_than_the_context_is_refused_by_index(engine):
    sequences = random_sequences(0, [(3, 3), (engine.context_length - 1, 2)], engine.vocabulary_size)
    with pytest.raises(InputError, match=r"sequence 1 .* context"):
        engine.score(sequences, 0)


@pytest.mark.parametrize("bad", [-1, 10**6])
def test_an_id_outside_the_vocabulary_is_refused(engine, bad):
    good, wrong = np.array([3, 4], dtype=np.int32), np.array([3, bad], dtype=np.int32)
    with pytest.raises(InputError, match=f"sequence 0 has id {bad}"):
        engine.score([Sequence(good, wrong)], 0)
    with pytest.raises(InputError, match=f"has id {bad}"):
        engine.generate([wrong], SamplingConfig(), ["k"], ())


def test_an_empty_prompt_is_refused(engine):
    nothing, some = np.zeros(0, dtype=np.int32), np.array([3], dtype=np.int32)
    with pytest.raises(InputError, match="empty"):
        engine.score([Sequence(nothing, some)], 0)
    with pytest.raises(InputError, match="empty"):
        engine.generate([nothing], SamplingConfig(), ["k"], ())


def test_a_topk_above_the_vocabulary_is_refused(engine, sequences):
    with pytest.raises(InputError, match=f"top_k is {engine.vocabulary_size + 1}"):
        engine.score(sequences, engine.vocabulary_size + 1)


def test_an_engine_may_be_closed_twice(case, tmp_path):
    if case.marks:
        pytest.skip("the engine outlives its tests")
    built = case.build(tmp_path)
    built.close()
    built.close()
