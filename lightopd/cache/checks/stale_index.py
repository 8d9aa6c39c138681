"""Does `index.duckdb` speak of the files and manifests that are there now?"""

import re
from pathlib import Path
from typing import Any

import duckdb

from lightopd.cache.index import INDEX
from lightopd.cache.sql.views import RAW_LINEAGE, RAW_MANIFESTS, make_views
from lightopd.cache.store import Cache

_SHARDS = re.compile(r"'((?:rollouts|signals|texts)/[^']+\.parquet)'")
_Told = dict[str, list[Any]]


def index_fault(cache: Cache) -> str | None:
    """What is wrong with the index beside a cache, in words; None where there is none, or it is right.

    Args:
        cache: opened with all its signals.

    Raises:
        duckdb.Error: a shard cannot be read.
    """
    path = cache.path / INDEX
    if not path.exists():
        return None
    again = f"build it again: lightopd index {cache.path}"
    try:
        with duckdb.connect(str(path), read_only=True, config=_search(cache.path)) as connection:
            found = _told(connection)
    except (duckdb.Error, UnicodeDecodeError) as error:
        return f"it cannot be read ({str(error).splitlines()[0]}); {again}"
    with duckdb.connect(":memory:", config=_search(cache.path)) as connection:
        make_views(connection, cache, "")
        wanted = _told(connection)
    stale = [part for part in ("shards", "signals") if found[part] != wanted[part]]
    # What an older version's index does not tell is no fault; what it tells must hold.
    if not {*found["lineage"]} <= {*wanted["lineage"]}:
        stale.append("lineage")
    return f"it is stale: {', '.join(stale)} in it and in the cache differ; {again}" if stale else None


def _told(connection: duckdb.DuckDBPyConnection) -> _Told:
    """The shards that an index reads, and its copies of what the manifests say."""
    statements = connection.sql("SELECT sql FROM duckdb_views() WHERE NOT internal").fetchall()
    shards = {name for (statement,) in statements for name in _SHARDS.findall(statement or "")}
    return {
        "shards": sorted(shards),
        "signals": _rows(connection, "raw_manifests", RAW_MANIFESTS.names),
        "lineage": _rows(connection, "raw_lineage", RAW_LINEAGE.names),
    }


def _rows(connection: duckdb.DuckDBPyConnection, table: str, names: list[str]) -> list[Any]:
    columns = ", ".join(f'"{name}"' for name in names)
    return sorted(connection.sql(f"SELECT {columns} FROM {table}").fetchall(), key=repr)


def _search(path: Path) -> dict[str, str | bool | int | float | list[str]]:
    return {"file_search_path": str(path.resolve())}
