"""`precompute --horizon`: what is scored, what every reader makes of it, what is refused."""

import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from cache_cases import cut_scores, table_to_scores
from fake_engine import FakeEngine
from objective_cases import METHODS
from training_runs import weights_of

import lightopd as package
from lightopd.cache.formats.dataset import export_dataset
from lightopd.cache.index import query
from lightopd.cache.shards import write_shard
from lightopd.cache.signals.horizon import scored_length
from lightopd.cache.store import create_signal, open_cache
from lightopd.cache.tables import scores_to_table
from lightopd.cache.verify import verify
from lightopd.config import load_stage
from lightopd.errors import ConfigError
from lightopd.inspection.opened import OpenedCache
from lightopd.inspection.report import distributions
from lightopd.pipelines import precompute, train
from lightopd.pipelines.caches.rescore import rescore
from lightopd.pipelines.run_checks import check_horizon_below
from lightopd.schemas.cache import ROLLOUTS
from lightopd.schemas.configs import PrecomputeConfig

HORIZON = 0.3


@pytest.fixture
def cache(world, tmp_path):
    """The rollouts of the world without a signal."""
    shutil.copytree(world.cache, tmp_path / "cache", ignore=shutil.ignore_patterns("signals"))
    return tmp_path / "cache"


def score(world, cache, *sets, load=None, **flags):
    asked = {"cache": cache, "teacher": world.teacher, "top_k": 4, **flags}
    config = load_stage("precompute", [], sets, asked)
    return precompute.run(config) if load is None else precompute.run(config, load=load)


def lengths_of(cache):
    rows = query(cache, "SELECT rollout_id, len(response_ids) AS n FROM rollouts ORDER BY ALL").to_pylist()
    return {row["rollout_id"]: row["n"] for row in rows}


def test_precompute_train_and_report_with_a_horizon(world, cache, tmp_path, lightopd):
    lengths = lengths_of(cache)
    scored = sum(scored_length(HORIZON, n) for n in lengths.values())
    code, printed, told = lightopd(
        "precompute", "--cache", cache, "--teacher", world.teacher, "--top-k", 4, "--horizon", HORIZON
    )
    assert code == 0, told
    line = (
        f"signal teacher holds the first 30 % of each response, {scored} of {sum(lengths.values())} response"
    )
    assert line in printed
    assert open_cache(cache).signals["teacher"].manifest.horizon == HORIZON
    assert lightopd("verify", cache)[0] == 0

    out = tmp_path / "train"
    asked = ["train", "--cache", cache, "--student", world.sft / "student", "--out", out]
    code, printed, told = lightopd(*asked, "--steps", 2, "--batch", 6, "--json")
    assert code == 0, told
    report = json.loads(printed)
    assert any(line in note for note in report["notes"]), report["notes"]

    code, _, told = lightopd("report", cache, out)
    assert code == 0, told
    page = (cache.parent / "report.html").read_text()
    assert "the first 30 % of each response" in page
    assert "the rest is masked in training" in page


def test_the_engine_is_given_the_beginnings_alone(world, cache):
    lengths, engine = (
        lengths_of(cache),
        FakeEngine(vocabulary_size=open_cache(cache).manifest.vocabulary_size),
    )
    given = []

    class Listening:
        def __getattr__(self, name):
            return getattr(engine, name)

        def score(self, sequences, *rest):
            given.extend(len(one.response_ids) for one in sequences)
            return engine.score(sequences, *rest)

    report = score(world, cache, horizon=3, load=lambda *_: Listening())
    assert max(lengths.values()) > 3
    assert max(given) == 3
    assert report.figures["scored_tokens"] == sum(min(3, n) for n in lengths.values())
    assert report.figures["response_tokens"] == sum(lengths.values())


def test_what_is_scored_is_bit_for_bit_the_beginning_of_the_whole_signal(world, cache):
    score(world, cache, horizon=HORIZON, signal="short")
    score(world, cache, signal="whole")
    sql = """SELECT signal, list(logprob_signal ORDER BY rollout_id, pos) AS values, count(*) AS n
    FROM tokens WHERE pos < ceil(0.3 * response_tokens - 1e-9) GROUP BY signal ORDER BY signal"""
    short, whole = query(cache, sql).to_pylist()
    np.testing.assert_allclose(short["values"], whole["values"], atol=2e-6)
    behind = "SELECT count(logprob_signal) AS there, count(gap) AS gaps FROM tokens WHERE signal = 'short'"
    scored = sum(scored_length(HORIZON, n) for n in lengths_of(cache).values())
    assert query(cache, behind).to_pylist() == [{"there": scored, "gaps": scored}]


