"""`lightopd methods`, and a cache that came from the official code."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lightopd.cache.store import open_cache


def test_methods_are_listed_with_what_they_need(lightopd):
    code, out, _ = lightopd("methods", "list")
    assert code == 0
    line = next(line for line in out.splitlines() if line.startswith("vopd "))
    assert "signal teacher with top-k" in line


def test_a_method_is_shown_with_its_recipe(lightopd):
    code, out, _ = lightopd("methods", "show", "lightning_opd")
    assert code == 0
    assert "2604.13010" in out
    assert "optimizer: {lr: 2.0e-6" in out
    code, _, err = lightopd("methods", "show", "lightning")
    assert code == 2
    assert "no method lightning" in err


def test_a_cache_is_checked_for_a_method_with_the_command_that_mends_it(lightopd, world):
    assert lightopd("methods", "check", "lightning_opd", world.cache)[0] == 0
    code, out, _ = lightopd("methods", "check", "exopd", world.cache)
    assert code == 5
    assert "lightopd precompute --cache" in out


@pytest.fixture
def official(tmp_path):
    """Two rows as the official code writes them, over the tiny tokenizer's ids."""
    tokens, logprobs = [[4, 5, 1], [6, 1]], [[-0.5, -1.0, -0.1], [-2.0, -0.3]]
    metadata = pa.StructArray.from_arrays(
        [pa.array(tokens, pa.list_(pa.int64())), pa.array(logprobs, pa.list_(pa.float64()))],
        names=["response_tokens", "teacher_log_probs"],
    )
    prompts = [[{"role": "user", "content": text}] for text in ("1+1=", "2+2=")]
    pq.write_table(pa.table({"prompt": prompts, "metadata": metadata}), tmp_path / "official.parquet")
    return tmp_path / "official.parquet"


def test_an_official_file_is_imported_marked_unknown_and_trains_only_when_allowed(
    lightopd,
    world,
    official,
    tmp_path,
):
    cache = tmp_path / "cache"
    code, out, _ = lightopd("import", official, "--cache", cache, "--tokenizer", world.teacher)
    assert code == 0
    assert "lineage unknown" in out
    assert open_cache(cache).manifest.sft.proof == "unknown"
    train = ["train", "--cache", cache, "--student", world.base, "--out", tmp_path / "t", "--steps", 1]
    train += ["--set", "batch_sequences=2", "--set", "objective.target=log_ratio"]
    code, _, err = lightopd(*train)
    assert code == 4
    assert "--allow" in err
    allowed = [
        word for name in ("teacher", "student", "tokenizer") for word in ("--allow", f"{name}-mismatch")
    ]
    code, out, err = lightopd(*train, *allowed)
    assert code == 0, err
    assert "overridden: student-mismatch" in out
