"""The shape of a signal's tail: what it is, that it never changes, and what is refused of it."""

import csv
import hashlib
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from cache_cases import table_to_rollouts
from fake_engine import FakeEngine
from safetensors.numpy import load_file, save
from scored_caches import roll, score_with

import lightopd as package
from lightopd.cache.index import query
from lightopd.cache.signals.tail_shape import TAIL_SHAPE, read_shape, shape_of, write_shape
from lightopd.cache.store import open_cache
from lightopd.cache.verify import verify
from lightopd.config import load_stage
from lightopd.errors import CacheError, ConfigError, OutputError
from lightopd.models.load import load_model
from lightopd.objectives.plain_tensors import loss_from_logits
from lightopd.pipelines import train
from lightopd.schemas.configs import ModelConfig
from lightopd.schemas.signals.kinds import TailShape

FOLDER = "signals/teacher"


@pytest.fixture(scope="module")
def rolled(world, tmp_path_factory):
    """A cache with enough tokens for a shape, and no signal yet."""
    path = roll(world, tmp_path_factory.mktemp("rolled") / "cache")
    assert open_cache(path).num_tokens > 300
    return path


def score(world, cache, *sets, load=None, **flags):
    return score_with(world, cache, *sets, load=load, **{"top_k": 4, **flags})


@pytest.fixture(scope="module")
def shaped(world, rolled, tmp_path_factory):
    """The same with a signal and its shape; read only."""
    path = tmp_path_factory.mktemp("shaped") / "cache"
    shutil.copytree(rolled, path)
    score(world, path)
    return path


def copied(cache, tmp_path):
    shutil.copytree(cache, tmp_path / "cache")
    return tmp_path / "cache"


def contents(cache):
    files = [*(cache / FOLDER).glob("part-*"), cache / FOLDER / "signal.json", cache / FOLDER / TAIL_SHAPE]
    return {file.name: file.read_bytes() for file in files if file.exists()}


def direct_shape(world, cache, top_k, min_probability=0.0):
    """The mean over all response tokens, by a plain forward pass in float64."""
    model = load_model(ModelConfig(path=str(world.teacher)), "cpu")
    total_V = 0
    for file in sorted((cache / "rollouts").glob("*.parquet")):
        for row in table_to_rollouts(pq.read_table(file)):
            ids = torch.tensor(np.concatenate([row.prompt_ids, row.response_ids])[None], dtype=torch.long)
            with torch.no_grad():
                shares_TV = model(input_ids=ids).logits[0, len(row.prompt_ids) - 1 : -1].double().softmax(-1)
            kept_TK, ids_TK = shares_TV.topk(top_k)
            shares_TV.scatter_(1, ids_TK, torch.where(kept_TK < min_probability, kept_TK, 0.0))
            total_V = total_V + shares_TV.sum(0)
    return (total_V / total_V.sum()).numpy()


def test_it_is_the_mean_of_the_probabilities_that_are_not_kept(world, shaped):
    cache = open_cache(shaped)
    shape_V = shape_of(cache, "teacher")
    assert cache.signals["teacher"].manifest.tail_shape.tokens == cache.num_tokens
    np.testing.assert_allclose(shape_V, direct_shape(world, shaped, 4), rtol=1e-4)
    np.testing.assert_array_equal(package.open_cache(shaped).tail_shape("teacher"), shape_V)


def test_entries_below_the_smallest_probability_belong_to_it(world, rolled, tmp_path):
    cache = copied(rolled, tmp_path)
    score(world, cache, "min_probability=0.05")
    wanted = direct_shape(world, cache, 4, 0.05)
    np.testing.assert_allclose(shape_of(open_cache(cache), "teacher"), wanted, rtol=1e-4)


def test_the_sample_is_the_first_rollouts(world, rolled, tmp_path):
    cache = copied(rolled, tmp_path)
    score(world, cache, "shape_tokens=256")
    tokens = open_cache(cache).signals["teacher"].manifest.tail_shape.tokens
    assert 256 <= tokens < 256 + 14


def test_the_report_names_the_tokens_and_a_sound_shape_has_no_findings(world, rolled, tmp_path):
    cache = copied(rolled, tmp_path)
    assert score(world, cache).figures["tail_shape_tokens"] == open_cache(cache).num_tokens
    assert verify(cache) == []


