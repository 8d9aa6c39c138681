"""`precompute --dry-run`: a row for each choice, the disk's rate, and what is not known said plainly."""

import json
import shutil
from pathlib import Path

from lightopd.pipelines.shared.costs.disk import write_rate


def dry_run(cache, world):
    asked = ("--cache", cache, "--teacher", world.teacher, "--signal", "new")
    return ("precompute", *asked, "--dry-run")


def test_a_dry_run_prints_choices_and_keeps_nothing(world, lightopd, tmp_path):
    cache = tmp_path / "cache"
    shutil.copytree(world.cache, cache)
    before = sorted(path.relative_to(cache) for path in cache.rglob("*"))
    code, out, err = lightopd(*dry_run(cache, world), "--top-k", 4, "--json")
    assert code == 0, err
    report = json.loads(out)
    names = [row["choice"] for row in report["rows"]]
    assert (names[0], names[-1]) == ("sampled", "hidden")
    assert {"p > 0.003", "p > 0.001"} <= set(names)
    lost = {row["choice"]: row["kl_uniform"] for row in report["rows"]}
    assert lost["sampled"] is None
    assert lost["p > 0.003"] >= lost["p > 0.0001"] > -1e-3
    assert report["figures"]["disk_mb_per_s"] > 0
    assert any("would choose" in note for note in report["notes"])
    assert any("kl_shaped is not known" in note for note in report["notes"])  # a few hundred tokens only
    assert sorted(path.relative_to(cache) for path in cache.rglob("*")) == before


def test_the_table_fits_into_a_hundred_columns(world, lightopd):
    code, out, err = lightopd(*dry_run(world.cache, world), "--top-k", 4)
    assert code == 0, err
    table = [line for line in out.splitlines() if line.startswith(("choice", "top-", "p > ", "sampled"))]
    assert len(table) >= 5
    assert max(map(len, table)) <= 100


def test_hidden_states_count_in_the_bytes_and_their_loss_is_not_made_up(world, lightopd):
    figures = {}
    for kept in ("topk", "hidden"):
        code, out, err = lightopd(
            *dry_run(world.cache, world), "--top-k", 0, "--set", f"keep={kept}", "--json"
        )
        assert code == 0, err
        report = json.loads(out)
        figures[kept] = report["figures"]["bytes_per_token"]
        assert report["rows"][-1]["kl_uniform"] is None
    size = json.loads((world.teacher / "config.json").read_text())["hidden_size"]
    assert figures["hidden"] - figures["topk"] > size


def test_with_a_given_rate_no_choice_is_measured(world, lightopd):
    code, out, err = lightopd(*dry_run(world.cache, world), "--top-k", 4, "--rate", 100, "--json")
    assert code == 0, err
    assert json.loads(out)["rows"] == []
    assert "other choices not measured" in json.loads(out)["notes"][0]


def test_the_disk_is_measured_where_the_cache_will_lie_and_its_file_is_gone(tmp_path):
    rate = write_rate(tmp_path / "not" / "yet")
    assert rate is not None
    assert rate > 0
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_takes_no_file_has_no_rate():
    assert write_rate(Path("/proc/self")) is None
