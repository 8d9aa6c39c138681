"""What a signal keeps, from its manifest, and what each kind serves."""

import pytest
from pydantic import TypeAdapter

from lightopd.schemas.cache import SIGNALS, signal_columns
from lightopd.schemas.manifest import SignalManifest
from lightopd.schemas.signals.kinds import Hidden, HiddenStates, Kept, Sampled, TailShape, TopK

SHAPE = TailShape(sha256="c", tokens=300)
STATES = HiddenStates(size=8, format="int8", head="a", channels="b", tokens=300)
PLAIN = HiddenStates(size=8, format="bfloat16", head="a")


def manifest(**changes):
    plain = {"schema_version": 3, "name": "teacher", "role": "imported", "rollouts": "r", "model": None}
    plain |= {"precision": None, "tokenizer": None, "top_k": 0, "topk_dtype": "float16", "tail": "exact"}
    return SignalManifest(**plain | {"engine": None} | changes)


@pytest.mark.parametrize(
    ("fields", "kept", "serves"),
    [
        ({}, Sampled(), {"sampled"}),
        ({"top_k": 4}, TopK(entries=4), {"sampled", "support"}),
        (
            {"top_k": 4, "min_probability": 0.01, "tail_shape": SHAPE},
            TopK(entries=4, min_probability=0.01, shape=SHAPE),
            {"sampled", "support", "shaped"},
        ),
        ({"hidden": STATES}, Hidden(states=STATES), {"sampled", "support", "whole"}),
        ({"hidden": PLAIN, "top_k": 4}, Hidden(states=PLAIN, entries=4), {"sampled", "support", "whole"}),
    ],
)
def test_a_manifest_says_what_its_signal_keeps_and_serves(fields, kept, serves):
    found = manifest(**fields).keeps
    assert found == kept
    assert found.serves == serves
    assert TypeAdapter(Kept).validate_json(found.model_dump_json()) == found


def test_hidden_states_change_the_fingerprint_and_their_absence_does_not():
    plain = manifest(schema_version=1).model_dump(mode="json")
    del plain["hidden"]
    assert SignalManifest(**plain).fingerprint() == manifest(schema_version=1).fingerprint()
    assert manifest(hidden=STATES).fingerprint() != manifest().fingerprint()
    assert manifest(hidden=STATES).fingerprint() != manifest(hidden=PLAIN).fingerprint()


def test_only_signals_with_hidden_states_have_columns_for_them():
    assert signal_columns(None) == SIGNALS
    assert signal_columns(STATES).names == [*SIGNALS.names, "hidden", "hidden_scales"]
    assert signal_columns(PLAIN).names == [*SIGNALS.names, "hidden"]
