"""What nobody foresaw is one line and a file."""

from pathlib import Path

import pytest
import typer

from lightopd.cli.guard import UNFORESEEN, guarded
from lightopd.errors import InputError


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
