"""`lightopd sql`: one query, a shipped one by its name, or a shell when none is given."""

import json
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lightopd.cli.inspection import look
from lightopd.cli.inspection.rows import rows_of, write_rows
from lightopd.cli.output import say, show_table

if TYPE_CHECKING:
    from lightopd.inspection.opened import OpenedCache


def sql(
    cache: look.CacheFolder,
    query: Annotated[
        str | None, typer.Argument(help="SQL, or the name of a shipped query; none opens a shell.")
    ] = None,
    parameters: Annotated[
        list[str] | None, typer.Argument(help="Parameters of a shipped query, as k=10.")
    ] = None,
    file: Annotated[Path | None, typer.Option("-f", "--file", help="File with the SQL.")] = None,
    schema: Annotated[
        bool, typer.Option("--schema", help="List views, their columns and the shipped queries.")
    ] = False,
    format: Annotated[
        str | None,
        typer.Option(
            "--format", help="table, markdown, csv, json (lines) or parquet; left out, as --out ends."
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Write the result here instead of the screen.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Let --out replace a file that is there.")] = False,
    runs: look.Runs = None,
    tokenizer: look.Tokenizer = None,
    timeout: look.Timeout = None,
    memory: look.Memory = None,
    as_json: look.AsJson = False,
) -> None:
    """Read-only SQL over a cache, or a shell for it: rollouts, tokens, topk, signals, lineage, metrics.

    Example: lightopd sql runs/cache "select finish_reason, count(*) from rollouts group by all"
    """
    from lightopd.errors import ConfigError

    opened = look.open_for(cache, runs, tokenizer, timeout, memory)
    if schema:
        _show_schema(opened, as_json)
        return
    if query is not None and file is not None:
        raise ConfigError("give one query: SQL or a shipped name, or -f FILE")
    if query is None and file is None:
        from lightopd.cli.inspection.shell import run_shell

        run_shell(opened)
        return
    if out is not None:
        _check_output(out, cache, force)
    text, values = _chosen(query, file, parameters or [], {row["view"] for row in opened.columns()})
    look.warn_without_tokenizer(opened, text)
    with opened.stream(text, values) as reader:
        if as_json:
            say(json.dumps({"columns": reader.schema.names, "rows": list(rows_of(reader))}, default=str))
        else:
            write_rows(reader, format or _format_of(out), out)


ENDINGS = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet", ".md": "markdown"}
"""What the ending of `--out FILE` asks for; any other takes a table."""


def _format_of(out: Path | None) -> str:
    return "table" if out is None else ENDINGS.get(out.suffix.lower(), "table")


def _check_output(out: Path, cache: Path, force: bool) -> None:
    """Refuse to write into the cache, into a folder that is not there, or over a file that is."""
    from lightopd.errors import OutputError

    if out.resolve().is_relative_to(cache.resolve()):
        raise OutputError(f"{out} lies inside the cache {cache}, which SQL only reads; name a file outside")
    if not out.parent.is_dir():
        raise OutputError(f"{out}: there is no folder {out.parent}; make it, or name a file elsewhere")
    if out.exists() and not force:
        raise OutputError(f"{out} exists; name another file, or replace it with --force")


def _chosen(
    query: str | None, file: Path | None, words: list[str], views: Collection[str]
) -> tuple[str, dict[str, Any]]:
    """SQL and the values of its parameters; the name of a view alone asks for its rows."""
    from lightopd.errors import ConfigError
    from lightopd.inspection.queries import named_queries, parse_assignments

    values = parse_assignments(words)
    named = named_queries().get(query or "")
    if named is not None:
        return named.sql, named.values(values)
    if query in views and not words:
        return f"FROM {query}", {}
    if query is not None and query.isidentifier():
        queries, shown = ", ".join(named_queries()), ", ".join(sorted(views))
        raise ConfigError(
            f"there is no query or view {query!r}; there are the queries {queries} and the views {shown}"
        )
    return (_read_text(file) if file else query or ""), values


def _read_text(file: Path) -> str:
    from lightopd.errors import InputError

    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: cannot be read ({error})") from error


def _show_schema(opened: "OpenedCache", as_json: bool) -> None:
    from lightopd.inspection.queries import named_queries

    columns, queries = opened.columns(), named_queries()
    if as_json:
        purposes = {name: query.purpose for name, query in queries.items()}
        say(json.dumps({"columns": columns, "queries": purposes}))
        return
    show_table(["view", "column", "type"], columns)
    say("\nshipped queries:")
    for name, query in queries.items():
        say(f"  {name:<18} {query.purpose}")
