"""`lightopd verify --repair`: what is bad is moved aside, so that the stage makes it again, and nothing else.

    CACHE/.lightopd.bad/00001/rollouts/part-00003.parquet + .json

Nothing is deleted. The marker goes first: a process that dies in between leaves a file without a marker,
which is no shard. What a stage makes again has the same bytes; where a rollout comes out another,
`lightopd precompute` finds that the signal's shard speaks of other rollouts and scores it again.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

from lightopd.cache.buckets.shard_cache import HEADS
from lightopd.cache.checks.findings import Finding, Mending
from lightopd.cache.contexts import text_folder
from lightopd.cache.manifests import read_manifest, rollouts_folder, signal_folder, signal_names
from lightopd.cache.store import STAGES
from lightopd.errors import OutputError
from lightopd.files import flush, output_error
from lightopd.schemas.manifest import CACHE_MANIFEST, SIGNAL_MANIFEST, CacheManifest, SignalManifest

BAD = ".lightopd.bad"
"""Folder of a cache for what was moved aside; each repair has a numbered one in it."""


def move_aside(cache: Path, findings: Iterable[Finding]) -> list[tuple[str, str]]:
    """Move the files that findings are about out of the cache, each shard with its marker.

    Returns:
        Where each file was and is, relative to the cache folder.

    Raises:
        OutputError: a file cannot be moved; those that were moved stay aside.
    """
    files = _bad_files(cache, findings)
    if not files:
        return []
    folder = _new_folder(cache)
    try:
        for file in files:
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (cache / file).rename(folder / file)
        for parent in sorted({(cache / file).parent for file in files}):
            flush(parent)
    except OSError as error:
        raise output_error(error, folder) from error
    return [(file, str((folder / file).relative_to(cache))) for file in files]


def left_over(findings: Iterable[Finding]) -> list[Finding]:
    """Findings that a repair cannot mend."""
    return [finding for finding in findings if finding.mending is Mending.NONE]


def next_commands(cache: Path, findings: Iterable[Finding]) -> list[str]:
    """The stages that make again what is missing or was moved aside: rollouts, texts, then signals."""
    files = [Path(finding.file) for finding in findings if finding.mending in _MADE_BY_STAGES]
    has_rollouts = any(file.parent == rollouts_folder(Path()) for file in files)
    # A rollout that comes out another is scored again.
    signals = list(signal_names(cache)) if has_rollouts else _signals_of(cache, files)
    stage = STAGES[read_manifest(cache / CACHE_MANIFEST, CacheManifest).origin] if has_rollouts else ""
    commands = [_command(stage, cache, cache / f"{stage}.yaml")] if has_rollouts else []
    texts = sorted({file.parent.name for file in files if file.parts[0] == "texts"})
    made = [("rewrite", text_folder(cache, name), "text") for name in texts]
    made += [("precompute", signal_folder(cache, name), "signal") for name in signals]
    return commands + [
        _command(stage, cache, folder / f"{stage}.yaml", f" for {kind} {folder.name}")
        for stage, folder, kind in made
    ]


def _signals_of(cache: Path, files: Sequence[Path]) -> list[str]:
    """Signals that the files lie in, or whose hidden states need them as their head."""
    heads = {file.stem for file in files if file.parts[0] == HEADS}
    found = {file.parent.name for file in files if file.parts[0] == "signals"}
    for name in signal_names(cache) if heads else ():
        hidden = read_manifest(signal_folder(cache, name) / SIGNAL_MANIFEST, SignalManifest).hidden
        if hidden is not None and hidden.head in heads:
            found.add(name)
    return sorted(found)


_MADE_BY_STAGES = (Mending.STAGE, Mending.ASIDE, Mending.AFTER_ROLLOUTS)


def _command(stage: str, cache: Path, config: Path, what: str = "") -> str:
    if config.is_file():
        return f"lightopd {stage} -c {config} --cache {cache}"
    return f"lightopd {stage}, as it was run{what}"


def _bad_files(cache: Path, findings: Iterable[Finding]) -> list[str]:
    """Files to move, a shard's marker before its Parquet file, in the order of the findings."""
    chosen = list(findings)
    moved = {finding.file for finding in chosen if finding.mending is Mending.ASIDE}
    of_rollouts = {Path(file).name for file in moved if Path(file).parent == rollouts_folder(Path())}
    for finding in chosen:
        is_judged = Path(finding.file).name not in of_rollouts
        if finding.mending is Mending.INDEX or (finding.mending is Mending.AFTER_ROLLOUTS and is_judged):
            moved.add(finding.file)
    named = [finding.file for finding in chosen if finding.file in moved]
    pairs = (file for name in dict.fromkeys(named) for file in _with_marker(name))
    return [file for file in dict.fromkeys(pairs) if (cache / file).exists()]


def _with_marker(file: str) -> Sequence[str]:
    """A shard's marker and its Parquet file; any other file alone."""
    path = Path(file)
    if not path.name.startswith("part-"):
        return (file,)
    return (str(path.with_suffix(".json")), str(path.with_suffix(".parquet")))


def _new_folder(cache: Path) -> Path:
    (cache / BAD).mkdir(exist_ok=True)
    for number in range(1, 100_000):
        folder = cache / BAD / f"{number:05d}"
        try:
            folder.mkdir()
        except FileExistsError:
            continue
        return folder
    raise OutputError(f"{cache / BAD} is full: 99,999 repairs lie in it; move it to another place")
