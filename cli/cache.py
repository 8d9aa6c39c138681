"""Commands on a cache folder: sql, verify, index, join, import, export."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lightopd.cli import options
from lightopd.cli.guard import guarded
from lightopd.cli.output import show_report, show_table

if TYPE_CHECKING:
    import pyarrow

FORMATS = ("table", "csv", "json", "parquet")

CacheFolder = Annotated[Path, typer.Argument(help="Cache folder.")]


def register(app: typer.Typer) -> None:
    """Add the commands of this module to the app."""
    commands: dict[str, Callable[..., None]] = {
        "sql": sql,
        "verify": verify,
        "index": index,
        "join": join_,
        "import": import_,
        "export": export,
    }
    for name, command in commands.items():
        app.command(name)(guarded(command))


def sql(
    cache: CacheFolder,
    query: Annotated[str | None, typer.Argument(help="SQL, or the name of a shipped query.")] = None,
    file: Annotated[Path | None, typer.Option("-f", "--file", help="File with the SQL.")] = None,
    schema: Annotated[
        bool, typer.Option("--schema", help="List views, their columns and the shipped queries.")
    ] = False,
    format: Annotated[str, typer.Option("--format", help="table, csv, json or parquet.")] = "table",
    out: Annotated[
        Path | None, typer.Option("--out", help="Write the result here instead of the screen.")
    ] = None,
) -> None:
    """Read-only SQL over a cache: views rollouts, tokens, topk, signals and lineage.

    Example: lightopd sql runs/cache "select finish_reason, count(*) from rollouts group by all"
    """
    from lightopd.cache.index import named_queries, named_query
    from lightopd.cache.index import query as run_query
    from lightopd.errors import ConfigError

    if format not in FORMATS:
        raise ConfigError(f"--format {format} is not known; use {', '.join(FORMATS)}")
    if schema:
        _show_schema(cache)
        return
    if (query is None) == (file is None):
        raise ConfigError('give one query: lightopd sql CACHE "select ...", a shipped name, or -f FILE')
    text = _read_text(file) if file else (named_query(query) if query in named_queries() else query or "")
    _write_table(run_query(cache, text), format, out)


def _read_text(file: Path) -> str:
    from lightopd.errors import InputError

    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: cannot be read ({error})") from error


def _show_schema(cache: Path) -> None:
    from lightopd.cache.index import named_queries, view_columns

    table = view_columns(cache)
    show_table(table.column_names, table.to_pylist())
    typer.echo("\nshipped queries:")
    for name, sentence in named_queries().items():
        typer.echo(f"  {name:<18} {sentence}")


def _write_table(table: "pyarrow.Table", format: str, out: Path | None) -> None:
    import json
    import sys

    import pyarrow.csv
    import pyarrow.parquet

    from lightopd.errors import ConfigError

    if format == "parquet":
        if out is None:
            raise ConfigError("--format parquet needs --out FILE")
        pyarrow.parquet.write_table(table, out)
    elif format == "csv":
        pyarrow.csv.write_csv(_flat(table), out or sys.stdout.buffer)
    elif format == "json":
        lines = "".join(json.dumps(row, default=str) + "\n" for row in table.to_pylist())
        out.write_text(lines, encoding="utf-8") if out else typer.echo(lines, nl=False)
    elif out is not None:
        raise ConfigError("--out needs --format csv, json or parquet")
    else:
        show_table(table.column_names, table.to_pylist())


def _flat(table: "pyarrow.Table") -> "pyarrow.Table":
    """Nested columns as JSON text, since CSV has no lists."""
    import json

    import pyarrow as pa

    columns = [
        pa.array([None if v is None else json.dumps(v) for v in column.to_pylist()], pa.string())
        if pa.types.is_nested(column.type)
        else column
        for column in table.columns
    ]
    return pa.table(columns, names=table.column_names)


def verify(
    cache: CacheFolder,
    rescore: Annotated[
        int, typer.Option("--rescore", help="Also score so many rollouts again with the teacher.")
    ] = 0,
    signal: Annotated[str, typer.Option("--signal", help="Signal that is scored again.")] = "teacher",
    teacher: Annotated[
        str | None, typer.Option("--teacher", help="Where the teacher is now, if it moved.")
    ] = None,
) -> None:
    """Check every byte and number of a cache; one line a finding, exit code 5 when there is one.

    Example: lightopd verify runs/cache --rescore 16
    """
    from lightopd.cache.verify import verify as check

    findings = [str(finding) for finding in check(cache)]
    if rescore and not findings:
        from lightopd.pipelines.caches.rescore import rescore as again

        report, agrees = again(cache, signal, rescore, teacher)
        show_report(report)
        findings += [] if agrees else list(report.notes)
    for line in findings:
        typer.echo(line)
    if findings:
        raise typer.Exit(5)
    typer.echo(f"{cache} is whole")


def index(cache: CacheFolder) -> None:
    """Rebuild index.duckdb, the views for DuckDB's own tools, from the Parquet shards.

    Example: lightopd index runs/cache
    """
    from lightopd.cache.index import build_index
    from lightopd.cache.store import open_cache

    typer.echo(str(build_index(open_cache(cache, incomplete=True))))


def join_(
    out: Annotated[Path, typer.Argument(help="Cache folder that is created.")],
    sources: Annotated[
        list[Path], typer.Argument(help="Caches: RUN/sft/answers and rollouts of the student.")
    ],
    pairs: Annotated[
        bool, typer.Option("--pairs", help="One answer and one rollout of each prompt that has both.")
    ] = False,
    allow: options.Allow = None,
    as_json: options.AsJson = False,
) -> None:
    """Make one cache of a teacher's answers and a student's rollouts, for methods that learn from both.

    Example: lightopd join runs/pairs runs/sft/answers runs/cache --pairs
    """
    from lightopd.config import build
    from lightopd.pipelines.caches.join import join
    from lightopd.schemas.configs import StageConfig

    allowed = build(StageConfig, {"allow": allow or ()}).allow
    show_report(join(out, sources, pairs=pairs, allow=allowed), as_json)


def import_(
    source: Annotated[Path, typer.Argument(help="Parquet file of the official Lightning-OPD code.")],
    cache: Annotated[Path, typer.Option("--cache", help="Cache folder that is created.")],
    tokenizer: Annotated[str, typer.Option("--tokenizer", help="Model folder whose tokenizer made the ids.")],
) -> None:
    """Turn an official Lightning-OPD Parquet file into a cache whose lineage is marked unknown.

    Example: lightopd import lightning_opd.parquet --cache runs/imported --tokenizer STUDENT
    """
    from lightopd.pipelines.caches.import_official import import_official

    show_report(import_official(source, cache, tokenizer))


def export(
    cache: CacheFolder,
    out: Annotated[Path, typer.Argument(help="Folder that is created.")],
) -> None:
    """Write rollouts and signals as a dataset that `datasets.load_dataset("parquet", ...)` loads.

    Example: lightopd export runs/cache runs/dataset
    """
    from lightopd.cache.convert import export_dataset
    from lightopd.cache.store import open_cache

    for path in export_dataset(open_cache(cache), out):
        typer.echo(str(path))
