"""Recipes and caches that cannot work are refused before the first step, in one line that says what to do."""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from cache_cases import (
    cache_manifest,
    make_rollout,
    make_scores,
    signal_manifest,
    write_rollouts,
    write_signal,
)
from objective_cases import METHODS, objective, recipe
from pydantic import ValidationError

from lightopd.cache.manifests import signal_folder
from lightopd.cache.reader import group_number
from lightopd.cache.shards import write_shard
from lightopd.cache.store import create_signal, open_cache
from lightopd.cache.tables import scores_to_table
from lightopd.config import build
from lightopd.errors import CacheError, ConfigError
from lightopd.objectives.preparation.cache_tables import cache_views
from lightopd.objectives.preparation.prepare import prepare_rollouts
from lightopd.objectives.preparation.serving import (
    CacheFacts,
    cache_remarks,
    check_cache,
    teachers_of,
    warnings_of,
)
from lightopd.objectives.requirements import needs
from lightopd.pipelines.methods import (
    check_method,
    find_method,
    list_methods,
    methods_table,
    needs_lines,
)
from lightopd.schemas.configs import SamplingConfig
from lightopd.schemas.objectives.objective import MLE_OBJECTIVE, ObjectiveConfig

REFUSED = {
    "unknown part": ({"token_weights": ["ratios"]}, "'ratios'"),
    "unknown key": ({"baselines": "expected"}, "unknown key baselines"),
    "part twice": ({"token_weights": ["ratio", {"kind": "ratio"}]}, "part given twice: ratio"),
    "selection twice": ({"select": ["pass_rate", "pass_rate"]}, "part given twice: pass_rate"),
    "terms twice": ({"terms": [{}, {}]}, "two terms have the same name: main, main"),
    "no term": ({"terms": []}, "at least one term"),
    "keys beside terms": ({"terms": [{}], "baseline": "expected"}, "give baseline inside terms"),
    "parameter out of range": ({"token_weights": [{"kind": "ratio", "cap": 0}]}, "cap"),
    "beta out of range": (
        {"target": {"kind": "divergence", "divergence": "jsd", "parameter": 1.5}},
        "parameter 1.5 is out of range for jsd",
    ),
    "parameter of none": (
        {"target": {"kind": "divergence", "divergence": "tv", "parameter": 0.5}},
        "tv takes no parameter",
    ),
    "top-k KL as advantage": ({"target": {"kind": "divergence", "route": "advantage"}}, "never an advantage"),
    "truncated": ({"target": {"kind": "divergence", "support": "truncated"}}, "use support: tail"),
    "stop-gradient of another": (
        {"target": {"kind": "divergence", "divergence": "forward_kl", "support": "stop_gradient"}},
        "defined for reverse_kl",
    ),
    "tempered tail": ({"target": {"kind": "divergence", "temperature": 2.0}}, "needs support: renormalised"),
    "residual of another": (
        {"target": {"kind": "divergence", "divergence": "jsd", "residual": {}}},
        "residual needs reverse_kl or forward_kl",
    ),
    "residual without a tail": (
        {"target": {"kind": "divergence", "support": "renormalised", "residual": {}}},
        "with support: tail",
    ),
    "residual of an extrapolation": (
        {"target": {"kind": "divergence", "residual": {}}, "extrapolate": {"factor": 2.0}},
        "leave extrapolate out",
    ),
    "k1": ({"target": {"kind": "estimator", "estimator": "k1"}}, "zero-mean gradient without the teacher"),
    "sampled token in the support": (
        {"baseline": {"support": "topk_and_sampled"}},
        "may not contain the sampled token",
    ),
    "baseline of a loss": ({"target": "mle", "baseline": "expected"}, "need an advantage; mle is a loss"),
    "baseline of the default": ({"baseline": "expected"}, "divergence is a loss: set target: log_ratio"),
    "clip of the default": ({"token_weights": ["ppo_clip"]}, "divergence is a loss: set target: log_ratio"),
    "key of another kind": (
        {"target": {"clip": 5.0}},
        "a target without kind is a divergence, which has no clip; give its kind",
    ),
    "frozen advantage": (
        {"target": {"kind": "log_ratio", "student": "rollout"}},
        "add token weight ppo_clip",
    ),
    "strength of none": ({"token_weights": ["inverse_strength"]}, "needs extrapolate"),
    "normalised by nothing": ({"normalise_token_weights": True}, "needs token_weights"),
    "weighted preference": (
        {"target": "preference", "rollout_weights": ["difficulty"]},
        "compares whole rollouts",
    ),
    "ladder that falls": ({"curriculum": {"kind": "lengths", "lengths": [8, 4]}}, "lengths must be positive"),
    "bounds turned": ({"rollout_weights": [{"kind": "contrast", "low": 2.0, "high": 1.0}]}, "must lie below"),
    "balance of one": ({"balance": {"anchor": "main", "follower": "kl"}}, "balance needs two of the terms"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_recipe_that_cannot_work_is_refused_in_one_line(case):
    keys, message = REFUSED[case]
    with pytest.raises(ConfigError) as caught:
        build(ObjectiveConfig, keys)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_strings_stand_for_kinds_and_the_default_kind_may_be_left_out():
    short = objective(target="mle", token_weights=["select_tokens"])
    assert short.terms[0].token_weights[0].kind == "select_tokens"
    assert objective(target={"divergence": "jsd"}).terms[0].target.kind == "divergence"
    assert objective(target="mle") == MLE_OBJECTIVE


@pytest.mark.parametrize("name", sorted(path.stem for path in METHODS.glob("*.yaml")))
def test_a_resolved_objective_reads_back_equal(name):
    config = recipe(name)
    assert ObjectiveConfig.model_validate(config.model_dump(mode="json")) == config


def test_a_divergence_without_a_residual_is_written_as_before_there_was_one():
    plain = recipe("f_reverse_kl").model_dump(mode="json")["terms"][0]["target"]
    assert "residual" not in plain
    config = objective(target={"kind": "divergence", "residual": {"cap": 2.0}})
    assert config.model_dump(mode="json")["terms"][0]["target"]["residual"] == {
        "eta": 1.0,
        "cap": 2.0,
        "clip": None,
    }


def test_configs_are_frozen():
    with pytest.raises(ValidationError):
        ObjectiveConfig().terms[0].name = "other"


def test_a_factor_without_a_baseline_or_a_ratio_warns_with_the_reason():
    (line,) = warnings_of(recipe("exopd", token_weights=[]))
    assert "add baseline: expected, or token weight ratio" in line
    assert warnings_of(recipe("exopd")) == []
    assert warnings_of(recipe("exopd_baseline")) == []
    assert warnings_of(ObjectiveConfig()) == []


def small_cache(path, *, turns: int = 1, reward: float | None = 1.0):
    """Two shards of rollouts with one signal of four top-k entries."""
    rng = np.random.default_rng(0)
    changes = {"reward": reward, "domain": None}
    turns_of = {length: np.arange(length, dtype=np.int32) % turns for length in (5, 3, 4)}
    shards = [
        [make_rollout(rng, length, turns=turns_of[length], **changes) for length in row]
        for row in ((5, 3), (4,))
    ]
    cache = write_rollouts(path, shards)
    scores = [[(one.rollout_id, make_scores(rng, one.response_ids, 4)) for one in shard] for shard in shards]
    return write_signal(cache, "teacher", scores), shards


def test_a_real_cache_is_checked_by_its_manifests_and_columns(tmp_path):
    cache, _ = small_cache(tmp_path / "cache")
    check_cache(ObjectiveConfig(), cache)
    check_cache(recipe("recommended_baseline_ratio"), cache)
    with pytest.raises(
        CacheError, match=r"cannot serve this objective: no signal privileged \(there: teacher"
    ):
        check_cache(recipe("mgsd"), cache)
    with pytest.raises(CacheError, match="several assistant turns"):
        check_cache(recipe("tcod"), cache)
    check_cache(recipe("tcod"), small_cache(tmp_path / "turns", turns=2)[0])
    with pytest.raises(CacheError, match="it has no rewards"):
        check_cache(recipe("scope"), small_cache(tmp_path / "unjudged", reward=None)[0])


@pytest.mark.parametrize(
    ("name", "changes", "line"),
    [
        ("dgrpo", {"reward": 0.0}, "all rewards are 0"),
        ("lightning_opd", {"reward": 0.0}, None),
        ("lightning_opd", {"truncated": True, "finish_reason": "length"}, "every rollout is truncated"),
    ],
)
def test_a_cache_that_says_nothing_to_an_objective_is_remarked_upon(tmp_path, name, changes, line):
    rng = np.random.default_rng(0)
    rollouts = [make_rollout(rng, 4, prompt_id="p", sample_index=index, **changes) for index in range(2)]
    cache = write_rollouts(tmp_path / "cache", [rollouts])
    remarks = cache_remarks(cache, needs(recipe(name)))
    assert [line in found for found in remarks] == ([True] if line else [])


def test_groups_of_equal_rewards_are_remarked_upon_where_rollouts_are_compared(tmp_path):
    rng = np.random.default_rng(0)
    rewards = {"p": (1.0, 1.0), "q": (0.0, 0.0)}
    rollouts = [
        make_rollout(rng, 4, prompt_id=prompt, sample_index=index, reward=reward)
        for prompt, pair in rewards.items()
        for index, reward in enumerate(pair)
    ]
    cache = write_rollouts(tmp_path / "cache", [rollouts])
    (line,) = cache_remarks(cache, needs(recipe("dgrpo")))
    assert "no prompt has rollouts of differing rewards" in line


def sampled_at(folder, temperature, **changes):
    """A cache of one rollout drawn at a temperature; it says nothing of who sampled unless told."""
    cache = write_rollouts(folder, [[make_rollout(np.random.default_rng(0), 4, **changes)]])
    manifest = cache.manifest.model_copy(update={"sampling": SamplingConfig(temperature=temperature)})
    return replace(cache, manifest=manifest)


def test_a_ratio_over_rollouts_of_an_unknown_distribution_is_remarked_upon(tmp_path):
    warm = sampled_at(tmp_path / "cache", 0.8)
    (line,) = cache_remarks(warm, needs(recipe("truncated_importance")))
    assert "temperature 0.8" in line
    assert "no importance ratio" in line
    assert cache_remarks(warm, needs(recipe("lightning_opd"))) == []


def test_a_cache_that_says_who_sampled_serves_a_ratio_at_any_temperature_but_zero(tmp_path):
    known = np.full(4, -0.5, np.float32)
    warm = sampled_at(tmp_path / "warm", 0.8, behavior_logprobs=known)
    assert cache_remarks(warm, needs(recipe("truncated_importance"))) == []
    (line,) = cache_remarks(sampled_at(tmp_path / "greedy", 0.0), needs(recipe("truncated_importance")))
    assert "greedy" in line


def test_a_residual_over_rollouts_of_an_unknown_distribution_is_refused(tmp_path):
    config = objective(target={"kind": "divergence", "residual": {}})
    lacking = refused(config, sampled_at(tmp_path / "old", 0.8))
    assert "a residual is unbiased by its ratio alone" in lacking
    assert "behavior_logprobs" in lacking
    known = np.full(4, -0.5, np.float32)
    assert "unbiased" not in refused(config, sampled_at(tmp_path / "new", 0.8, behavior_logprobs=known))


def refused(config, cache):
    """What is said when a cache without a teacher is refused."""
    with pytest.raises(CacheError) as caught:
        check_cache(config, cache)
    return str(caught.value)


def test_a_function_that_cannot_be_imported_is_refused_before_training(tmp_path):
    config = objective(target={"kind": "custom", "import_path": "no_such_module:loss"})
    with pytest.raises(ConfigError, match="import_path no_such_module:loss cannot be loaded"):
        check_cache(config, small_cache(tmp_path / "cache")[0])


def test_a_view_holds_the_rows_of_its_shard(tmp_path):
    cache, shards = small_cache(tmp_path / "cache")
    views = list(cache_views(cache, needs(ObjectiveConfig())))
    for view, shard in zip(views, shards, strict=True):
        assert list(view.rollout_ids) == [one.rollout_id for one in shard]
        assert view.groups_R.tolist() == [group_number(one.prompt_id) for one in shard]
        np.testing.assert_array_equal(view.loss_mask_N, np.concatenate([one.loss_mask for one in shard]))
        np.testing.assert_array_equal(view.logprobs_N, np.concatenate([one.logprobs for one in shard]))
        assert list(view.origins) == ["student"] * len(shard)
    assert prepare_rollouts(ObjectiveConfig(), views).keep_R.tolist() == [True] * 3


def test_teachers_own_rewards_are_joined_by_prompt(tmp_path):
    cache, shards = small_cache(tmp_path / "cache")
    rng = np.random.default_rng(1)
    answers = [make_rollout(rng, 2, prompt_id=shards[0][0].prompt_id, reward=reward) for reward in (1.0, 0.5)]
    write_rollouts(tmp_path / "answers", [answers])
    selection = {"kind": "teacher_validated", "answers": str(tmp_path / "answers")}
    config = objective(target={"kind": "log_ratio", "clip": None}, select=[selection])
    check_cache(config, cache)
    (first, second) = cache_views(cache, needs(config))
    assert first.teacher_rewards_R[0] == 0.75
    assert np.isnan([first.teacher_rewards_R[1], second.teacher_rewards_R[0]]).all()


def test_nan_in_a_top_k_is_found_before_the_first_step(tmp_path):
    rng = np.random.default_rng(0)
    rollout = make_rollout(rng, 4)
    manifest = signal_manifest("teacher", cache_manifest(1, num_prompts=1), topk_dtype="float32")
    table = scores_to_table([rollout.rollout_id], [make_scores(rng, rollout.response_ids, 4)], "float32")
    values = np.full(16, -2.0, np.float32)
    values[5] = np.nan
    place = table.column_names.index("topk_logprobs")
    field = table.schema.field(place)
    broken = table.set_column(place, field, pa.array([values.tolist()], field.type))
    cache = write_rollouts(tmp_path, [[rollout]])
    create_signal(cache, manifest)
    folder = signal_folder(tmp_path, "teacher")
    write_shard(folder, 0, broken, kind="signals/teacher", fingerprint=manifest.fingerprint())
    config = recipe("f_reverse_kl")
    with pytest.raises(CacheError, match="row 0: topk_logprobs has nan at place 5, which"):
        prepare_rollouts(config, cache_views(open_cache(tmp_path), needs(config)))


def test_methods_are_listed_shown_and_checked():
    methods = list_methods(METHODS)
    assert [method.name for method in methods] == sorted(path.stem for path in METHODS.glob("*.yaml"))
    exopd = find_method(METHODS, "exopd")
    assert (exopd.title, exopd.paper) == ("ExOPD", "arXiv 2602.12125")
    assert "signal reference on the sampled tokens" in needs_lines(exopd.needs)
    lacking, warned = check_method(exopd, CacheFacts("CACHE", {"teacher": 4}, frozenset({"ref_logprobs"})))
    assert (len(lacking), len(warned)) == (1, 0)
    with pytest.raises(ConfigError, match=r"no method exodp; there are: aligndistil"):
        find_method(METHODS, "exodp")


def test_the_table_of_methods_has_a_row_for_each():
    methods = list_methods(METHODS)
    lines = methods_table(methods).splitlines()
    assert len(lines) == len(methods) + 2
    assert "| [vopd](vopd.md) | arXiv 2605.07865 |" in methods_table(methods)


def test_a_recipe_without_its_heading_is_refused(tmp_path):
    (tmp_path / "bare.yaml").write_text("objective: {target: mle}\n")
    with pytest.raises(ConfigError, match="begin with three comments"):
        list_methods(tmp_path)


@pytest.mark.parametrize(
    ("name", "teachers"),
    [
        ("soda", set()),
        ("omniopd", set()),
        ("raft", {"privileged"}),
        ("scope", {"teacher"}),
        ("exopd", {"teacher"}),
    ],
)
def test_only_signals_that_a_target_reads_are_teachers(name, teachers):
    assert teachers_of(recipe(name)) == teachers
