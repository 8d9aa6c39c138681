"""The named queries: every one runs on every kind of cache, and gives what it says."""

import re

import numpy as np
import pytest
from cache_cases import make_cache

from lightopd.errors import ConfigError
from lightopd.inspection.opened import open_cache
from lightopd.inspection.queries import named_queries, named_query, parse_assignments

TWO = {"teacher": {}, "wide": {"role": "reference", "top_k": 48, "topk_dtype": "float32"}}
KINDS = {
    "none": {},
    "one": {"teacher": {}},
    "several": TWO,
    "sampled only": {"teacher": {"top_k": 0}},
    "adaptive": {"teacher": {"min_probability": 0.1, "top_k": 9}},
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_named_query_runs_on_every_kind_of_cache(kind, tmp_path):
    make_cache(tmp_path, signals=KINDS[kind])
    opened = open_cache(tmp_path)
    for name in named_queries():
        assert opened.query(name).arrow().num_columns > 0, name


def test_every_named_query_says_what_it_shows_and_its_example_runs(lightopd, world):
    for name, query in named_queries().items():
        assert re.match(r"[A-Z].*\.$", query.purpose), name
        assert query.example.startswith(f"lightopd sql CACHE {name}")
        words = query.example.replace("CACHE", str(world.cache)).replace(" --run RUN", "").split()[1:]
        assert lightopd(*words)[0] == 0, name
        for parameter in query.parameters:
            assert f"${parameter.name}" in query.sql, (name, parameter)
        declared = {parameter.name for parameter in query.parameters}
        assert set(re.findall(r"\$(\w+)", query.sql)) == declared, name


def test_the_page_of_sql_names_every_query_and_every_parameter(pytestconfig):
    text = (pytestconfig.rootpath / "docs" / "sql.md").read_text()
    for name, query in named_queries().items():
        line = next(line for line in text.splitlines() if line.startswith(f"| `{name}` |"))
        for parameter in query.parameters:
            assert f"`{parameter.name}`" in line, (name, parameter.name)


@pytest.mark.parametrize("name", ["nothing", "views", "../manifest"])
def test_an_unknown_named_query_is_refused_with_those_there_are(name):
    with pytest.raises(ConfigError, match="gap_by_position, gap_by_reward"):
        named_query(name)


def test_parameters_have_names_types_and_defaults():
    query = named_query("worst_tokens")
    assert query.values({}) == {"k": 50, "context": 12, "signal": None}
    assert query.values({"k": "3", "signal": "teacher"}) == {"k": 3, "context": 12, "signal": "teacher"}
    with pytest.raises(ConfigError, match="no parameter 'kk'; it has: k, context, signal"):
        query.values({"kk": 3})
    with pytest.raises(ConfigError, match="k is 'many', a value like 50"):
        query.values({"k": "many"})
    with pytest.raises(ConfigError, match="not NAME=VALUE"):
        parse_assignments(["k"])


def test_gap_by_position_gives_the_mean_over_trained_tokens(tmp_path):
    _, rollouts, scores = make_cache(tmp_path)
    rows = open_cache(tmp_path).query("gap_by_position").rows()
    pairs = [
        pair
        for shard, own in zip(rollouts, scores["teacher"], strict=True)
        for pair in zip(shard, own, strict=True)
    ]
    for row in rows:
        span = slice(row["first_pos"], row["last_pos"] + 1)
        gaps = np.concatenate([(a.logprobs - b.logprobs)[span][a.loss_mask[span]] for a, b in pairs])
        assert row["tokens"] == len(gaps)
        assert row["mean_gap"] == pytest.approx(gaps.mean(), abs=1e-4)
        assert row["sd_gap"] == pytest.approx(gaps.std(), abs=1e-4)
    assert sum(row["tokens"] for row in rows) == sum(int(a.loss_mask.sum()) for a, _ in pairs)


def test_shares_are_counted_in_bins_as_fine_as_they_are_told(tmp_path):
    lengths = ((40, 3, 700), (1, 90))
    _, rollouts, scores = make_cache(tmp_path, lengths=lengths)
    pairs = [
        pair
        for shard, own in zip(rollouts, scores["teacher"], strict=True)
        for pair in zip(shard, own, strict=True)
    ]
    opened = open_cache(tmp_path)
    for row in opened.query("gap_by_domain").rows():
        own = [(a, b) for a, b in pairs if a.domain == row["domain"]]
        gaps = np.concatenate([(a.logprobs - b.logprobs)[a.loss_mask] for a, b in own])
        assert (row["rollouts"], row["tokens"]) == (sum(a.loss_mask.any() for a, _ in own), len(gaps))
        assert row["mean_gap"] == pytest.approx(gaps.mean(), abs=1e-4)
        point = np.quantile(gaps, 0.9, method="inverted_cdf")
        assert row["p90_gap"] == pytest.approx(point, abs=0.00051)
        entropies = np.concatenate([a.entropies[a.loss_mask] for a, _ in own])
        assert row["mean_entropy"] == pytest.approx(entropies.mean(), abs=1e-4)
    (row,) = opened.query("tail_mass").rows()
    tails = np.exp(np.concatenate([b.tail_logprobs for _, b in pairs]).astype(float))
    for name, share in (("median_tail", 0.5), ("p90_tail", 0.9), ("p99_tail", 0.99)):
        point = np.quantile(tails, share, method="inverted_cdf")
        assert row[name] == pytest.approx(point, abs=0.0000051)
    assert row["share_above_10_percent"] == pytest.approx((tails > 0.1).mean(), abs=1e-4)


def test_worst_tokens_begins_with_the_largest_gap(tmp_path):
    _, rollouts, scores = make_cache(tmp_path)
    gaps = [
        (row.logprobs - score.logprobs)[row.loss_mask].max(initial=-np.inf)
        for shard, own in zip(rollouts, scores["teacher"], strict=True)
        for row, score in zip(shard, own, strict=True)
    ]
    rows = open_cache(tmp_path).query("worst_tokens").rows()
    assert rows[0]["gap"] == pytest.approx(max(gaps), abs=1e-4)
    assert [row["gap"] for row in rows] == sorted((row["gap"] for row in rows), reverse=True)


def test_truncated_share_counts_each_domain_and_all(tmp_path):
    make_cache(tmp_path)
    rows = {row["domain"]: row for row in open_cache(tmp_path).query("truncated_share").rows()}
    assert rows["all"]["rollouts"] == 5
    assert rows["all"]["truncated_share"] == 0
    assert rows["sums"]["rollouts"] + rows["words"]["rollouts"] == 5


def test_tail_mass_is_the_mean_probability_outside_the_topk(tmp_path):
    _, _, scores = make_cache(tmp_path)
    tails = np.exp(np.concatenate([score.tail_logprobs for shard in scores["teacher"] for score in shard]))
    row = open_cache(tmp_path).query("tail_mass").rows()[0]
    assert row["mean_tail"] == pytest.approx(tails.mean(), abs=1e-5)
    assert row["mean_entries"] == 4


def test_lengths_gives_the_longest_and_the_shortest(tmp_path):
    make_cache(tmp_path)
    rows = open_cache(tmp_path).query("lengths").rows()
    assert min(row["shortest"] for row in rows) == 1
    assert max(row["longest"] for row in rows) == 12


def test_overlap_and_differences_compare_two_signals(tmp_path):
    _, rollouts, scores = make_cache(tmp_path, signals=TWO)
    is_trained = [mask for shard in rollouts for rollout in shard for mask in rollout.loss_mask]
    opened = open_cache(tmp_path)
    row, *quarters = opened.query("overlap", k=4).rows()
    assert (row["one"], row["other"], row["quarter"], row["positions"]) == (
        "teacher",
        "wide",
        "all",
        sum(is_trained),
    )
    assert [quarter["quarter"] for quarter in quarters] == ["1", "2", "3", "4"]
    assert sum(quarter["positions"] for quarter in quarters) == sum(is_trained)
    pairs = [
        (one, two)
        for a, b in zip(scores["teacher"], scores["wide"], strict=True)
        for one, two in zip(a, b, strict=True)
    ]
    shared = [
        len({*one.topk_ids[4 * place : 4 * place + 4]} & {*two.topk_ids[48 * place : 48 * place + 4]}) / 4
        for one, two in pairs
        for place in range(len(one.logprobs))
    ]
    trained = [share for share, mask in zip(shared, is_trained, strict=True) if mask]
    assert row["mean_overlap"] == pytest.approx(np.mean(trained), abs=1e-4)
    (row,) = opened.query("signal_differences").rows()
    assert row["one"] == "teacher"
    assert row["mean_absolute"] > 0


def test_pass_rate_and_hardest_prompts_count_by_prompt(tmp_path):
    make_cache(tmp_path)
    opened = open_cache(tmp_path)
    assert [row["passes"] for row in opened.query("pass_rate").rows()] == [0]
    assert [row["passes"] for row in opened.query("pass_rate", passing=0.5).rows()] == [1]
    assert len(opened.query("hardest_prompts", k=2).rows()) == 2
