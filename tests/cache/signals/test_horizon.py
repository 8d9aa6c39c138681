"""Signals of the beginning of each response: what is scored and stored, what is trained, what is refused."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from cache_cases import make_cache, signal_manifest
from objective_cases import METHODS, make_batch, make_student, make_world, recipe, view_of
from training_runs import micro_batches, read_first

from lightopd.cache.reader import read_shard_columns
from lightopd.cache.signals.horizon import horizons_of, scored_length, scored_tokens
from lightopd.cache.signals.trained_part import trained_part
from lightopd.cache.verify import verify
from lightopd.objectives.loss import collect_step_sums, compute_loss
from lightopd.objectives.preparation.prepare import prepare_rollouts
from lightopd.objectives.requirements import needs
from lightopd.pipelines.methods import list_methods
from lightopd.training.data.shard_store import index_cache

RECIPES = [method.name for method in list_methods(METHODS)]


@pytest.mark.parametrize(
    ("horizon", "length", "scored"),
    [(None, 7, 7), (3, 7, 3), (3, 2, 2), (0.3, 10, 3), (0.3, 11, 4), (0.01, 7, 1), (0.99, 7, 7)],
)
def test_so_many_tokens_or_the_share_rounded_up_are_scored(horizon, length, scored):
    assert scored_length(horizon, length) == scored
    assert scored_tokens(horizon, np.array([0, length])).sum() == scored


def test_a_share_and_the_token_weight_horizon_keep_the_same_tokens():
    world = make_world()
    config = recipe("horizon")
    share = next(part.share for part in config.terms[0].token_weights if part.kind == "horizon")
    whole = replace(world, loss_mask_N=torch.ones_like(world.loss_mask_N))
    weighted = loss_of(config, whole)
    cut = replace(whole, loss_mask_N=torch.from_numpy(scored_in(world, share)))
    plain = config.model_dump(mode="json")
    plain["terms"][0]["token_weights"] = [
        part for part in plain["terms"][0]["token_weights"] if part["kind"] != "horizon"
    ]
    plain["terms"][0]["normalise_token_weights"] = False
    torch.testing.assert_close(weighted, loss_of(type(config).model_validate(plain), cut))


def test_a_manifest_without_a_horizon_keeps_its_fingerprint(tmp_path):
    cache, _, _ = make_cache(tmp_path)
    plain = signal_manifest("teacher", cache.manifest)
    assert plain.fingerprint() == signal_manifest("teacher", cache.manifest, horizon=None).fingerprint()
    others = {signal_manifest("teacher", cache.manifest, horizon=h).fingerprint() for h in (2, 3, 0.3)}
    assert len(others | {plain.fingerprint()}) == 4


@pytest.mark.parametrize("horizon", [3, 0.5])
def test_readers_give_the_first_tokens_and_nan_behind_them(tmp_path, horizon):
    whole, _, _ = make_cache(tmp_path / "whole")
    cut, _, _ = make_cache(tmp_path / "cut", {"teacher": {"horizon": horizon}})
    assert verify(cut.path) == []
    for shard in cut.shards:
        one, other = (read_shard_columns(cache, shard, ["teacher"], seen=set()) for cache in (whole, cut))
        is_scored_N = scored_tokens(horizon, one.offsets)
        assert 0 < is_scored_N.sum() < len(is_scored_N)
        np.testing.assert_array_equal(one.loss_mask_N, other.loss_mask_N)
        a, b = one.signals["teacher"], other.signals["teacher"]
        for name in ("logprobs_N", "tail_logprobs_N"):
            np.testing.assert_array_equal(getattr(a, name)[is_scored_N], getattr(b, name)[is_scored_N])
            assert np.isnan(getattr(b, name)[~is_scored_N]).all()
        counts_N = np.diff(b.topk_offsets)
        np.testing.assert_array_equal(counts_N, np.where(is_scored_N, np.diff(a.topk_offsets), 0))
        is_scored_C = np.repeat(is_scored_N, np.diff(a.topk_offsets))
        np.testing.assert_array_equal(a.topk_ids_C[is_scored_C], b.topk_ids_C)
        np.testing.assert_array_equal(a.topk_logprobs_C[is_scored_C], b.topk_logprobs_C)


def test_training_masks_what_any_of_two_signals_lacks(tmp_path):
    cache, _, _ = make_cache(tmp_path, {"teacher": {"horizon": 0.5}, "reference": {"horizon": 3}})
    horizons = horizons_of(cache, ["teacher", "reference"])
    for shard in cache.shards:
        columns = read_shard_columns(cache, shard, ["teacher", "reference"])
        trained = trained_part(columns, horizons)
        both_N = scored_tokens(0.5, columns.offsets) & scored_tokens(3, columns.offsets)
        np.testing.assert_array_equal(trained.loss_mask_N, columns.loss_mask_N & both_N)
        for signal in trained.signals.values():
            assert np.isfinite(signal.logprobs_N).all()
            assert np.isfinite(signal.tail_logprobs_N[signal.tail_logprobs_N > -np.inf]).all()


@pytest.mark.parametrize("is_packed", [False, True])
def test_a_batch_is_that_of_the_whole_signal_with_its_mask_cut_and_so_are_the_totals(tmp_path, is_packed):
    whole, _, _ = make_cache(tmp_path / "whole")
    cut, _, _ = make_cache(tmp_path / "cut", {"teacher": {"horizon": 3}})
    store, index = read_first(cut, ("teacher",))
    _, whole_index = read_first(whole, ("teacher",))
    assert index.trained_P.sum() < whole_index.trained_P.sum()
    scored = [scored_tokens(3, read_shard_columns(cut, shard).offsets) for shard in cut.shards]
    masks = [read_shard_columns(cut, shard).loss_mask_N for shard in cut.shards]
    wanted = sum(int((a & b).sum()) for a, b in zip(scored, masks, strict=True))
    assert index.trained_P.sum() == wanted
    again = index_cache(cut, ("teacher",), ("teacher",))
    np.testing.assert_array_equal(again.trained_P, index.trained_P)
    batches = micro_batches((store, index), 400, is_packed)
    assert sum(int(batch.rollouts.loss_mask_N.sum()) for batch in batches) == wanted
    for batch in batches:
        rollouts = batch.rollouts
        assert (rollouts.index_N[rollouts.loss_mask_N] < 3).all()
        assert int(rollouts.lengths_R.sum()) == int(rollouts.loss_mask_N.sum())
        assert torch.isfinite(rollouts.signals["teacher"].logprobs_N).all()


def scored_in(world, horizon):
    return scored_tokens(horizon, np.concatenate([[0], np.cumsum(world.lengths)]))


def loss_of(config, world, is_scored_N=None):
    """Value and gradient of a step over the whole world; behind `is_scored_N` as training is given it."""
    rows, is_cut = list(range(world.size)), is_scored_N is not None
    view = view_of(world, rows)
    if is_cut:
        view = replace(view, signals={n: cut_columns(s, is_scored_N) for n, s in view.signals.items()})
    prepared = prepare_rollouts(config, [view])
    kept = [row for row, is_kept in zip(rows, prepared.keep_R, strict=True) if is_kept]
    batch, _ = make_batch(world, kept, kept, 4, prepared, rows)
    if is_cut:
        here_N = torch.from_numpy(is_scored_N)[torch.cat([(world.row_N == r).nonzero()[:, 0] for r in kept])]
        batch = replace(batch, signals={n: cut_batch(s, here_N) for n, s in batch.signals.items()})
    logits_NV = world.student_NV.clone().requires_grad_()
    student = make_student(world, logits_NV, batch, needs(config).supports, kept)
    with torch.no_grad():
        totals = collect_step_sums(config, batch, student)
    value = compute_loss(config, batch, student, totals, None).value
    (gradient_NV,) = torch.autograd.grad(value, logits_NV)
    return value.detach(), gradient_NV


def cut_columns(signal, is_scored_N):
    counts_N = np.where(is_scored_N, np.diff(signal.topk_offsets), 0)
    is_scored_C = np.repeat(is_scored_N, np.diff(signal.topk_offsets))
    return replace(
        signal,
        logprobs_N=np.where(is_scored_N, signal.logprobs_N, 0),
        topk_offsets=np.concatenate([[0], np.cumsum(counts_N)]),
        topk_ids_C=signal.topk_ids_C[is_scored_C],
        topk_logprobs_C=signal.topk_logprobs_C[is_scored_C],
    )


def cut_batch(signal, is_scored_N):
    return replace(
        signal,
        logprobs_N=signal.logprobs_N.where(is_scored_N, 0.0),
        topk_ids_NK=signal.topk_ids_NK.where(is_scored_N[:, None], -1),
        topk_logprobs_NK=signal.topk_logprobs_NK.where(is_scored_N[:, None], -torch.inf),
        tail_logprobs_N=signal.tail_logprobs_N.where(is_scored_N, 0.0),
    )


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipes_loss_is_to_the_bit_that_of_a_loss_mask_cut_at_the_horizon(name):
    world, config = make_world(), recipe(name)
    is_scored_N = scored_in(world, 0.6)
    assert (world.loss_mask_N & ~torch.from_numpy(is_scored_N)).any()
    cut = replace(world, loss_mask_N=world.loss_mask_N & torch.from_numpy(is_scored_N))
    value, gradient_NV = loss_of(config, cut)
    found, found_NV = loss_of(config, cut, is_scored_N)
    assert torch.isfinite(value)
    assert torch.equal(found, value)
    assert torch.equal(found_NV, gradient_NV)
