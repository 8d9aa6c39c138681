"""The command as a person types it: exit codes, one-line errors, tables, documentation."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import typer
from tiny_models import save_model

from lightopd.cli.heartbeat import never_silent
from lightopd.cli.main import app
from lightopd.cli.output import show_table
from lightopd.errors import OutputError
from lightopd.pipelines.shared.run_folder import writing
from lightopd.under_way import doing

ROOT = Path(__file__).parents[2]
COMMANDS = sorted(
    {*typer.main.get_command(app).commands}
    | {f"config {name}" for name in typer.main.get_command(app).commands["config"].commands}
    | {f"methods {name}" for name in typer.main.get_command(app).commands["methods"].commands}
    | {f"cache {name}" for name in typer.main.get_command(app).commands["cache"].commands}
)


def help_of(command):
    found = typer.main.get_command(app)
    for part in command.split():
        found = found.commands[part]
    return found.help or ""


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example_and_stands_in_the_readme(command):
    text = help_of(command)
    if command not in ("config", "methods"):
        assert f"lightopd {command}" in text
    assert f"lightopd {command}" in (ROOT / "README.md").read_text()


def test_the_examples_in_help_name_real_options(lightopd):
    """Every --flag of an example is one that its command takes."""
    for command in COMMANDS:
        found = typer.main.get_command(app)
        for part in command.split():
            found = found.commands[part]
        options = {name for parameter in found.params for name in parameter.opts}
        example = help_of(command).partition("Example:")[2]
        assert set(re.findall(r"--[a-z-]+", example)) <= options, command


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["rollout", "--student", "nowhere", "--prompts", "p.jsonl", "--cache", "c"], 3, "nowhere"),
        (["precompute", "--cache", "nowhere", "--teacher", "t"], 5, "not a cache"),
        (["train", "--cache", "nowhere", "--student", "s", "--out", "o"], 5, "not a cache"),
        (["train"], 2, "cache is missing"),
        (["train", "-c", "nowhere.yaml"], 2, "no config file nowhere.yaml"),
        (["train", "--set", "stepz=1"], 2, "unknown key stepz"),
        (
            ["train", "--steps", "0", "--cache", "c", "--student", "s", "--out", "o"],
            2,
            "greater than or equal to 1",
        ),
        (["config", "show", "trainn"], 2, "the stages are"),
        (["demo", "huge"], 2, "tiny and smollm2"),
        (["verify", "nowhere"], 5, "not a cache"),
        (["sql", "nowhere", "select 1"], 5, "not a cache"),
        (["smollm2", "out", "--gguf", "nowhere.gguf"], 3, "nowhere.gguf"),
    ],
)
def test_a_mistake_is_one_line_on_stderr_and_an_exit_code(
    lightopd, tmp_path, monkeypatch, arguments, code, message
):
    monkeypatch.chdir(tmp_path)
    found, out, err = lightopd(*arguments)
    assert (found, out) == (code, "")
    assert message in err
    assert err.startswith("error: ")
    assert len(err.strip().splitlines()) == 1


def test_sql_prints_tables_csv_json_and_parquet(lightopd, world, tmp_path):
    query = "select finish_reason, count(*) as n from rollouts group by all order by all"
    code, table, _ = lightopd("sql", world.cache, query)
    assert code == 0
    assert table.splitlines()[0].split() == ["finish_reason", "n"]
    rows = [
        json.loads(line) for line in lightopd("sql", world.cache, query, "--format", "json")[1].splitlines()
    ]
    assert sum(row["n"] for row in rows) == 24
    csv = lightopd("sql", world.cache, query, "--format", "csv", "--out", tmp_path / "x.csv")
    assert (tmp_path / "x.csv").read_text().startswith('"finish_reason","n"')
    assert csv[0] == 0
    lightopd("sql", world.cache, query, "--format", "parquet", "--out", tmp_path / "x.parquet")
    assert pq.read_table(tmp_path / "x.parquet").to_pylist() == rows


def test_sql_runs_files_named_queries_and_shows_its_schema(lightopd, world, tmp_path):
    (tmp_path / "q.sql").write_text("select 7 as seven")
    assert "7" in lightopd("sql", world.cache, "-f", tmp_path / "q.sql")[1]
    schema = lightopd("sql", world.cache, "--schema")[1]
    for name in ("rollouts", "tokens", "topk", "signals", "lineage"):
        assert name in schema
    shipped = schema.partition("shipped queries:")[2].split("\n")
    names = [line.split()[0] for line in shipped if line.strip()]
    assert len(names) >= 5
    for name in names:
        assert lightopd("sql", world.cache, name)[0] == 0


@pytest.mark.parametrize(
    "query",
    [
        "select * from read_csv('/etc/passwd')",
        "attach 'x.db'",
        "copy rollouts to 'x.csv'",
        "drop view rollouts",
    ],
)
def test_sql_stays_inside_the_cache_and_reads_only(lightopd, world, tmp_path, monkeypatch, query):
    monkeypatch.chdir(tmp_path)
    code, out, err = lightopd("sql", world.cache, query)
    assert code == 2
    assert out == ""
    assert err.startswith("error: ")
    assert not list(tmp_path.iterdir())


def test_verify_names_a_flipped_byte_and_exits_with_5(lightopd, world, tmp_path):
    assert lightopd("verify", world.cache)[:2] == (0, f"{world.cache} is whole\n")
    shutil.copytree(world.cache, tmp_path / "cache")
    shard = tmp_path / "cache/signals/teacher/part-00001.parquet"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    code, out, _ = lightopd("verify", tmp_path / "cache")
    assert code == 5
    assert "signals/teacher/part-00001.parquet" in out


def test_reports_are_one_json_line_on_request(lightopd, world, tmp_path):
    arguments = [
        "--cache",
        world.cache,
        "--student",
        world.sft / "student",
        "--out",
        tmp_path / "t",
        "--steps",
        1,
    ]
    code, out, _ = lightopd("train", *arguments, "--set", "batch_sequences=4", "--json")
    assert code == 0
    assert json.loads(out)["figures"]["steps"] == 1


def test_config_check_and_show(lightopd, tmp_path):
    (tmp_path / "run.yaml").write_text(
        "out: x\nteacher: t\nstudent: s\nprompts: p.jsonl\ntrain: {steps: 3}\n"
    )
    assert lightopd("config", "check", "run", "-c", tmp_path / "run.yaml")[1] == "run config is right\n"
    assert "steps: 3" in lightopd("config", "show", "train", "-c", tmp_path / "run.yaml")[1]
    text = lightopd("config", "show", "precompute")[1]
    assert "top_k  (default" in text


def test_export_and_import_round_off(lightopd, world, tmp_path):
    assert lightopd("export", world.cache, tmp_path / "dataset")[0] == 0
    assert pq.read_table(tmp_path / "dataset" / "data").num_rows == 24


def test_an_export_never_mixes_into_a_folder_that_holds_something(lightopd, world, tmp_path):
    (tmp_path / "dataset").mkdir()
    (tmp_path / "dataset" / "notes.txt").write_text("mine")
    code, _, err = lightopd("export", world.cache, tmp_path / "dataset")
    assert code == 7
    assert "is there already, and is not replaced" in err
    assert [path.name for path in tmp_path.rglob("*")] == ["dataset", "notes.txt"]


def test_an_export_that_fails_leaves_no_part_of_a_dataset(lightopd, world, tmp_path):
    cache = shutil.copytree(world.cache, tmp_path / "cache")
    last = sorted(cache.glob("rollouts/part-*.parquet"))[-1]
    last.write_bytes(last.read_bytes()[:-1] + b"?")
    code, _, err = lightopd("export", cache, tmp_path / "dataset")
    assert code == 5
    assert str(last) in err
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


def test_a_folder_that_cannot_be_made_is_named(lightopd, world, tmp_path):
    (tmp_path / "file").write_text("")
    arguments = ["--cache", world.cache, "--student", world.sft / "student", "--out", tmp_path / "file" / "x"]
    code, _, err = lightopd("train", *arguments)
    assert code == 7
    assert f"cannot write {tmp_path / 'file' / 'x'}: Not a directory; a file lies where" in err


@pytest.mark.parametrize(
    ("number", "message"), [(errno.ENOSPC, "free space there"), (errno.EACCES, "Permission denied")]
)
def test_a_failed_write_inside_a_stage_is_one_line(tmp_path, number, message):
    with pytest.raises(OutputError, match=message), writing(tmp_path / "out"):
        raise OSError(number, os.strerror(number))


def test_two_processes_cannot_write_one_folder(lightopd, world, tmp_path):
    arguments = [
        "--cache",
        world.cache,
        "--student",
        world.sft / "student",
        "--out",
        tmp_path / "t",
        "--steps",
        1,
    ]
    with writing(tmp_path / "t"):
        code, _, err = lightopd("train", *arguments)
    assert code == 7
    assert "another lightopd process" in err


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ctrl_c_and_sigterm_stop_cleanly_and_say_how_to_resume(world, tmp_path, sent, code):
    command = [Path(sys.executable).with_name("lightopd"), "rollout", "--student", world.sft / "student"]
    command += ["--prompts", world.root / "prompts.jsonl", "--cache", tmp_path / "cache", "--n", 40]
    command += ["--set", "shard_rollouts=1", "--set", "sampling.max_tokens=40"]
    process = subprocess.Popen(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline_s = time.monotonic() + 60
    while not list((tmp_path / "cache").glob("rollouts/part-*.json")) and time.monotonic() < deadline_s:
        time.sleep(0.01)
    process.send_signal(sent)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code
    assert "run the same command again to resume" in err
    assert "Traceback" not in err
    assert not list((tmp_path / "cache").rglob("*.tmp"))


def test_the_version_is_printed(lightopd):
    assert lightopd("--version")[1].startswith("lightopd ")


def test_a_student_of_another_run_is_refused_with_exit_code_4(lightopd, world, tmp_path):
    other = save_model(tmp_path / "other", 9, layers=1)
    code, _, err = lightopd("train", "--cache", world.cache, "--student", other, "--out", tmp_path / "o")
    assert code == 4
    assert "--allow student-mismatch" in err


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_every_command_answers_to_h(lightopd, command):
    code, out, _ = lightopd(*command.split(), "-h")
    assert code == 0
    assert "-h, --help" in out


def test_completion_can_be_installed(lightopd):
    assert "--install-completion" in lightopd("--help")[1]


def test_a_table_fits_the_terminal(monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "50")
    show_table(["id", "text", "n"], [{"id": "a" * 40, "text": "b" * 55, "n": 3}])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 50
    assert lines[-1].endswith("3")


def test_python_started_in_a_clone_finds_all_four_folders(tmp_path):
    shutil.copytree(ROOT / "lightopd", tmp_path / "lightopd", ignore=shutil.ignore_patterns("__pycache__"))
    for folder in ("schemas", "cli", "pipelines"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    code = "import lightopd.cli.main, lightopd.schemas; print(lightopd.schemas.__file__)"
    packages = [path for path in sys.path if "site-packages" in path]
    done = subprocess.run(
        [sys.executable, "-S", "-c", f"import sys; sys.path += {packages!r}; {code}"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == str(tmp_path / "schemas" / "__init__.py"), done.stderr


def test_a_terminal_is_told_what_is_under_way_when_nothing_else_is_said(monkeypatch, caplog):
    caplog.set_level("INFO", "lightopd")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with never_silent("rollout", silence_s=0.05):
        with doing("rollout: sampling shard 2 of 3"):
            wait_until_said(caplog, r"rollout: sampling shard 2 of 3, \d:\d\d:\d\d")
        wait_until_said(caplog, r"rollout: working, \d:\d\d:\d\d")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False)
    caplog.clear()
    with never_silent("rollout", silence_s=0.01):
        time.sleep(0.1)
    assert not caplog.records


def wait_until_said(caplog, pattern):
    """Wait until the last line is such a one."""
    end_s = time.monotonic() + 60
    while not (caplog.messages and re.fullmatch(pattern, caplog.messages[-1])):
        assert time.monotonic() < end_s, caplog.messages
        time.sleep(0.01)
