"""What a cache whose signals keep hidden states can serve, and what is said of one that keeps none."""

from dataclasses import replace

from objective_cases import objective, recipe

from lightopd.objectives.preparation.serving import CacheFacts, missing, warnings_of


def hidden_facts(signals: dict[str, int], *names: str) -> CacheFacts:
    return CacheFacts("CACHE", signals, frozenset({"ref_logprobs"}), hidden=frozenset(names))


WHOLE = objective(target={"kind": "divergence", "tail": "whole"})


def test_hidden_states_that_are_read_and_not_kept_are_named_with_the_command_that_adds_them():
    (line,) = missing(WHOLE, hidden_facts({"teacher": 32}))
    assert line == (
        "signal teacher keeps no hidden states, which tail: whole reads; score it under another name and set "
        "that name in the objective: lightopd precompute --cache CACHE --teacher MODEL --signal "
        "teacher_hidden --keep hidden"
    )
    (line,) = missing(objective(target={"kind": "divergence"}, entries={}), hidden_facts({"teacher": 32}))
    assert line.startswith("signal teacher keeps no hidden states, which entries reads")
    (line,) = missing(WHOLE, hidden_facts({}))
    assert line.endswith("--signal teacher --keep hidden")
    (line,) = missing(WHOLE, replace(hidden_facts({"teacher": 32}), planned="teacher"))
    assert line.endswith("set precompute.keep to hidden")
    assert missing(WHOLE, hidden_facts({"teacher": 0}, "teacher")) == []


def test_hidden_states_stand_for_a_top_k_of_any_size_that_entries_give():
    assert missing(recipe("f_reverse_kl"), hidden_facts({"teacher": 0}, "teacher")) == []
    signals = {"teacher": 0, "rollout_student": 16}
    assert missing(recipe("prune_opd"), hidden_facts(signals, "teacher")) == []
    few = recipe("prune_opd", entries={"top_k": 8})
    (line,) = missing(few, hidden_facts(signals, "teacher"))
    assert line == "16 entries or more of signal teacher are needed; set entries.top_k to 16"


def test_a_shape_and_a_measured_tail_are_not_made_of_hidden_states():
    shaped = objective(target={"kind": "divergence", "tail": "shaped"})
    (line,) = missing(shaped, hidden_facts({"teacher": 0}, "teacher"))
    assert "signal teacher has no shape of its tail" in line
    (line,) = missing(
        recipe("aligndistil"), hidden_facts({"dpo": 0, "reverse_dpo": 64, "teacher": 64}, "dpo")
    )
    assert "by_distance measures the mass outside a stored top-k, and signal dpo stores none" in line


def test_entries_that_no_part_reads_are_told():
    (line,) = warnings_of(objective(target={"kind": "divergence", "tail": "whole"}, entries={"top_k": 8}))
    assert line == "term main: no part of it reads a top-k, so its entries are not made"
