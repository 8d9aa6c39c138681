"""What a cache lacks for an objective is named with the command that adds it."""

import re
from dataclasses import replace

import pytest
from objective_cases import METHODS, objective, recipe

from lightopd.objectives.preparation.serving import CacheFacts, missing
from lightopd.objectives.requirements import needs
from lightopd.pipelines.methods import list_methods
from lightopd.schemas.objectives.objective import ObjectiveConfig


def facts(signals: dict[str, int], *columns: str) -> CacheFacts:
    return CacheFacts("CACHE", signals, frozenset(columns))


def test_a_missing_signal_is_named_with_the_command_that_adds_it():
    assert missing(ObjectiveConfig(), facts({})) == [
        "no signal teacher (there: none); add it: lightopd precompute --cache CACHE --teacher MODEL "
        "--signal teacher --top-k 32"
    ]
    (line,) = missing(recipe("lightning_opd"), facts({}))
    assert line.endswith("--signal teacher --top-k 0")
    (line,) = missing(recipe("exopd"), facts({"teacher": 32}, "ref_logprobs"))
    assert line.endswith("--signal reference --set role=reference --top-k 0")


def test_a_missing_signal_of_rollouts_that_name_no_teacher_is_named_with_the_flag_that_does():
    config = ObjectiveConfig()
    for is_known, told in [
        (True, "--teacher MODEL --signal"),
        (False, "--signal teacher --sft-teacher MODEL"),
    ]:
        assert told in missing(config, replace(facts({}), is_teacher_known=is_known))[0]


def test_a_signal_without_the_top_k_it_needs_is_named():
    (line,) = missing(recipe("f_reverse_kl"), facts({"teacher": 0}))
    assert "signal teacher has 0 top-k entries and 1 or more are needed" in line
    assert "--top-k 32" in line
    (line,) = missing(recipe("prune_opd"), facts({"teacher": 32, "rollout_student": 8}))
    assert "signal rollout_student has 8 top-k entries and 16 or more are needed" in line


@pytest.mark.parametrize(
    ("config", "told"),
    [
        (ObjectiveConfig(), "; or train with the paper's loss, .*: -c methods/lightning_opd$"),
        (objective(signal="other"), ": -c methods/lightning_opd --set objective.signal=other$"),
        (recipe("recommended_baseline_ratio"), "--top-k 32$"),
        (recipe("decoupling_mix"), "--top-k 32$"),
    ],
)
def test_a_lone_divergence_without_a_top_k_is_told_of_the_loss_on_sampled_tokens(config, told):
    (line, *_) = missing(config, facts(dict.fromkeys(needs(config).signals, 0), "ref_logprobs"))
    assert re.search(told, line)


def test_missing_columns_are_named_with_what_makes_them():
    lines = missing(recipe("sod"), facts({"teacher": 0}))
    assert [line.split(";")[0] for line in lines] == [
        "it has no log-probabilities of the student at rollout",
        "it has no rollouts of several assistant turns",
        "it has no rewards",
    ]
    (line,) = missing(recipe("video_opd"), facts({"teacher": 0}, "reward"))
    assert "lightopd rollout --student TEACHER --cache teacher_answers" in line


def test_a_cache_with_everything_lacks_nothing():
    everything = dict.fromkeys(("teacher", "reference", "privileged", "negative", "warmup"), 64)
    everything |= {f"exposure_{level}": 64 for level in range(5)}
    everything |= {"dpo": 64, "reverse_dpo": 64, "rollout_student": 64, "second_teacher": 64}
    columns = ("ref_logprobs", "reward", "domain", "turns", "teacher_reward")
    for method in list_methods(METHODS):
        there = replace(
            facts(everything, *columns),
            texts=frozenset((*method.needs.texts, *method.needs.chunks, *method.needs.shown)),
        )
        assert missing(method.objective, there) == []