def test_sql_says_which_signals_have_a_shape(world, shaped, tmp_path):
    cache = copied(shaped, tmp_path)
    score(world, cache, "signal=bare", "shape_tokens=0")
    kept = open_cache(cache).signals["teacher"].manifest.tail_shape
    columns = "name, tail_shape_sha256 AS sha256, tail_shape_tokens AS tokens"
    assert query(cache, f"SELECT {columns} FROM signals ORDER BY name").to_pylist() == [
        {"name": "bare", "sha256": None, "tokens": None},
        {"name": "teacher", "sha256": kept.sha256, "tokens": kept.tokens},
    ]


def test_a_scoring_that_is_resumed_gives_the_same_bytes(world, shaped, tmp_path):
    cache = copied(shaped, tmp_path)
    for file in (cache / FOLDER).glob("part-00001*"):
        file.unlink()
    score(world, cache)
    assert contents(cache) == contents(shaped)


def test_a_scoring_that_was_killed_before_its_manifest_gives_the_same_bytes(world, shaped, tmp_path):
    cache = copied(shaped, tmp_path)
    for file in [*(cache / FOLDER).glob("part-*"), cache / FOLDER / "signal.json"]:
        file.unlink()
    score(world, cache)
    assert contents(cache) == contents(shaped)


def test_a_lost_manifest_is_made_again_with_its_shape(world, shaped, tmp_path):
    cache = copied(shaped, tmp_path)
    (cache / FOLDER / "signal.json").unlink()
    for file in (cache / FOLDER).glob("part-00002*"):
        file.unlink()
    score(world, cache)
    found, wanted = contents(cache), contents(shaped)
    made = open_cache(cache).signals["teacher"].manifest.tail_shape
    assert made == open_cache(shaped).signals["teacher"].manifest.tail_shape
    assert {**found, "signal.json": b""} == {**wanted, "signal.json": b""}  # the noise is measured again


def test_a_signal_that_began_without_a_shape_goes_on_without(world, rolled, tmp_path):
    cache = copied(rolled, tmp_path)
    score(world, cache, "shape_tokens=0")
    before = contents(cache)
    for file in (cache / FOLDER).glob("part-00001*"):
        file.unlink()
    score(world, cache)
    assert {n: c for n, c in contents(cache).items() if "part" in n} == {
        n: c for n, c in before.items() if "part" in n
    }
    assert shape_of(open_cache(cache), "teacher") is None


@pytest.mark.parametrize("tokens", [0, 256])
def test_another_sample_in_the_same_signal_is_refused_by_name(world, shaped, tmp_path, tokens):
    cache = copied(shaped, tmp_path)
    with pytest.raises(OutputError, match="tail_shape"):
        score(world, cache, f"shape_tokens={tokens}")


def test_a_cache_that_is_too_small_gives_no_shape_and_refuses_one_that_is_requested(world, tmp_path):
    cache = copied(world.cache, tmp_path)
    assert shape_of(open_cache(cache), "teacher") is None
    message = r"has \d+ response tokens, the shape of a tail needs 256 or more"
    with pytest.raises(ConfigError, match=message):
        score(world, cache, "shape_tokens=2048", signal="other")


def test_an_engine_that_sees_no_tails_gives_no_shape(world, rolled, tmp_path):
    cache = copied(rolled, tmp_path)
    width = open_cache(cache).manifest.vocabulary_size
    score(world, cache, load=lambda *_: FakeEngine(vocabulary_size=width, context_length=512))
    assert shape_of(open_cache(cache), "teacher") is None


def test_no_shape_is_made_where_every_token_is_kept(world, rolled, tmp_path):
    cache = copied(rolled, tmp_path)
    score(world, cache, top_k=open_cache(cache).manifest.vocabulary_size)
    assert shape_of(open_cache(cache), "teacher") is None


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (["shape_tokens=100"], "shape_tokens: 100 is too few; give 256 or more"),
        (["shape_tokens=512", "top_k=0"], "shape_tokens needs engine hf, which sees whole tails, a top_k"),
        (
            ["shape_tokens=512", 'engine={"kind": "server", "urls": ["http://127.0.0.1:1"]}'],
            "shape_tokens needs engine hf, which sees whole tails",
        ),
    ],
)
def test_a_shape_that_cannot_be_is_refused_at_load(sets, message):
    with pytest.raises(ConfigError, match=message):
        load_stage("precompute", [], sets, {"cache": "cache", "teacher": "teacher"})


