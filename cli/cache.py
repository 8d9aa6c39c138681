"""Commands on a cache folder: verify, index, join, import, export, push, pull."""

import json
from pathlib import Path
from typing import Annotated

import typer

from lightopd.cli import options
from lightopd.cli.output import say, show_report
from lightopd.errors import ConfigError

CacheFolder = Annotated[Path, typer.Argument(help="Cache folder.")]
ReadCache = Annotated[Path, typer.Argument(help="Cache folder, or a URL such as s3://bucket/cache.")]


def verify(
    cache: ReadCache,
    rescore: Annotated[
        int | None, typer.Option("--rescore", help="Also score so many rollouts again with the teacher.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Draws the rollouts that are scored again.")] = 0,
    signal: Annotated[str, typer.Option("--signal", help="Signal that is scored again.")] = "teacher",
    teacher: Annotated[
        str | None, typer.Option("--teacher", help="Where the teacher is now, if it moved.")
    ] = None,
    restore: Annotated[
        bool, typer.Option("--restore", help="First make manifests that are gone again, from the shards.")
    ] = False,
    repair: Annotated[
        bool, typer.Option("--repair", help="Move what is bad aside, so that its stage makes it again.")
    ] = False,
    as_json: options.Json = False,
) -> None:
    """Check every byte and number of a cache; one line a finding, exit code 5 when there is one.

    Example: lightopd verify runs/cache --rescore 16
    """
    from lightopd.cache.index import refresh_index
    from lightopd.cache.manifests import restore_manifests
    from lightopd.cache.verify import verify as check
    from lightopd.files import looks_like_url
    from lightopd.pipelines.shared.run_folder import writing

    if restore:
        with writing(cache):
            for path in restore_manifests(cache):
                say(f"{path} made again from its shards", err=True)
            if (cache / "index.duckdb").exists():
                refresh_index(cache)
    if repair:
        if rescore is not None:
            raise ConfigError(
                "--repair and --rescore were given together; repair, run the stages, then rescore"
            )
        _repair(cache, as_json)
        return
    findings, named = [str(finding) for finding in check(cache)], looks_like_url(cache) or str(cache)
    if rescore is not None and not findings:
        from lightopd.pipelines.caches.rescore import rescore as again

        report, agrees = again(cache, signal, rescore, teacher, seed=seed)
        if not as_json:
            show_report(report)
        findings += [] if agrees else list(report.notes)
    if as_json:
        say(json.dumps({"cache": named, "is_whole": not findings, "findings": findings}))
    else:
        say("\n".join(findings) if findings else f"{named} is whole")
    if findings:
        raise typer.Exit(5)


def _repair(cache: Path, as_json: bool) -> None:
    """Move what is bad aside; the lines that no repair can mend, else the commands that make it again."""
    from lightopd.cache.checks.repair import left_over, move_aside, next_commands
    from lightopd.cache.index import refresh_index
    from lightopd.cache.verify import verify as check
    from lightopd.pipelines.shared.run_folder import writing

    if not cache.is_dir():
        check(cache)  # says that it is no cache
    with writing(cache):
        findings = check(cache)
        moved = move_aside(cache, findings)
        if moved:
            refresh_index(cache)
    left, commands = [str(finding) for finding in left_over(findings)], next_commands(cache, findings)
    for finding in findings:
        say(str(finding), err=True)
    for before, after in moved:
        say(f"{cache / before} moved to {cache / after}", err=True)
    if as_json:
        told = {"cache": str(cache), "is_whole": not findings, "findings": list(map(str, findings))}
        say(json.dumps({**told, "moved": dict(moved), "not_mended": left, "next": commands}))
    elif not findings:
        say(f"{cache} is whole")
    else:
        say("\n".join([*(f"not mended: {line}" for line in left), *(f"next: {line}" for line in commands)]))
    if left:
        raise typer.Exit(5)


