"""The shell of `lightopd sql`: commands, completion, statements over several lines, Ctrl-C, a terminal."""

import contextlib
import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from crowd import until

from lightopd.cache.index import VIEWS
from lightopd.cli.inspection.shell import completions, is_whole, statements
from lightopd.inspection.opened import open_cache

COMMAND = str(Path(sys.executable).with_name("lightopd"))


@pytest.fixture
def typed(lightopd, world, monkeypatch):
    """Type text into the shell through a pipe: stdout, stderr."""

    def call(text):
        monkeypatch.setattr(sys, "stdin", io.StringIO(text))
        code, out, err = lightopd("sql", world.cache)
        assert code == 0
        return out, err

    return call


def test_a_script_of_commands_and_statements_runs_to_its_end(typed, tmp_path):
    file = tmp_path / "out.csv"
    out, err = typed(
        ".tables\nselect 1 as one,\n  2 as two;\n.format json\n.run lengths\n"
        f".out {file} csv\nselect 3 as three;\n.nothing\n.run nothing\nselect nothing;\n.schema nowhere\n"
        ".tables much\nselect 4 as four"
    )
    assert out.splitlines()[: len(VIEWS) + 1] == [*VIEWS, "metrics"]
    assert "one  two" in out
    assert json.loads(out.splitlines()[-1]) == {"four": 4}
    assert f"1 rows written to {file}" in out
    assert file.read_text().splitlines() == ['"three"', "3"]
    assert [line.split(":")[0] for line in err.splitlines()] == ["error"] * 5


def test_exit_ends_it_and_help_names_every_command(typed):
    out, err = typed(".help\n.queries\n.show lengths\n.exit\nselect 5 as five;")
    assert "five" not in out
    assert "worst_tokens" in out
    assert "[k=50 context=12 signal=None]" in out
    assert "FROM rollouts" in out
    assert err == ""


def test_a_statement_is_whole_at_a_semicolon_outside_quotes():
    assert is_whole("select 1;")
    assert not is_whole("select 1")
    assert not is_whole("select ';")
    assert is_whole(".tables")
    assert list(statements(["select 1,\n", "2;\n", "\n", ".help\n", "select 3\n"])) == [
        "select 1,\n2;",
        ".help",
        "select 3",
    ]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (".ru", [".run"]),
        (".run worst", ["worst_tokens"]),
        (".run worst_tokens c", ["context="]),
        (".format m", ["markdown"]),
        (".schema to", ["tokens", "topk"]),
        ("select fini", ["finish_reason"]),
        ("select avg(logprob_t", ["logprob_tail"]),
        ("from roll", ["rollout_id", "rollouts"]),
        ("select dec", ["decode("]),
    ],
)
def test_tab_completes_commands_queries_parameters_tables_and_columns(world, text, found):
    assert completions(open_cache(world.cache), text) == found


def test_ctrl_c_stops_a_query_at_once_with_one_line(world, tmp_path):
    endless = "select count(*) from range(100000000000) a, range(1000000) b"
    process = subprocess.Popen(
        [COMMAND, "sql", str(world.cache), endless],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )
    until(lambda: list(tmp_path.glob("lightopd-sql-*")))
    asked_at_s = cpu_s(process.pid)
    until(lambda: cpu_s(process.pid) > asked_at_s + 1)  # the query is under way: all before takes far less
    started_s = time.monotonic()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert out == ""
    assert len(err.strip().splitlines()) == 1
    assert time.monotonic() - started_s < 10


def cpu_s(pid):
    """Seconds of a core that a process has used."""
    user, system = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


@pytest.mark.slow
def test_on_a_terminal_it_prompts_remembers_and_ends_with_ctrl_d(world, tmp_path):
    environment = {**os.environ, "XDG_STATE_HOME": str(tmp_path), "TERM": "xterm", "PAGER": "cat"}
    pid, descriptor = pty.fork()
    if pid == 0:
        os.execvpe(COMMAND, [COMMAND, "sql", str(world.cache)], environment)
    seen = read_until(descriptor, b"lightopd>")
    os.write(descriptor, b"select 40 + 2 as answer;\r")
    seen += read_until(descriptor, b"42")
    seen += read_until(descriptor, b"lightopd>")
    os.write(descriptor, b"\x04")
    with contextlib.suppress(OSError):  # the terminal's other end is gone
        read_until(descriptor, b"never said")
    deadline_s = time.monotonic() + 30
    while (ended := os.waitpid(pid, os.WNOHANG)) == (0, 0) and time.monotonic() < deadline_s:
        time.sleep(0.05)
    if ended == (0, 0):
        os.kill(pid, signal.SIGKILL)
    assert ended == (pid, 0)
    assert b".help for help" in seen
    assert "select 40 + 2 as answer;" in (tmp_path / "lightopd" / "sql_history").read_text()


def read_until(descriptor, wanted):
    seen, deadline_s = b"", time.monotonic() + 60
    while wanted not in seen:
        left_s = deadline_s - time.monotonic()
        assert left_s > 0, seen
        if not select.select([descriptor], [], [], left_s)[0]:
            continue
        seen += os.read(descriptor, 4096)
        if b"\x1b[6n" in seen:
            os.write(descriptor, b"\x1b[1;1R")
            seen = seen.replace(b"\x1b[6n", b"")
    return seen
