"""The whole chain from one run file: sft, rollout, precompute, train, and evaluations around it.

    lightopd run -c run.yaml

What is finished and made under the same settings is not made again; a stage that was stopped goes on.
"""

import time
from collections.abc import Callable
from typing import Any

from lightopd.config import build
from lightopd.pipelines import evaluate, precompute, rollout, sft, train
from lightopd.pipelines.folders import save_config, writing
from lightopd.pipelines.reports import Report, save_report
from lightopd.schemas.run import STAGES, RunConfig

RUNNERS: dict[str, Callable[..., Report]] = {
    "sft": sft.run,
    "rollout": rollout.run,
    "precompute": precompute.run,
    "train": train.run,
    "eval": evaluate.run,
}
"""What runs each stage; one entry for each of `lightopd.schemas.run.STAGES`."""


def run(
    config: RunConfig,
    *,
    dry_run: bool = False,
    told: Callable[[Report], None] = lambda _: None,
    before_training: Callable[[], None] = lambda: None,
) -> Report:
    """Run every stage of the chain in order; `told` hears each stage's report.

    With `dry_run`, only stages whose inputs exist already can say anything; the first one does.
    """
    started_s = time.monotonic()
    if dry_run:
        _, stage, settings = config.chain()[0]
        return RUNNERS[stage](build(STAGES[stage], settings), dry_run=True)
    with writing(config.out):
        save_config(config, "run", config.out, only_first=True)
        reports = {}
        for name, stage, settings in config.chain():
            if stage == "train":
                before_training()
            reports[name] = RUNNERS[stage](build(STAGES[stage], settings))
            told(reports[name])
        report = Report("run", str(config.out), _summary(reports), seconds=time.monotonic() - started_s)
        save_config(config, "run", config.out)
        save_report(report, config.out)
    return report


def _summary(reports: dict[str, Report]) -> dict[str, Any]:
    """Accuracies and divergences before and after, and the seconds of every stage."""
    figures: dict[str, Any] = {}
    for name, report in reports.items():
        figures[f"{name}_seconds"] = round(report.seconds, 2)
        for key in ("avg_at_k", "reverse_kl_nats", "gap_nats"):
            if key in report.figures:
                figures[f"{name}_{key}"] = report.figures[key]
    return figures
