"""A step's numbers: exact means over the global batch, and the file that keeps them.

`metrics.csv` has one row per step. A resumed run first drops the rows after its checkpoint, so that no step
stands there twice and the file is the same as that of an undisturbed run.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from lightopd.files import output_error, write_atomically
from lightopd.objectives.base.batch import MetricSums
from lightopd.training.measures.metrics_rows import read_metrics as read_metrics
from lightopd.training.measures.metrics_rows import whole_lines
from lightopd.training.student.router_loss import ROUTER_LOSS

Reduce = Callable[[Tensor], Tensor]


def global_sums(sums: Sequence[MetricSums], reduce: Reduce) -> dict[str, tuple[float, float]]:
    """(sum, weight) of every metric over all micro-batches of all ranks, added up in float64.

    Args:
        sums: one dict of (sum, weight) per micro-batch of this rank; every rank has the same names.
        reduce: adds a tensor up over the ranks; called once.
    """
    names = sorted({name for one in sums for name in one})
    totals = [torch.stack([_total(sums, name, side) for side in (0, 1)]) for name in names]
    flat = reduce(torch.stack(totals)).tolist()
    return {name: (total, weight) for name, (total, weight) in zip(names, flat, strict=True)}


def _total(sums: Sequence[MetricSums], name: str, side: int) -> Tensor:
    return torch.stack([one[name][side].detach().double() for one in sums if name in one]).sum()


def append_metrics(path: Path, metrics: Mapping[str, float]) -> None:
    """Add one row, in one write; the first row also writes the header.

    A run may be resumed with a measurement more or less than it began with: what was not measured is NaN.

    Raises:
        OutputError: the file cannot be written.
    """
    try:
        is_new = not path.exists() or path.stat().st_size == 0
        columns = list(metrics) if is_new else _columns_with(path, metrics)
        header = ",".join(columns) + "\n" if is_new else ""
        row = ",".join(repr(metrics.get(name, math.nan)) for name in columns)
        with path.open("a", encoding="utf-8") as file:
            file.write(f"{header}{row}\n")
    except OSError as error:
        raise output_error(error, path) from error


def keep_metrics(path: Path, step: int) -> None:
    """Drop the rows after step `step`, and a row that a killed run left half written."""
    if not path.exists():
        return
    header, *rows = whole_lines(path) or [""]
    kept = [row for row in rows if int(row.split(",", 1)[0]) <= step]
    write_atomically(path, "".join([header, *kept] if kept else []).encode())


def _columns_with(path: Path, names: Iterable[str]) -> list[str]:
    """The file's columns, once those of `names` that it lacks have been added."""
    with path.open(encoding="utf-8") as file:
        columns = file.readline().rstrip("\n").split(",")
    new = [name for name in names if name not in columns]
    if new:
        header, *rows = (line.rstrip("\n") for line in whole_lines(path))
        lines = [",".join([header, *new]), *(",".join([row, *("nan" for _ in new)]) for row in rows)]
        write_atomically(path, "".join(f"{line}\n" for line in lines).encode())
    return columns + new


def metric_mean(name: str, total: float, weight: float) -> float:
    """Mean of a metric; losses are sums already."""
    if name in ("loss", ROUTER_LOSS) or name.endswith("/loss"):
        return total
    return total / weight if weight else float("nan")
