"""Prompt files and templates are read up to a size; what is no file is not opened."""

import gzip
import json
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny_models import save_model, write_prompts

from lightopd.errors import InputError
from lightopd.prompts import files, tokens
from lightopd.prompts.files import read_rows
from lightopd.prompts.render import render_prompts
from lightopd.schemas.configs import FilePrompts, ModelConfig

LONG = "x" * 300


def refused(path, match):
    with pytest.raises(InputError, match=match) as caught:
        list(read_rows(FilePrompts(path=path), None))
    assert "\n" not in str(caught.value)


@pytest.fixture(autouse=True)
def short_lines(monkeypatch):
    monkeypatch.setattr(files, "MAX_LINE_BYTES", 100)
    monkeypatch.setattr(files, "MAX_ARRAY_BYTES", 100)


def test_a_line_that_is_too_long_is_named(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps({"prompt": "a"}) + "\n" + json.dumps({"prompt": LONG}))
    refused(path, r"p\.jsonl, row 2 is longer than 100 bytes; split it")


def test_a_small_file_that_unpacks_to_a_long_line_is_refused(tmp_path):
    path = tmp_path / "p.jsonl.gz"
    path.write_bytes(gzip.compress(json.dumps({"prompt": "x" * 10_000_000}).encode()))
    refused(path, "row 1 is longer than 100 bytes")


def test_an_array_that_is_too_long_is_refused_with_the_form_that_has_no_limit(tmp_path):
    path = tmp_path / "p.json"
    path.write_text(json.dumps([{"prompt": "x" * 5000}]))
    refused(path, r"array of more than .* JSON lines")


def test_a_cell_of_a_csv_that_is_too_long_is_refused(tmp_path):
    path = tmp_path / "p.csv"
    path.write_text(f"prompt\na\n{LONG}\n")
    refused(path, r"row 2 is not valid CSV \(field larger than field limit")


@pytest.mark.parametrize("name", ["p.jsonl", "p.json", "p.csv", "p.parquet", "prompts"])
def test_a_fifo_is_no_file(tmp_path, name):
    os.mkfifo(tmp_path / name)
    refused(tmp_path / name, "is a FIFO, not a file")


def test_a_device_is_no_file_whatever_its_name(tmp_path):
    (tmp_path / "p.jsonl").symlink_to("/dev/zero")
    refused(tmp_path / "p.jsonl", "is a device, not a file")


def test_a_column_whose_name_is_no_text_is_refused_in_a_line(tmp_path):
    path = tmp_path / "p.parquet"
    pq.write_table(pa.table({"zzzz": ["a"], "prompt": ["b"]}), path, store_schema=False)
    path.write_bytes(path.read_bytes().replace(b"zzzz", b"\xf4zzz"))
    refused(path, r"p\.parquet cannot be read as Parquet")


def test_a_template_that_writes_without_end_is_stopped_before_its_text_becomes_ids(tmp_path, monkeypatch):
    folder = save_model(tmp_path / "model", 0)
    config = FilePrompts(path=write_prompts(tmp_path / "p.jsonl", 1), render="chat")
    monkeypatch.setattr(files, "MAX_LINE_BYTES", 10_000)
    monkeypatch.setattr(tokens, "MAX_TEMPLATE_CHARACTERS", 3)
    with pytest.raises(InputError, match=r"the chat template makes [\d,]+ characters of .*p\.jsonl, row 1"):
        render_prompts(config, ModelConfig(path=str(folder)))
