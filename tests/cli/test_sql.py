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


@pytest.mark.parametrize("name", ["x.csv", "x.json", "x.parquet", "x.md", "x.txt"])
def test_a_query_that_fails_half_way_leaves_the_file_that_was_there(lightopd, world, tmp_path, name):
    out = tmp_path / name
    out.write_text("of before")
    fails_late = "select if(range < 200_000, range, error('late')) as x from range(300_000)"
    code, _, err = lightopd("sql", world.cache, fails_late, "--out", out, "--force")
    assert code == 2
    assert "late" in err
    assert out.read_text() == "of before"
    assert list(tmp_path.iterdir()) == [out]


def test_a_result_goes_into_a_pipe_and_a_folder_that_is_not_there_is_told(lightopd, world, tmp_path):
    code, _, err = lightopd("sql", world.cache, "select 1 as x", "--out", "/dev/null", "--force")
    assert code == 0, err
    missing = tmp_path / "no" / "x.csv"
    code, _, err = lightopd("sql", world.cache, "select 1 as x", "--out", missing)
    assert code == 7
    assert f"there is no folder {missing.parent}" in err


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


def test_a_query_that_is_stopped_while_its_rows_are_read_is_told_as_such(lightopd, world, tmp_path):
    endless = "select range from range(1_000_000_000_000)"
    code, _, err = lightopd("sql", world.cache, endless, "--timeout", "1", "--out", tmp_path / "x.parquet")
    assert code == 2
    assert "ran longer than 1 s" in err
    assert not list(tmp_path.iterdir())
