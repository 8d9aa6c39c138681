"""`lightopd.open_cache`: a cache in five lines of Python.

cache = lightopd.open_cache("runs/cache")
cache.query("worst_tokens", k=5).df()
cache.sql("SELECT finish_reason, count(*) FROM rollouts GROUP BY ALL").pl()
cache.rollout("4f1c...")
cache.report("report.html")
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from lightopd.cache.buckets.mirroring import folder_of
from lightopd.cache.index import VIEWS
from lightopd.cache.signals.tail_shape import shape_of
from lightopd.cache.store import Cache
from lightopd.cache.store import open_cache as open_folder
from lightopd.errors import ConfigError
from lightopd.files import looks_like_url
from lightopd.inspection.queries import named_query
from lightopd.inspection.result import Result
from lightopd.inspection.rollout import RolloutView, read_rollout
from lightopd.inspection.runs import TrainedRun, metrics_table, read_runs
from lightopd.inspection.session import NO_LIMITS, Limits, run, session
from lightopd.inspection.token_texts import TokenTexts, find_token_texts

if TYPE_CHECKING:
    from lightopd.models.head import Head
    from lightopd.training.data.batches import Microbatch


class OpenedCache:
    """A cache and the runs that were trained on it, for looking at; nothing here writes into it.

    Shards that are not there yet are left out, and those that come are seen by the next query.
    """

    def __init__(
        self, path: Path, runs: Sequence[Path] = (), tokenizer: Path | None = None, limits: Limits = NO_LIMITS
    ) -> None:
        self._place = path
        self.url = looks_like_url(path)
        """Where the cache lies, if in no folder; `path` is its mirror then."""
        self.path = folder_of(path)
        self.limits = limits
        self._run_folders = tuple(runs)
        self._tokenizer = tokenizer
        self._texts: TokenTexts | None = None
        self.cache  # noqa: B018 - a folder that is no cache is refused here

    @property
    def cache(self) -> Cache:
        """Manifests and markers as they are now."""
        return open_folder(self._place, incomplete=True)

    @property
    def runs(self) -> list[TrainedRun]:
        """The runs that were named, as they are now."""
        return read_runs(self._run_folders)

    @property
    def texts(self) -> TokenTexts:
        """What the ids stand for; the tokenizer is read once."""
        if self._texts is None:
            students = [run.path / "student" for run in self.runs]
            self._texts = find_token_texts(self.cache, self._tokenizer, students)
        return self._texts

    def sql(self, query: str, **parameters: Any) -> Result:
        """One reading SQL statement; `$name` in it takes the parameter of that name.

        Views: rollouts, tokens, topk, signals, lineage; table: metrics; functions: decode(ids), token(id).
        """
        return Result(lambda: self.stream(query, parameters))

    def columns(self) -> list[dict[str, str]]:
        """Columns of every view and of `metrics`: view, column, type."""
        names = [*VIEWS, "metrics"]
        listed = ", ".join(f"'{name}'" for name in names)
        return self.sql(
            'SELECT table_name AS "view", column_name AS "column", data_type AS "type" '
            f"FROM information_schema.columns WHERE table_name IN ({listed}) "
            f"ORDER BY list_position([{listed}], table_name), ordinal_position"
        ).rows()

    def query(self, name: str, **parameters: Any) -> Result:
        """A query that comes with the package.

        Raises:
            ConfigError: there is no query of this name, or it has no such parameter.
        """
        named = named_query(name)
        values = named.values(parameters)
        return Result(lambda: self.stream(named.sql, values))

    def rollout(self, rollout_id: str) -> RolloutView:
        """One rollout: text, tokens and signals; its id, or the beginning of it.

        Raises:
            ConfigError: there is none, or several begin so.
        """
        found = self.sql(
            "SELECT rollout_id, shard, row_in_shard FROM rollouts WHERE starts_with(rollout_id, $beginning) "
            "LIMIT 2",
            beginning=rollout_id,
        ).rows()
        if len(found) != 1 or not rollout_id:
            problem = "is no rollout" if not found else "is the beginning of several rollouts' ids"
            raise ConfigError(f"{rollout_id!r} {problem} of {self.path}; see the view rollouts")
        return read_rollout(self.cache, found[0]["shard"], found[0]["row_in_shard"], self.texts)

    def batches(self, rollouts: int = 64, signals: Sequence[str] | None = None) -> Iterator["Microbatch"]:
        """Tensors of the trainable rollouts, in the cache's order, as training gets them; on the CPU.

        Args:
            rollouts: in one batch.
            signals: names of the signals, with their top-k; None means all.

        Raises:
            CacheError: the cache is incomplete or damaged.
        """
        from lightopd.inspection.batches import cache_batches

        return cache_batches(self.path, rollouts, signals)

    def tail_shape(self, signal: str) -> NDArray[np.float32] | None:
        """How the mass outside a signal's top-k lies on average, [V], summing to one; None where it has none.

        Raises:
            CacheError: there is no such signal, or its file is damaged.
        """
        return shape_of(self.cache, signal)

    def head(self, signal: str) -> "Head":
        """The output layer that reads a signal's hidden states, float32 on the CPU.

        Raises:
            CacheError: there is no such signal, it keeps none, or its head is missing or damaged.
        """
        from lightopd.cache.signals.hidden import head_of_signal

        return head_of_signal(self.cache, signal)

    def report(self, out: Path | str | None = None, **settings: Any) -> Path:
        """Write the report, one HTML file; see `lightopd.inspection.report.build.ReportSettings`."""
        from lightopd.inspection.report.build import write_report

        return write_report(self, None if out is None else Path(out), **settings)

    @contextmanager
    def stream(self, sql: str, parameters: dict[str, Any]) -> Iterator[pa.RecordBatchReader]:
        """Run a statement in a session of its own; rows come while the block lasts."""
        cache = self.cache
        with (
            session(cache, self.texts, metrics_table(self.runs), self.limits) as connection,
            run(connection, cache, sql, parameters, self.limits) as reader,
        ):
            yield reader

    def __repr__(self) -> str:
        cache = self.cache
        signals = ", ".join(cache.signals) or "none"
        return (
            f"cache {self.url or self.path}: {cache.num_rollouts:,} rollouts, "
            f"{cache.num_tokens:,} response tokens, signals: {signals}"
        )


def open_cache(
    path: Path | str,
    runs: Sequence[Path | str] = (),
    tokenizer: Path | str | None = None,
    limits: Limits = NO_LIMITS,
) -> OpenedCache:
    """Open a cache to look at it.

    Args:
        path: cache folder, or a URL such as `s3://bucket/cache`.
        runs: `--out` folders of runs trained on it; their steps are the table `metrics`.
        tokenizer: folder with its tokenizer.json; None looks in the models that the manifests name.
        limits: time and memory that a query may take.

    Raises:
        CacheError: the folder is not a cache, or is damaged.
    """
    folder = None if tokenizer is None else Path(tokenizer)
    return OpenedCache(Path(path), [Path(run) for run in runs], folder, limits)
