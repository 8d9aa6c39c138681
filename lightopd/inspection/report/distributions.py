"""Histograms and quartiles of a cache, counted by DuckDB: a few hundred numbers for any cache."""

from collections.abc import Callable
from typing import Any

from lightopd.inspection.opened import OpenedCache

BINS = 40

Records = list[dict[str, Any]]


def lengths(opened: OpenedCache) -> Records:
    """Rollouts by length and finish reason: from, to, finish_reason, count."""
    return opened.sql(
        """
        WITH ends AS (SELECT max(response_tokens) AS most FROM rollouts),
             wide AS (SELECT greatest(1, ceil((most + 1) / $bins))::BIGINT AS width FROM ends)
        SELECT response_tokens // width * width AS "from", (response_tokens // width + 1) * width AS "to",
               finish_reason, count(*) AS count
        FROM rollouts, wide GROUP BY ALL ORDER BY ALL
        """,
        bins=BINS,
    ).rows()


def rewards(opened: OpenedCache) -> Records:
    """Rollouts by reward: from, to, count."""
    return opened.sql(
        _histogram("SELECT reward::DOUBLE AS value, 'reward' AS series FROM rollouts"), bins=BINS
    ).rows()


def gaps(opened: OpenedCache) -> Records:
    """Trained tokens by gap, the farthest half percent at each side taken into the last bins."""
    values = "SELECT gap::DOUBLE AS value, signal AS series FROM tokens WHERE loss_mask AND gap IS NOT NULL"
    return opened.sql(_histogram(values, clipped=True), bins=BINS).rows()


def entropies(opened: OpenedCache) -> Records:
    """Trained tokens by the student's entropy at rollout."""
    values = (
        "SELECT entropy_student::DOUBLE AS value, 'student' AS series FROM tokens "
        "WHERE loss_mask AND signal IS NOT DISTINCT FROM (SELECT min(signal) FROM tokens)"
    )
    return opened.sql(_histogram(values, clipped=True), bins=BINS).rows()


def masses(opened: OpenedCache) -> Records:
    """Trained tokens by log10 of the probability outside the stored top-k; nothing outside counts as -8."""
    values = (
        "SELECT greatest(-8, logprob_tail::DOUBLE / ln(10)) AS value, signal AS series FROM tokens "
        "WHERE loss_mask AND logprob_tail IS NOT NULL"
    )
    return opened.sql(_histogram(values), bins=BINS).rows()


def overlaps(opened: OpenedCache, k: int) -> Records:
    """Positions by how many of their k most likely tokens two signals share: series, shared, count."""
    return opened.sql(
        """
        WITH entries AS (SELECT * FROM topk WHERE rank <= $k),
             places AS (SELECT DISTINCT rollout_id, pos, signal FROM entries),
             pairs AS (
                SELECT a.rollout_id, a.pos, a.signal AS one, b.signal AS other FROM places AS a
                JOIN places AS b ON a.rollout_id = b.rollout_id AND a.pos = b.pos AND a.signal < b.signal
             ),
             common AS (
                SELECT a.rollout_id, a.pos, a.signal AS one, b.signal AS other, count(*) AS shared
                FROM entries AS a JOIN entries AS b USING (rollout_id, pos, token_id)
                WHERE a.signal < b.signal GROUP BY ALL
             )
        SELECT p.one || ' and ' || p.other AS series, coalesce(c.shared, 0) AS shared, count(*) AS count
        FROM pairs AS p LEFT JOIN common AS c
            ON c.rollout_id = p.rollout_id AND c.pos = p.pos AND c.one = p.one AND c.other = p.other
        GROUP BY ALL ORDER BY ALL
        """,
        k=k,
    ).rows()


def by_position(opened: OpenedCache) -> Records:
    """Quartiles of gap and entropy by place in the response: measure, series, pos, low, middle, high."""
    return opened.sql(
        """
        WITH ends AS (SELECT greatest(1, ceil((max(pos) + 1) / 60))::BIGINT AS width FROM tokens),
             binned AS (
                SELECT pos // width * width AS pos, signal, gap::DOUBLE AS gap,
                       entropy_student::DOUBLE AS entropy
                FROM tokens, ends WHERE loss_mask
             ),
             long AS (
                SELECT 'gap' AS measure, signal AS series, pos, gap AS value FROM binned WHERE gap IS NOT NULL
                UNION ALL
                SELECT 'entropy', 'student', pos, entropy FROM binned
                WHERE entropy IS NOT NULL AND signal IS NOT DISTINCT FROM (SELECT min(signal) FROM binned)
             )
        SELECT measure, series, pos, quantile_cont(value, 0.25) AS low, quantile_cont(value, 0.5) AS middle,
               quantile_cont(value, 0.75) AS high, avg(value) AS mean, count(*) AS tokens
        FROM long GROUP BY ALL ORDER BY ALL
        """
    ).rows()


def _histogram(values: str, clipped: bool = False) -> str:
    """SQL that counts `value` of each `series` in equal bins: series, from, to, count."""
    ends = "quantile_cont(value, 0.005) AS low, quantile_cont(value, 0.995) AS high"
    limits = ends if clipped else "min(value) AS low, max(value) AS high"
    return f"""
        WITH given AS ({values}),
             ends AS (SELECT {limits} FROM given WHERE isfinite(value)),
             wide AS (SELECT low, high, greatest((high - low) / $bins, 1e-9) AS width FROM ends),
             binned AS (
                SELECT series, least($bins - 1, greatest(0, floor((value - low) / width))) AS bin, low, width
                FROM given, wide WHERE isfinite(value)
             )
        SELECT series, low + bin * width AS "from", low + (bin + 1) * width AS "to", count(*) AS count
        FROM binned GROUP BY ALL ORDER BY ALL
    """


DISTRIBUTIONS: dict[str, Callable[[OpenedCache], Records]] = {
    "lengths": lengths,
    "gaps": gaps,
    "entropies": entropies,
    "masses": masses,
    "rewards": rewards,
}
