"""`lightopd report`: everything about a cache and its runs in one HTML file that loads nothing."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lightopd import __version__
from lightopd.cache.store import Cache
from lightopd.cache.verify import verify
from lightopd.errors import ConfigError
from lightopd.files import write_atomically
from lightopd.inspection.opened import OpenedCache
from lightopd.inspection.report import distributions, facts
from lightopd.inspection.report.charts import Chart, accuracies, altair, bands, bars, curves, histogram
from lightopd.inspection.report.page import drawing, render
from lightopd.inspection.report.rollouts import Chosen, choose, pack
from lightopd.inspection.runs import TrainedRun

Group = tuple[str, str, list[Chart]]
"""Anchor, name and drawings of a section."""

OVERLAP_K = 8
STEPS_DRAWN = 400
"""Points of a curve; of a longer run every so many-th step is drawn, the last one always."""
CURVES = (
    ("loss", "loss", "loss"),
    ("log_ratio", "gap to the teacher now", "nats per token"),
    ("entropy", "entropy of the student", "nats"),
    ("ess", "effective sample size", "share of the tokens"),
    ("overlap", "overlap with the student at rollout", "squared coefficient"),
    ("chi2", "chi-square from who sampled", "per token"),
    ("log_ratio_lost", "nats lost since the rollout", "nats per token"),
    ("w_mean", "mean ratio w", "now / at rollout"),
    ("grad_norm", "gradient norm", "norm"),
    ("lr", "learning rate", "learning rate"),
    ("held_out", "held-out loss", "loss"),
    ("avg_at_k", "accuracy while training", "avg@k"),
    ("tokens_per_second", "speed", "tokens per second"),
)
"""(column of metrics.csv, title, axis)."""
LIMITS = {"overlap": "min_overlap", "chi2": "max_chi2", "log_ratio_lost": "max_log_ratio"}
"""Column to the setting of `staleness` that limits it."""


@dataclass(frozen=True, slots=True)
class ReportSettings:
    """What a report holds."""

    rollouts: int = 1_000
    """Most rollouts in the viewer."""
    tokens: int = 400_000
    """Most response tokens in the viewer; the size of the file follows them."""
    top_k: int = 8
    """Entries of each signal at a position."""
    longest: int = 50_000
    """Longest response that the viewer holds; of a longer one its beginning."""
    check: bool = True
    """Whether `lightopd verify` runs over the cache first."""


def write_report(opened: OpenedCache, out: Path | None = None, **settings: Any) -> Path:
    """Write the report and return its path.

    Args:
        opened: the cache, with its runs.
        out: the file; None is `report.html` beside the cache, here for one at a URL.
        settings: fields of `ReportSettings`.

    Raises:
        ConfigError: a setting is unknown, or the charts' packages are not installed.
        OutputError: the file cannot be written.
    """
    known = ReportSettings.__dataclass_fields__
    for name in settings:
        if name not in known:
            raise ConfigError(f"a report has no setting {name!r}; it has: {', '.join(known)}")
    altair()
    beside = Path() if opened.url else opened.path.parent
    path = beside / "report.html" if out is None else out
    page = report_page(opened, replace(ReportSettings(), **settings))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, page.encode("utf-8", "replace"))
    return path


def report_page(opened: OpenedCache, settings: ReportSettings) -> str:
    """The whole HTML text."""
    cache, runs = opened.cache, opened.runs
    chosen = choose(opened, cache, settings.rollouts, settings.tokens)
    data = pack(opened, cache, chosen, settings.top_k, settings.longest)
    findings = [str(finding) for finding in verify(opened.path)] if settings.check else None
    groups = [chart_group(anchor, opened, cache, runs) for anchor in GROUPS]
    return render(page_facts(opened, cache, runs, chosen, findings, groups), data)


def chart_group(anchor: str, opened: OpenedCache, cache: Cache, runs: list[TrainedRun]) -> Group:
    """One section of charts, ready for the template: anchor, name, drawings."""
    name, made = GROUPS[anchor]
    return anchor, name, [replace(chart, svg=drawing(chart.svg)) for chart in made(opened, cache, runs)]


def page_facts(
    opened: OpenedCache,
    cache: Cache,
    runs: list[TrainedRun],
    chosen: Chosen,
    findings: list[str] | None,
    groups: Sequence[Group],
) -> dict[str, Any]:
    """What the template names, but for the rollouts themselves."""
    columns, rows = _side_by_side(runs)
    anchors = [(anchor, name) for anchor, name, charts in groups if charts]
    if rows:
        anchors.append(("runs", "Runs"))
    return {
        "title": opened.url or str(opened.path),
        "subtitle": f"{cache.num_rollouts:,} rollouts, {cache.num_tokens:,} response tokens, "
        f"signals: {', '.join(cache.signals) or 'none'}",
        "sections": [("summary", "Summary"), *anchors, ("rollouts", "Rollouts")],
        "tiles": [*facts.tiles(opened, cache), *_accuracy_tiles(opened, runs)],
        "consistency": facts.consistency(cache),
        "notes": facts.notes(opened, cache, runs),
        "lineage": facts.lineage(cache, runs),
        "findings": findings,
        "groups": groups,
        "run_columns": columns,
        "run_rows": rows,
        "chosen": chosen.sentence,
        "clip": _clip(runs),
        "texts_missing": opened.texts.missing,
        "version": __version__,
        "pager": None,
    }


def _accuracy_tiles(opened: OpenedCache, runs: list[TrainedRun]) -> list[facts.Tile]:
    found: dict[str, dict[str, facts.Evaluation]] = {}
    for evaluation in facts.evaluations(opened, runs):
        found.setdefault(evaluation.run, {})[evaluation.name] = evaluation
    return [
        facts.Tile(
            f"accuracy of {run}",
            f"{of['before'].accuracy:.3f} \u2192 {of['after'].accuracy:.3f}",
            "before and after" + (f", teacher {of['teacher'].accuracy:.3f}" if "teacher" in of else ""),
        )
        for run, of in found.items()
        if "before" in of and "after" in of
    ]


def _distribution_charts(opened: OpenedCache, cache: Cache, runs: list[TrainedRun]) -> list[Chart]:
    drawn = [
        (
            "Response lengths",
            distributions.lengths,
            "response tokens",
            "by finish reason",
            "finish_reason",
            "rollouts",
        ),
        ("Gap", distributions.gaps, "student minus signal, nats", "trained tokens", "series", "tokens"),
        (
            "Entropy of the student",
            distributions.entropies,
            "nats",
            "at rollout, trained tokens",
            "series",
            "tokens",
        ),
        (
            "Mass outside the top-k",
            distributions.masses,
            "log10 of the probability",
            "trained tokens",
            "series",
            "tokens",
        ),
        ("Rewards", distributions.rewards, "reward", "", "series", "rollouts"),
    ]
    charts = []
    for title, read, x, caption, by, count in drawn:
        rows = read(opened)
        if rows:
            charts.append(histogram(title, rows, x, caption, by, count))
    k = min([OVERLAP_K, *(signal.manifest.top_k for signal in cache.signals.values())])
    overlap = distributions.overlaps(opened, k) if len(cache.signals) > 1 and k else []
    if overlap:
        rows = [{**row, "from": row["shared"] - 0.5, "to": row["shared"] + 0.5} for row in overlap]
        caption = f"of the {k} most likely tokens of each at a position"
        charts.append(
            histogram("Overlap of two top-k", rows, "tokens that both hold", caption, count="positions")
        )
    return charts


def _position_charts(opened: OpenedCache, cache: Cache, runs: list[TrainedRun]) -> list[Chart]:
    rows = distributions.by_position(opened)
    titles = {"gap": "Gap by position", "entropy": "Entropy of the student by position"}
    caption = "quartiles, median (line) and mean (dashed)"
    return [
        bands(title, own, "nats", caption)
        for measure, title in titles.items()
        if (own := [row for row in rows if row["measure"] == measure])
    ]


def _training_charts(opened: OpenedCache, cache: Cache, runs: list[TrainedRun]) -> list[Chart]:
    charts = []
    for column, title, axis in CURVES:
        rows = [row for run in runs for row in _curve(run, column)]
        if rows:
            limits = {
                f"{run.name} limit" if len(runs) > 1 else "limit": run.limits[LIMITS[column]]
                for run in runs
                if column in LIMITS and LIMITS[column] in run.limits
            }
            if len(set(limits.values())) == 1:
                limits = {"limit": next(iter(limits.values()))}
            charts.append(curves(title[0].upper() + title[1:], rows, axis, limits))
    return charts


def _curve(run: TrainedRun, column: str) -> Iterator[dict[str, Any]]:
    lines = [line for line in run.metrics if math.isfinite(line.get(column, math.nan))]
    every = max(1, math.ceil(len(lines) / STEPS_DRAWN))
    sign = -1 if column == "log_ratio" else 1
    for place, line in enumerate(lines):
        if place % every == 0 or place == len(lines) - 1:
            yield {"run": run.name, "step": int(line["step"]), "value": sign * line[column]}


def _cost_charts(opened: OpenedCache, cache: Cache, runs: list[TrainedRun]) -> list[Chart]:
    rows = facts.costs(opened, cache, runs)
    total = sum(row["seconds"] for row in rows)
    return (
        [bars("Seconds by stage", rows, "stage", "seconds", "seconds", f"{total:,.0f} s in all")]
        if rows
        else []
    )


def _evaluation_charts(opened: OpenedCache, cache: Cache, runs: list[TrainedRun]) -> list[Chart]:
    rows = [
        {
            "run": found.run,
            "name": found.name,
            "accuracy": found.accuracy,
            "low": found.accuracy - (found.error or 0),
            "high": found.accuracy + (found.error or 0),
        }
        for found in facts.evaluations(opened, runs)
    ]
    return [accuracies("Held-out accuracy", rows, "with one standard error")] if rows else []


def _side_by_side(runs: list[TrainedRun]) -> tuple[list[str], list[list[str]]]:
    """The last step of every run, a row each, and when it went stale."""
    if not runs:
        return [], []
    wanted = ("step", *(column for column, _, _ in CURVES))
    there = [name for name in wanted if any(name in line for run in runs for line in run.metrics[-1:])]
    rows = []
    for run in runs:
        last = run.metrics[-1] if run.metrics else {}
        stale = next((int(line["step"]) for line in run.metrics if line.get("stale")), None)
        state = "finished" if run.is_finished else "running or stopped"
        values = [f"{last[name]:.4g}" if name in last else "-" for name in there]
        rows.append([run.name, state, *values, "never" if stale is None else f"step {stale}"])
    return ["run", "state", *there, "stale"], rows


def _clip(runs: list[TrainedRun]) -> float:
    """Where the runs' objective clips its advantage; 10 nats where it does not say."""
    for run in runs:
        for term in (run.settings.get("objective") or {}).get("terms", ()):
            clip = (term.get("target") or {}).get("clip")
            if isinstance(clip, int | float):
                return float(clip)
    return 10.0


Made = Callable[[OpenedCache, Cache, list[TrainedRun]], list[Chart]]

GROUPS: dict[str, tuple[str, Made]] = {
    "evaluation": ("Evaluation", _evaluation_charts),
    "distributions": ("Distributions", _distribution_charts),
    "positions": ("By position", _position_charts),
    "training": ("Training", _training_charts),
    "cost": ("Cost", _cost_charts),
}
"""By anchor, the name and the maker of each section of charts."""