def index(cache: CacheFolder, as_json: options.Json = False) -> None:
    """Rebuild index.duckdb, the views for DuckDB's own tools, from the Parquet shards.

    Example: lightopd index runs/cache
    """
    from lightopd.cache.index import build_index
    from lightopd.cache.store import open_cache
    from lightopd.pipelines.shared.run_folder import writing

    opened = open_cache(cache, incomplete=True)
    with writing(cache):
        path = str(build_index(opened))
    say(json.dumps({"index": path}) if as_json else path)


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
    source: Annotated[Path, typer.Argument(help="File with the responses.")],
    cache: options.Cache = None,
    format: Annotated[
        str, typer.Option("--format", help="official (Lightning-OPD's Parquet) or responses.")
    ] = "official",
    tokenizer: Annotated[
        str | None, typer.Option("--tokenizer", help="official: model folder whose tokenizer made the ids.")
    ] = None,
    student: options.Student = None,
    sft_teacher: options.SftTeacher = None,
    columns: options.Map = None,
    sets: options.Sets = None,
    engine: options.Engine = None,
    as_json: options.AsJson = False,
) -> None:
    """Make a cache of responses that exist already, or of an official Lightning-OPD Parquet file.

    Example: lightopd import responses.jsonl --format responses --student STUDENT --cache runs/cache
    """
    from lightopd.config import build, laid_over
    from lightopd.schemas.configs import ImportConfig

    if format == "responses":
        from lightopd.pipelines.caches.import_responses import import_responses

        flags = {
            "responses": {"path": str(source), "columns": options.columns_of(columns)},
            "student": student,
            "cache": cache,
            "sft_teacher": sft_teacher,
            "engine": {"kind": engine} if engine else None,
        }
        config = build(ImportConfig, laid_over({}, sets or [], options.given(flags)))
        show_report(import_responses(config), as_json)
        return
    if format != "official":
        raise ConfigError(f"--format {format} is not known; use official or responses")
    if tokenizer is None or cache is None:
        raise ConfigError("--format official needs --cache and --tokenizer")
    from lightopd.pipelines.caches.import_official import import_official

    show_report(import_official(source, Path(cache), tokenizer), as_json)


def export(
    cache: ReadCache,
    out: Annotated[Path, typer.Argument(help="Folder that is created.")],
    as_json: options.Json = False,
) -> None:
    """Write rollouts and signals as a dataset that `datasets.load_dataset("parquet", ...)` loads.

    Example: lightopd export runs/cache runs/dataset
    """
    from lightopd.cache.formats.dataset import export_dataset
    from lightopd.cache.store import open_cache
    from lightopd.pipelines.maintenance.remade import made_beside

    opened = open_cache(cache)
    with made_beside(out) as folder:
        files = [path.relative_to(folder) for path in export_dataset(opened, folder)]
    paths = [str(out / file) for file in files]
    say(json.dumps({"files": paths}) if as_json else "\n".join(paths))


Signals = Annotated[
    list[str] | None, typer.Option("--signal", help="A signal that goes along; repeatable, all by default.")
]
Jobs = Annotated[int | None, typer.Option("--jobs", help="Files under way at the same time.")]


def push(
    cache: CacheFolder,
    url: Annotated[str, typer.Argument(help="Where to: s3://bucket/folder, gs://..., file:///...")],
    signals: Signals = None,
    jobs: Jobs = None,
    sets: options.Sets = None,
    as_json: options.AsJson = False,
) -> None:
    """Send a cache to an object store; run again, it sends what is not there yet.

    Example: lightopd push runs/cache s3://bucket/cache
    """
    from lightopd.config import build, laid_over
    from lightopd.pipelines.caches.push import push as send
    from lightopd.schemas.stores.buckets import BucketConfig

    config = build(BucketConfig, laid_over({}, sets or [], {"jobs": jobs}))
    show_report(send(cache, url, config, signals), as_json)


def pull(
    url: Annotated[
        str,
        typer.Argument(help="Where from: s3://bucket/folder, hf://datasets/OWNER/NAME/folder, ..."),
    ],
    cache: CacheFolder,
    signals: Signals = None,
    jobs: Jobs = None,
    sets: options.Sets = None,
    as_json: options.AsJson = False,
) -> None:
    """Fetch a cache from an object store and check every shard; run again, it fetches what is missing.

    Example: lightopd pull s3://bucket/cache runs/cache
    """
    from lightopd.config import build, laid_over
    from lightopd.pipelines.caches.pull import pull as fetch
    from lightopd.schemas.stores.buckets import BucketConfig

    config = build(BucketConfig, laid_over({}, sets or [], {"jobs": jobs}))
    show_report(fetch(url, cache, config, signals), as_json)


COMMANDS = {
    "verify": verify,
    "index": index,
    "join": join_,
    "import": import_,
    "export": export,
    "push": push,
    "pull": pull,
}
