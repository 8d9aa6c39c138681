"""The sum of many rounds, as text."""

from collections import Counter


def summary(rows: list[dict]) -> str:
    """Counts of all rounds, and a table of stages and faults: how often each fault came."""
    latest = {row["number"]: row for row in rows}.values()
    hits = Counter(
        (row["stage"], fault)
        for row in latest
        for fault, is_hit in zip(row["faults"], row["hits"], strict=True)
        if is_hit
    )
    stages = list(dict.fromkeys(stage for stage, _ in sorted(hits)))
    faults = list(dict.fromkeys(fault for _, fault in sorted(hits, key=lambda pair: pair[1])))
    lines = [
        f"{len(latest)} rounds, {sum(row['lives'] for row in latest)} processes: "
        f"{sum(hits.values())} faults, {len(latest)} resumes, "
        f"{sum(row['files'] for row in latest)} files and "
        f"{sum(row['bytes'] for row in latest):,} bytes compared, "
        f"{sum(bool(row['findings']) for row in latest)} rounds with findings, "
        f"{sum(row['cpu_s'] for row in latest):.0f} s of a core",
        "",
        "| |" + "|".join(faults) + "|",
        "|---|" + "---|" * len(faults),
        *("|".join(["", stage, *(str(hits[stage, fault]) for fault in faults), ""]) for stage in stages),
    ]
    return "\n".join(lines)