def test_named_queries_and_the_report_count_scored_tokens_alone(world, cache):
    score(world, cache, horizon=HORIZON)
    score(world, cache, signal="whole")
    scored = sum(scored_length(HORIZON, n) for n in lengths_of(cache).values())
    opened = package.open_cache(cache)
    assert [row["tokens"] for row in opened.query("tail_mass").rows() if row["signal"] == "teacher"] == [
        scored
    ]
    (row,) = opened.query("signal_differences").rows()
    assert row["tokens"] <= scored
    masses = [row for row in distributions.masses(OpenedCache(cache)) if row["series"] == "teacher"]
    assert sum(row["count"] for row in masses) <= scored
    assert query(cache, "SELECT horizon FROM signals ORDER BY name").to_pylist() == [
        {"horizon": HORIZON},
        {"horizon": None},
    ]


def test_a_rollout_is_shown_with_nothing_behind_the_horizon(world, cache):
    score(world, cache, horizon=3)
    name, length = max(lengths_of(cache).items(), key=lambda pair: pair[1])
    view = package.open_cache(cache).rollout(name)
    assert np.isnan(view.signals["teacher"][3:]).all()
    assert np.isfinite(view.signals["teacher"][:3]).all()
    assert [len(entries) for entries in view.topk["teacher"]] == [4] * 3 + [0] * (length - 3)
    assert "behind its horizon" in view._repr_html_()
    assert "nan" not in repr(view)


def test_a_killed_scoring_resumes_and_another_horizon_is_refused(world, cache):
    score(world, cache, horizon=HORIZON)
    marker = cache / "signals/teacher/part-00001.json"
    before = marker.read_bytes()
    marker.unlink()
    score(world, cache, horizon=HORIZON)
    assert marker.read_bytes() == before
    with pytest.raises(Exception, match="horizon"):
        score(world, cache, horizon=0.5)
    with pytest.raises(Exception, match="horizon"):
        score(world, cache)


def test_rescore_compares_the_beginnings(world, cache):
    score(world, cache, horizon=HORIZON)
    report, agrees = rescore(cache, "teacher", 5)
    assert agrees, report.notes
    assert 0 < report.figures["tokens"] < sum(lengths_of(cache).values())


def test_a_shard_that_is_longer_than_the_horizon_is_found(world, cache):
    score(world, cache, horizon=3, signal="short")
    score(world, cache, horizon=4, signal="longer")
    path = cache / "signals/short/part-00000.parquet"
    manifest = open_cache(cache).signals["short"].manifest
    table = pq.read_table(cache / "signals/longer/part-00000.parquet")
    write_shard(path.parent, 0, table, kind="signals/short", fingerprint=manifest.fingerprint())
    found = [str(finding) for finding in verify(cache)]
    assert any("logprobs is not as long as the first 3 tokens of response_ids" in line for line in found), (
        found
    )


def test_an_export_has_the_beginnings_and_says_so(world, cache, tmp_path):
    score(world, cache, horizon=3)
    (first, *_) = export_dataset(open_cache(cache), tmp_path / "data")
    rows = pq.read_table(first).to_pylist()
    for row in rows:
        length = min(3, len(row["response_ids"]))
        assert len(row["teacher_logprobs"]) == len(row["teacher_topk_ids"]) == length
    assert "the first 3 tokens of each response" in (tmp_path / "data" / "README.md").read_text()


def test_a_dry_run_counts_what_would_be_scored(world, cache):
    scored = sum(scored_length(HORIZON, n) for n in lengths_of(cache).values())
    config = load_stage(
        "precompute", [], [], {"cache": cache, "teacher": world.teacher, "top_k": 4, "horizon": HORIZON}
    )
    figures = precompute.run(config, dry_run=True, tokens_per_s=10.0).figures
    assert figures["scored_tokens"] == scored
    assert figures["hours"] == pytest.approx(scored / 10 / 3600)
    assert figures["bytes"] == pytest.approx(scored * (12 + 4 * 6), abs=1)


@pytest.mark.parametrize("horizon", ["0", "-3", "1.5", "1.0", "0.0", "half"])
def test_a_horizon_that_is_none_is_refused_in_one_line(world, cache, lightopd, horizon):
    code, _, told = lightopd(
        "precompute", "--cache", cache, "--teacher", world.teacher, f"--horizon={horizon}"
    )
    assert code != 0
    assert "is no horizon; give a number of tokens, 1 or more" in told
    assert "Traceback" not in told
    assert not (cache / "signals").exists()


