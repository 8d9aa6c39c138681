"""--json on every command: one JSON document on stdout, and nothing else there."""

import json

import pytest
import typer

from lightopd.cli.main import app

SETS = ["--set", "cache=c", "--set", "student=s", "--set", "out=o"]
ENDLESS = {"view"}
"""Serves until Ctrl-C; its stdout is one line, the address."""


def commands(group, prefix=()):
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, (*prefix, name))
        else:
            yield (*prefix, name), command


def test_every_command_takes_json():
    for name, command in commands(typer.main.get_command(app)):
        options = {option for parameter in command.params for option in parameter.opts}
        assert "--json" in options or name[0] in ENDLESS, name


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        (["verify", "CACHE"], "is_whole"),
        (["sql", "CACHE", "select 1 as x"], "rows"),
        (["sql", "CACHE", "--schema"], "queries"),
        (["methods", "show", "lightning_opd"], "recipe"),
        (["methods", "check", "lightning_opd", "CACHE"], "can_serve"),
        (["config", "show", "train"], "properties"),
        (["config", "show", "train", *SETS], "steps"),
        (
            ["config", "check", "train", "--set", "cache=c", "--set", "student=s", "--set", "out=o"],
            "is_right",
        ),
        (["doctor", "."], "facts"),
    ],
)
def test_stdout_is_one_document(lightopd, world, arguments, key):
    code, out, _ = lightopd(*(str(world.cache) if word == "CACHE" else word for word in arguments), "--json")
    assert code in (0, 1) if arguments[0] == "doctor" else code == 0
    assert key in json.loads(out)


def test_the_list_of_methods_is_a_document_too(lightopd):
    rows = json.loads(lightopd("methods", "list", "--json")[1])
    assert {"lightning_opd"} < {row["method"] for row in rows}


def test_the_doctor_names_versions_devices_space_extras_and_engines(lightopd, tmp_path):
    _, out, _ = lightopd("doctor", tmp_path / "not" / "there")
    for group in ("versions", "devices", "space", "extras", "engines"):
        assert f"\n{group}\n" in f"\n{out}"
    assert f"disk of {tmp_path}" in out
    assert "+ torch" in out
    assert "cpu" in out


def test_the_doctor_says_what_an_extra_lacks(monkeypatch):
    import importlib.metadata

    from lightopd.inspection.doctor import examine

    version = importlib.metadata.version

    def without_altair(name):
        if name == "altair":
            raise importlib.metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(importlib.metadata, "version", without_altair)
    wanted = ["altair>=6 ; extra == 'report'", "duckdb>=2"]
    monkeypatch.setattr(importlib.metadata, "requires", lambda _: wanted)
    monkeypatch.setattr(importlib.metadata, "metadata", lambda _: Extras())
    (report,) = [fact for fact in examine_extras(examine) if fact.name == "report"]
    assert report.value == "lacks altair; pip install 'lightopd[report]'"


class Extras:
    def get_all(self, _):
        return ["report"]


def examine_extras(examine):
    from pathlib import Path

    return [fact for fact in examine(Path()) if fact.group == "extras"]
