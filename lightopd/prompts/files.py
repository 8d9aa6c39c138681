"""Rows of a file or a dataset: JSON lines, a JSON array, CSV, Parquet, Hugging Face `datasets`."""

import csv
import io
import json
import re
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import IO, Any

from lightopd.errors import InputError
from lightopd.files import stream_kind
from lightopd.prompts.hub_datasets import dataset_batches
from lightopd.prompts.values import HugeNumber
from lightopd.schemas.configs import FilePrompts

Row = tuple[int, dict[str, Any]]
"""Place in the source from 1 (the line, where a file has lines), and the row's columns."""

MAX_LINE_BYTES = 64 * 2**20
"""Longest line of JSON; a longer one is a file of another kind."""
MAX_ARRAY_BYTES = 2**30
"""Longest JSON array, which is read whole; more is written as JSON lines."""
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def read_rows(config: FilePrompts, wanted: Collection[str] | None) -> Iterator[Row]:
    """Rows in the source's order; a reader of columns reads those `wanted` only, and null for the others.

    Raises:
        InputError: missing, of an unknown kind, or broken; names file and row.
    """
    path = config.path
    if kind := stream_kind(path):
        raise InputError(f"{path} is {kind}, not a file; write the prompts into a file")
    reader = READERS.get(_ending(path))
    if path.is_file() and reader is not None:
        _refuse_settings_of_datasets(config)
        yield from _guarded(path, reader, wanted)
    elif path.is_dir() or (not path.exists() and reader is None and HUB_ID.fullmatch(str(path))):
        yield from _from_batches(dataset_batches(config), str(path), wanted)
    elif reader is None:
        raise InputError(
            f"{path} ends in {path.suffix!r}; prompts are read from {', '.join(READERS)} files (also as "
            ".gz or .zst), from a folder of `datasets`, or from a hub id such as openai/gsm8k"
        )
    else:
        raise InputError(f"no prompt file {path}; check the path")


def kind_of(path: Path) -> str:
    """What a source is, in words."""
    if path.is_dir():
        return "a folder of datasets"
    return WORDS.get(_ending(path), "a dataset of the hub")


def _ending(path: Path) -> str:
    """The ending that says what a file holds, without that of a compression."""
    name = path.name.lower()
    for compressed in COMPRESSIONS:
        name = name.removesuffix(compressed)
    return Path(name).suffix


def _refuse_settings_of_datasets(config: FilePrompts) -> None:
    for name in ("split", "subset", "revision"):
        if getattr(config, name) is not None:
            raise InputError(f"{config.path} is a file, which has no {name}; leave prompts.{name} out")


