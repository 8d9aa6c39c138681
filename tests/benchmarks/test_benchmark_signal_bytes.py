"""What the benchmark of a signal's bytes tells is right: its KL, and that what is written comes back."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from support.kept_entries import Kept, Measure, Support, keep, shapes, synthetic_teachers
from support.signal_encodings import encodings, in_steps

SUPPORT = Support(top_k=16)


def entries(teachers):
    order_NK = np.argsort(-teachers.logprobs_NV, axis=1)[:, :64].astype(np.int32)
    return order_NK, np.take_along_axis(teachers.logprobs_NV, order_NK, 1)


@pytest.fixture
def pair(monkeypatch):
    monkeypatch.setattr("support.kept_entries.WIDEST", 64)
    return tuple(synthetic_teachers(3.0, 256, 300, seed) for seed in (0, 1))


@pytest.mark.parametrize("place", [None, 0])
def test_the_loss_is_that_of_whole_distributions_in_float64(place, pair):
    calibration, measured = pair
    shapes_SV = shapes(calibration, [SUPPORT])
    exact = keep(measured, *entries(measured), SUPPORT)
    stored = in_steps(exact, 1 / 8)
    found = Measure.of(measured, shapes_SV).kl_lost(exact, stored, place)
    teacher_NV = measured.logprobs_NV.astype(np.float64)
    lies_V = np.ones(300) if place is None else shapes_SV[0].numpy()
    rebuilt_NV = np.tile(lies_V, (256, 1))
    ids_NK = exact.ids_C.reshape(256, 16)
    np.put_along_axis(rebuilt_NV, ids_NK, 0, 1)
    rebuilt_NV *= np.exp(stored.tails_N.astype(np.float64))[:, None] / rebuilt_NV.sum(1, keepdims=True)
    np.put_along_axis(rebuilt_NV, ids_NK, np.exp(stored.logprobs_C.reshape(256, 16).astype(np.float64)), 1)
    rebuilt_NV /= rebuilt_NV.sum(1, keepdims=True)
    wanted = (np.exp(teacher_NV) * (teacher_NV - np.log(rebuilt_NV))).sum(1).mean()
    assert found == pytest.approx(wanted, abs=1e-5)


def test_what_is_written_comes_back(pair):
    exact = keep(pair[1], *entries(pair[1]), SUPPORT)
    for way in encodings(np.arange(300, dtype=np.int32), None):
        stored: Kept = way.store(exact)
        content = way.write(stored)
        if way.read is None:
            continue
        ids_C, logprobs_C = way.read(content)
        np.testing.assert_allclose(logprobs_C, stored.logprobs_C, atol=1e-6)
        if "gaps" not in way.name:  # these bring ties back in the order of ids
            np.testing.assert_array_equal(ids_C, stored.ids_C)