def test_a_shape_that_is_gone_or_changed_is_a_finding_and_no_training_starts(world, shaped, tmp_path):
    cache = copied(shaped, tmp_path)
    file = cache / FOLDER / TAIL_SHAPE
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    (finding,) = verify(cache)
    assert str(finding).startswith(f"{FOLDER}/{TAIL_SHAPE}: is not the shape that signal.json names; copy")
    with pytest.raises(CacheError, match="is not the shape that"):
        fit(world, cache, tmp_path / "out", "shaped")
    file.unlink()
    (finding,) = verify(cache)
    assert "cannot be read (No such file or directory); copy" in str(finding)


GOOD = np.full(8, 0.125, np.float32)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (save({"shape": GOOD * np.float32(1.01)}), r"its entries sum to 1\.01, not to 1; copy"),
        (save({"shape": np.where(np.arange(8) == 3, np.nan, GOOD).astype(np.float32)}), "entry 3 is nan, no"),
        (
            save({"shape": np.where(np.arange(8) == 2, -0.1, GOOD).astype(np.float32)}),
            r"entry 2 is -0\.1, no",
        ),
        (save({"shape": GOOD[:7]}), r"holds float32 \(7,\), the vocabulary needs float32 \(8,\); copy"),
        (save({"shape": GOOD.astype(np.float64)}), r"holds float64 \(8,\), the vocabulary needs float32"),
        (save({"other": GOOD}), "holds no tensor `shape`"),
        (b"no safetensors", "holds no tensor `shape`"),
    ],
)
def test_a_file_that_is_no_shape_is_told_in_one_line(tmp_path, content, message):
    (tmp_path / TAIL_SHAPE).write_bytes(content)
    described = TailShape(sha256=hashlib.sha256(content).hexdigest(), tokens=512)
    with pytest.raises(CacheError, match=message) as raised:
        read_shape(tmp_path, described, 8)
    assert "\n" not in str(raised.value)


def test_sums_with_a_nan_are_never_written(tmp_path):
    with pytest.raises(CacheError, match="entry 1 is nan, no probability"):
        write_shape(tmp_path, np.array([1.0, np.nan]), 512)
    assert not (tmp_path / TAIL_SHAPE).exists()


def test_equal_sums_give_equal_bytes(tmp_path):
    sums_V = np.random.default_rng(0).random(8)
    found = [write_shape(tmp_path / name, sums_V, 512) for name in "ab"]
    assert found[0] == found[1]
    assert load_file(tmp_path / "a" / TAIL_SHAPE)["shape"].sum() == pytest.approx(1)


def fit(world, cache, out, tail):
    target = f'objective={{"target": {{"kind": "divergence", "divergence": "reverse_kl", "tail": "{tail}"}}}}'
    asked = {"cache": cache, "student": world.sft / "student", "out": out, "steps": 2}
    train.run(load_stage("train", [], ["batch_sequences=6", target], asked))
    with (out / "metrics.csv").open() as file:
        return float(next(csv.DictReader(file))["loss"])


def test_a_student_is_trained_over_the_whole_vocabulary(world, shaped, tmp_path):
    """At the first step all three see the same rollouts and student."""
    bucket, uniform, shape = (
        fit(world, shaped, tmp_path / tail, tail) for tail in ("bucket", "uniform", "shaped")
    )
    assert bucket < min(uniform, shape)
    assert uniform != shape


def test_an_objective_that_needs_a_shape_is_refused_on_a_cache_without(world, tmp_path):
    with pytest.raises(CacheError, match="signal teacher has no shape of its tail; score it under another"):
        fit(world, world.cache, tmp_path / "out", "shaped")


def test_plain_tensors_take_the_shape_from_the_opened_cache(shaped):
    opened = package.open_cache(shaped)
    batch = next(opened.batches(4)).rollouts
    logits_NV = torch.randn(len(batch.ids_N), opened.cache.manifest.vocabulary_size)
    objective = {"target": {"kind": "divergence", "divergence": "forward_kl", "tail": "shaped"}}
    shapes = {"teacher": opened.tail_shape("teacher")}
    assert float(loss_from_logits(objective, batch, logits_NV, shapes).value) > 0
    with pytest.raises(ConfigError, match="term main needs the shape of signal teacher's tail"):
        loss_from_logits(objective, batch, logits_NV)