def test_a_horizon_longer_than_every_response_is_refused(world, cache, lightopd):
    longest = max(lengths_of(cache).values())
    asked = ["precompute", "--cache", cache, "--teacher", world.teacher, "--top-k", 4, "--horizon", longest]
    code, _, told = lightopd(*asked)
    assert code != 0
    assert f"horizon is {longest} tokens, and the longest response of {cache} has {longest}" in told
    config = PrecomputeConfig(cache=cache, teacher={"path": "T"}, horizon=64)
    with pytest.raises(ConfigError, match=r"rollout.sampling.max_tokens is 64: it leaves nothing out"):
        check_horizon_below(config, 64)


def test_a_support_must_reach_as_far(world, cache):
    student = {"teacher": world.sft / "student", "signal": "rollout_student"}
    score(world, cache, "role=self", horizon=3, **student)
    with pytest.raises(ConfigError, match="needed for whole responses; set horizon to 3"):
        score(world, cache, "support=student")
    with pytest.raises(ConfigError, match="needed for the first 4 tokens"):
        score(world, cache, "support=student", horizon=4)
    score(world, cache, "support=student", horizon=2)
    assert verify(cache) == []
    counts = query(cache, "SELECT min(topk_count) AS low FROM tokens WHERE signal = 'teacher'").to_pylist()
    assert counts == [{"low": 4}]


def test_a_share_of_a_share_is_refused_before_the_first_step(world, cache, tmp_path, lightopd):
    score(world, cache, horizon=HORIZON)
    asked = ["train", "--cache", cache, "--student", world.sft / "student", "--out", tmp_path / "run"]
    code, _, told = lightopd(*asked, "-c", "methods/horizon")
    assert code != 0
    assert "token weight horizon would train the share 0.3 of that alone" in told


def cut_signal(source, target, horizon):
    """The rollouts of `source` with the beginnings of its signal, to the bit."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("signals"))
    whole = open_cache(source)
    manifest = whole.signals["teacher"].manifest.model_copy(update={"horizon": horizon})
    create_signal(open_cache(target), manifest)
    for index in whole.shards:
        table = pq.read_table(whole.file(index, "teacher"))
        scores = [
            cut_scores(one, scored_length(horizon, len(one.logprobs))) for one in table_to_scores(table)
        ]
        cut = scores_to_table(table.column("rollout_id").to_pylist(), scores, manifest.topk_dtype)
        folder = target / "signals/teacher"
        write_shard(folder, index, cut, kind="signals/teacher", fingerprint=manifest.fingerprint())


def cut_masks(source, target, horizon):
    """`source` with its loss masks cut."""
    shutil.copytree(source, target)
    cache = open_cache(target)
    for index in cache.shards:
        rows = pq.read_table(cache.file(index)).to_pylist()
        for row in rows:
            scored = scored_length(horizon, len(row["loss_mask"]))
            row["loss_mask"] = [on and place < scored for place, on in enumerate(row["loss_mask"])]
        table = pa.Table.from_pylist(rows, schema=ROLLOUTS)
        folder, fingerprint = target / "rollouts", cache.manifest.fingerprint()
        write_shard(folder, index, table, kind="rollouts", fingerprint=fingerprint)


@pytest.mark.parametrize("recipe", ["lightning_opd", "f_forward_kl", "recommended_topk_reverse_kl"])
def test_training_is_to_the_bit_that_of_a_loss_mask_cut_at_the_horizon(world, tmp_path, recipe):
    cut_signal(world.cache, tmp_path / "signal", HORIZON)
    cut_masks(world.cache, tmp_path / "mask", HORIZON)
    found = []
    for name in ("signal", "mask"):
        asked = {"cache": tmp_path / name, "student": world.sft / "student", "out": tmp_path / f"run_{name}"}
        small = ["steps=2", "batch_sequences=6", "optimizer.lr=1e-2", "loggers=[]"]
        report = train.run(load_stage("train", [str(METHODS / f"{recipe}.yaml")], small, asked))
        found.append((report.figures["loss"], weights_of(tmp_path / f"run_{name}" / "student")))
    assert found[0][0] == found[1][0]
    left, right = found[0][1], found[1][1]
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_hidden_states_go_with_whole_responses(world, cache):
    with pytest.raises(ConfigError, match="keep: hidden keeps the states of whole responses"):
        score(world, cache, "keep=hidden", horizon=HORIZON)
