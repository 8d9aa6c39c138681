"""What nobody foresaw is one line and a file; no line steers a terminal."""

import logging
import re
from pathlib import Path

import pytest
import typer

from lightopd import errors
from lightopd.cli.guard import INTERRUPTED, UNFORESEEN, guarded
from lightopd.cli.main import _log_to_stderr
from lightopd.cli.output import show_table
from lightopd.errors import InputError, LightopdError
from lightopd.stopping import TERMINATED


def fails_with(error, capsys):
    def command():
        raise error

    with pytest.raises(typer.Exit) as ended:
        guarded(command)()
    return ended.value.exit_code, capsys.readouterr().err


def test_an_unforeseen_error_is_one_line_and_its_traceback_lies_in_a_file(capsys):
    code, told = fails_with(ZeroDivisionError("division\nby zero"), capsys)
    assert code == UNFORESEEN
    assert told.startswith("error: ZeroDivisionError: division by zero; report it with ")
    assert told.count("\n") == 1
    path = Path(told.split()[-1])
    assert "Traceback" in path.read_text()
    path.unlink()


def test_control_characters_never_reach_the_terminal(capsys):
    code, told = fails_with(InputError("row \x1b[2J\x07 is odd"), capsys)
    assert (code, told) == (3, "error: row  [2J  is odd\n")


def test_a_command_that_ends_itself_is_left_alone(capsys):
    assert fails_with(typer.Exit(5), capsys) == (5, "")


def test_the_traceback_of_a_foreseen_error_is_kept_where_debug_says(lightopd, tmp_path):
    kept = tmp_path / "trace.txt"
    code, _, told = lightopd("--debug", kept, "verify", tmp_path / "none")
    assert code == 5
    assert "Traceback" not in told
    assert "CacheError" in kept.read_text()


def test_debug_names_a_file_in_a_folder_that_is_there(lightopd, tmp_path):
    code, _, told = lightopd("--debug", tmp_path / "none" / "trace.txt", "verify", tmp_path)
    assert (code, "is no folder" in told) == (2, True)


def test_no_line_of_the_log_and_no_table_steers_the_terminal(capsys):
    logger = logging.getLogger("lightopd")
    before = logger.handlers, logger.propagate
    try:
        _log_to_stderr()
        logger.warning("the server says \x1b]0;title\x07")
    finally:
        logger.handlers, logger.propagate = before
    show_table(["name\x1b[31m"], [{"name\x1b[31m": "\x1b[2J\u202evalue"}])
    out, err = capsys.readouterr()
    assert all(letter.isprintable() for letter in (out + err).replace("\n", ""))


def test_text_of_a_cache_reaches_a_terminal_without_control_characters(lightopd, world, monkeypatch):
    for format in ("table", "markdown", "csv", "json"):
        monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
        query = "select chr(27) || '[2J' as \"a\x1b[31m\""
        _, out, _ = lightopd("sql", world.cache, query, "--format", format)
        assert "\x1b" not in out, format


def test_the_page_of_exit_codes_is_what_the_errors_say():
    text = (Path(__file__).parents[2] / "docs" / "errors.md").read_text()
    codes = {int(code) for code in re.findall(r"^\| (\d+) \|", text, re.MULTILINE)}
    raised = {kind.exit_code for kind in [LightopdError, *LightopdError.__subclasses__()]}
    assert codes == {0, *raised, UNFORESEEN, INTERRUPTED, TERMINATED}
    for kind in LightopdError.__subclasses__():
        if kind.__module__ == errors.__name__:
            assert f"| {kind.exit_code} | {kind.__name__} |" in text
