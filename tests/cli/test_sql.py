"""`lightopd sql` without its shell: endings, names, whole messages, and tables that fit."""

import json
import os

import pyarrow.parquet as pq
import pytest


@pytest.mark.parametrize("name", ["x.csv", "x.json", "x.parquet", "x.md", "x.txt"])
def test_the_ending_of_the_file_says_the_format(lightopd, world, tmp_path, name):
    out = tmp_path / name
    code, _, err = lightopd("sql", world.cache, "select 1 as x, 'a' as y", "--out", out)
    assert code == 0, err
    if name == "x.parquet":
        assert pq.read_table(out).to_pylist() == [{"x": 1, "y": "a"}]
    elif name == "x.json":
        assert json.loads(out.read_text()) == {"x": 1, "y": "a"}
    else:
        first = out.read_text().splitlines()[0]
        assert first == {"x.csv": '"x","y"', "x.md": "| x | y |", "x.txt": "x  y"}[name]


def test_the_name_of_a_view_lists_what_exists(lightopd, world):
    code, out, err = lightopd("sql", world.cache, "signals", "--json")
    assert code == 0, err
    assert "teacher" in json.dumps(json.loads(out)["rows"])
    code, _, err = lightopd("sql", world.cache, "signal")
    assert code == 2
    assert "there is no query or view 'signal'; there are the queries" in err
    assert "signals" in err


def test_duckdbs_suggestion_is_part_of_the_message(lightopd, world):
    code, _, err = lightopd("sql", world.cache, "select rewrad from rollouts")
    assert code == 2
    assert "Candidate bindings:" in err
    assert "reward" in err
    assert err.count("\n") == 1


def test_a_table_fits_the_terminal(lightopd, world, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setattr("shutil.get_terminal_size", lambda *_: os.terminal_size((40, 20)))
    query = "select repeat('a', 50) as first, repeat('b', 50) as second, 7 as third"
    _, out, _ = lightopd("sql", world.cache, query)
    assert max(map(len, out.splitlines())) <= 40
    assert "7" in out


@pytest.mark.parametrize("command", ["train", "sql", "config", "methods"])
def test_h_is_help_everywhere(lightopd, command):
    assert lightopd(command, "-h")[1] == lightopd(command, "--help")[1] != ""