def _guarded(
    path: Path,
    reader: Callable[[Path, Collection[str] | None], Iterator[Row]],
    wanted: Collection[str] | None,
) -> Iterator[Row]:
    import pyarrow as pa

    try:
        yield from reader(path, wanted)
    except (pa.ArrowException, OSError, EOFError, UnicodeDecodeError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or str(error).partition("\n")[0]
        raise InputError(
            f"{path} cannot be read as {kind_of(path)} ({reason}); write or copy it again"
        ) from error


def _opened(path: Path) -> IO[bytes]:
    import pyarrow as pa

    compression = COMPRESSIONS.get(path.suffix.lower())
    if compression is None:
        return path.open("rb")
    return io.BufferedReader(pa.input_stream(str(path), compression=compression))


def _jsonl_rows(path: Path, _: Collection[str] | None = None) -> Iterator[Row]:
    """Rows by line number from 1, with all their keys; empty lines are skipped and counted."""
    with _opened(path) as stream:
        number = 0
        while line := stream.readline(MAX_LINE_BYTES + 1):
            number += 1
            if len(line) > MAX_LINE_BYTES:
                raise InputError(f"{path}, row {number} is longer than {MAX_LINE_BYTES} bytes; split it")
            if not line.strip(b"\xef\xbb\xbf \t\r\n"):
                continue
            yield number, _an_object(_parsed(line, f"{path}, row {number}"), f"{path}, row {number}")


def _json_rows(path: Path, _: Collection[str] | None) -> Iterator[Row]:
    """Rows of an array, by place from 1; a file of lines that bears the array's name is read as lines."""
    with _opened(path) as stream:
        start = stream.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n")
        rest = stream.read(MAX_ARRAY_BYTES) if start.startswith(b"[") else b""
    if not start.startswith(b"["):
        yield from _jsonl_rows(path)
        return
    if len(rest) == MAX_ARRAY_BYTES:
        raise InputError(
            f"{path} is an array of more than {MAX_ARRAY_BYTES >> 20} MiB; write it as JSON lines (.jsonl)"
        )
    rows = _parsed(start + rest, str(path))
    for number, row in enumerate(rows, start=1):
        yield number, _an_object(row, f"{path}, row {number}")


def _parsed(data: bytes, where: str) -> Any:
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise InputError(f"{where} is UTF-16 text; save the file as UTF-8")
    try:
        text = data.decode("utf-8-sig")
        try:
            return json.loads(text)
        except json.JSONDecodeError:
            raise
        except ValueError:  # a number with more digits than Python reads
            return json.loads(text, parse_int=_number)
    except RecursionError:
        raise InputError(f"{where} is nested too deep to be read; flatten it") from None
    except ValueError as error:
        raise InputError(f"{where} is not valid JSON ({error}); correct or remove it") from error


def _number(digits: str) -> int | HugeNumber:
    return HugeNumber(digits) if len(digits) > 4000 else int(digits)


def _an_object(row: Any, where: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise InputError(
            f"{where} is a {type(row).__name__}; write one JSON object with `prompt` or "
            "`messages` for each row"
        )
    return row


def _csv_rows(path: Path, _: Collection[str] | None) -> Iterator[Row]:
    """Rows below the header, by place from 1; an empty cell is a null, as it is in a table."""
    csv.field_size_limit(MAX_LINE_BYTES)
    with _opened(path) as raw:
        text = io.TextIOWrapper(raw, encoding="utf-8-sig", newline="")
        lines = csv.DictReader(text, delimiter="\t" if _ending(path) == ".tsv" else ",", strict=True)
        number = 0
        try:
            for number, row in enumerate(lines, start=1):
                yield number, _cells(row, lines.fieldnames or (), f"{path}, row {number}")
        except UnicodeDecodeError as error:
            raise InputError(f"{path}, row {number + 1} is not UTF-8 text; save the file as UTF-8") from error
        except csv.Error as error:
            raise InputError(f"{path}, row {number + 1} is not valid CSV ({error}); correct it") from error


def _cells(row: dict[Any, Any], names: Collection[str], where: str) -> dict[str, Any]:
    if None in row or None in row.values():
        found = sum(value is not None for key, value in row.items() if key is not None) + len(
            row.get(None, ())
        )
        raise InputError(f"{where} has {found} cells, the header has {len(names)}; quote texts with commas")
    return {name: value or None for name, value in row.items()}


def _parquet_rows(path: Path, wanted: Collection[str] | None) -> Iterator[Row]:
    import pyarrow.parquet as pq

    file = pq.ParquetFile(path)
    names = file.schema_arrow.names
    columns = [name for name in names if wanted is None or name in wanted]
    unread = dict.fromkeys(name for name in names if name not in columns)
    batches = file.iter_batches(columns=columns) if columns else ()
    for number, row in _from_batches(batches, str(path), wanted):
        yield number, {**unread, **row}
    if not columns and file.metadata.num_rows:
        yield 1, unread


def _from_batches(batches: Any, source: str, wanted: Collection[str] | None) -> Iterator[Row]:
    """Rows of Arrow batches; the nulls with which Arrow fills the keys that a row lacks are left out."""
    number = 0
    for batch in batches:
        names = [name for name in batch.schema.names if wanted is None or name in wanted]
        unread = dict.fromkeys(name for name in batch.schema.names if name not in names)
        for row in _rows_of(batch.select(names), source, number):
            number += 1
            yield number, {**unread, **{name: without_nulls(value) for name, value in row.items()}}


def _rows_of(batch: Any, source: str, before: int) -> list[dict[str, Any]]:
    try:
        rows: list[dict[str, Any]] = batch.to_pylist(maps_as_pydicts="strict")
        return rows
    except (ValueError, KeyError) as error:
        for place in range(len(batch) if hasattr(batch, "num_rows") else 0):
            for name in batch.schema.names:
                _refuse_broken(batch.column(name), place, f"{source}, row {before + place + 1}: `{name}`")
        raise InputError(f"{source} cannot be read ({error}); write or copy it again") from error


def _refuse_broken(column: Any, place: int, what: str) -> None:
    try:
        column[place].as_py(maps_as_pydicts="strict")
    except UnicodeDecodeError as error:
        raise InputError(f"{what} is not UTF-8 text; write it again") from error
    except KeyError as error:
        raise InputError(f"{what} has a key twice ({error}); keep one") from error


def without_nulls(value: Any) -> Any:
    """The value without the keys that hold null, at any depth; a turn's `content` stays."""
    if isinstance(value, dict):
        is_turn = "role" in value
        return {
            key: without_nulls(item)
            for key, item in value.items()
            if item is not None or (is_turn and key == "content")
        }
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    return value


READERS: dict[str, Callable[[Path, Collection[str] | None], Iterator[Row]]] = {
    ".jsonl": _jsonl_rows,
    ".ndjson": _jsonl_rows,
    ".json": _json_rows,
    ".csv": _csv_rows,
    ".tsv": _csv_rows,
    ".parquet": _parquet_rows,
}
WORDS = {".jsonl": "JSON lines", ".ndjson": "JSON lines", ".json": "JSON", ".csv": "CSV", ".tsv": "CSV"}
WORDS |= {".parquet": "Parquet"}
