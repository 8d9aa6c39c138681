"""The report of a large cache a page at a time: DuckDB finds the rollouts, drawings are kept."""

import math
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlencode

from lightopd.cache.store import Cache
from lightopd.errors import ConfigError
from lightopd.inspection.opened import OpenedCache
from lightopd.inspection.report.build import GROUPS, Group, chart_group, page_facts
from lightopd.inspection.report.page import render, render_group
from lightopd.inspection.report.rollouts import Chosen, pack
from lightopd.inspection.runs import TrainedRun

ORDERS = {
    "largest gap": "gap DESC NULLS LAST",
    "smallest gap": "gap NULLS LAST",
    "lowest reward": "reward NULLS LAST",
    "highest reward": "reward DESC NULLS LAST",
    "longest": "response_tokens DESC",
    "shortest": "response_tokens",
    "shards": "shard, row_in_shard",
}
FOLLOWING = ("evaluation", "training", "cost")
"""Sections that change while a run trains; the others change with the cache alone."""


@dataclass(frozen=True, slots=True)
class Asked:
    """Which rollouts a page shows."""

    order: str = "largest gap"
    search: str = ""
    page: int = 1


def parse_asked(query: dict[str, str]) -> Asked:
    """What the address asks for.

    Raises:
        ConfigError: an order that there is not, or a page that is no number.
    """
    order, page = query.get("order", Asked().order), query.get("page", "1") or "1"
    if order not in ORDERS:
        raise ConfigError(f"no order {order!r}; there are: {', '.join(ORDERS)}")
    if not page.isdecimal() or not 0 < int(page) < 10**9:
        raise ConfigError(f"page {page!r} is no page number; the first is 1")
    return Asked(order, query.get("search", "")[:1_000], int(page))


class Pages:
    """The pages of one cache and its runs; not for several threads at once."""

    def __init__(self, opened: OpenedCache, rollouts: int, every_s: float) -> None:
        self.opened, self.rollouts, self.every_s = opened, rollouts, every_s
        self._drawn: dict[str, tuple[object, Group]] = {}

    def page(self, asked: Asked) -> str:
        """The whole page for some rollouts."""
        cache, runs = self.opened.cache, self.opened.runs
        count, ids = self._find(asked)
        pages = max(1, math.ceil(count / self.rollouts))
        sentence = (
            f"Page {asked.page:,} of {pages:,}, {self.rollouts:,} rollouts each; {count:,} rollouts in all."
        )
        groups = [self._group(anchor, cache, runs) for anchor in GROUPS]
        facts = page_facts(self.opened, cache, runs, Chosen(ids, sentence), None, groups)
        facts["pager"] = self._pager(asked, pages)
        return render(facts, pack(self.opened, cache, Chosen(ids, sentence), 8, 50_000), connect="'self'")

    def training(self) -> str:
        """The section of the training charts alone."""
        return render_group(self._group("training", self.opened.cache, self.opened.runs))

    def _find(self, asked: Asked) -> tuple[int, tuple[str, ...]]:
        """How many rollouts the search finds, and the ids of the page."""
        found = self.opened.sql(
            f"""
            WITH gaps AS (SELECT rollout_id, avg(gap) AS gap FROM tokens WHERE loss_mask GROUP BY ALL),
                 found AS (
                    SELECT r.*, g.gap FROM rollouts AS r LEFT JOIN gaps AS g USING (rollout_id)
                    WHERE $search = ''
                        OR contains(lower(coalesce(response_text, decode(response_ids))), lower($search))
                        OR contains(lower(coalesce(prompt_text, decode(prompt_ids))), lower($search))
                 )
            SELECT rollout_id, count(*) OVER () AS count FROM found
            ORDER BY {ORDERS[asked.order]}, rollout_id LIMIT $size OFFSET $skipped
            """,
            search=asked.search,
            size=self.rollouts,
            skipped=(asked.page - 1) * self.rollouts,
        ).rows()
        return found[0]["count"] if found else 0, tuple(row["rollout_id"] for row in found)

    def _pager(self, asked: Asked, pages: int) -> dict[str, Any]:
        def link(page: int) -> str | None:
            query = {"order": asked.order, "search": asked.search, "page": page}
            return f"/?{urlencode(query)}#rollouts" if 1 <= page <= pages else None

        return {
            "search": asked.search,
            "order": asked.order,
            "orders": list(ORDERS),
            "page": asked.page,
            "pages": pages,
            "before": link(asked.page - 1),
            "after": link(asked.page + 1),
            "every_s": self.every_s,
        }

    def _group(self, anchor: str, cache: Cache, runs: list[TrainedRun]) -> Group:
        """A section, drawn again only when what it shows has changed."""
        shards = (len(cache.shards), [(name, len(signal.shards)) for name, signal in cache.signals.items()])
        steps = [(run.name, len(run.metrics), run.is_finished) for run in runs] if anchor in FOLLOWING else []
        state = (shards, steps)
        if anchor not in self._drawn or self._drawn[anchor][0] != state:
            self._drawn[anchor] = state, chart_group(anchor, self.opened, cache, runs)
        return self._drawn[anchor][1]
