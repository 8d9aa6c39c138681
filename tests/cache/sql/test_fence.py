"""The file system of SQL over a cache: shared by threads, closed to the outside."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from cache_cases import make_cache

from lightopd.cache.index import query
from lightopd.cache.sql.fence import ReadOnlyFolder


def test_threads_that_share_a_file_do_not_move_each_others_reads(tmp_path):
    (tmp_path / "numbers").write_bytes(np.arange(100_000, dtype="<u4").tobytes())
    file = ReadOnlyFolder(tmp_path).open("cache://numbers")

    def read_all(start):
        found = []
        for index in range(start, 100_000, 97):
            file.seek(4 * index)
            found.append(int.from_bytes(file.read(4), "little"))
        return found

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(read_all, range(8)))
    file.close()
    assert results == [list(range(start, 100_000, 97)) for start in range(8)]


def test_links_and_dots_that_lead_out_are_refused(tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "secret").write_text("x")
    (tmp_path / "cache" / "link").symlink_to(tmp_path / "secret")
    for path in ("cache://link", "cache://../secret"):
        with pytest.raises(PermissionError):
            ReadOnlyFolder(tmp_path / "cache").open(path)


def test_files_are_never_opened_for_writing(tmp_path):
    with pytest.raises(PermissionError):
        ReadOnlyFolder(tmp_path).open("cache://new", "wb")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts open files by Linux's list of them")
def test_a_query_leaves_no_file_open(tmp_path):
    make_cache(tmp_path)
    before = len([*Path("/proc/self/fd").iterdir()])
    query(tmp_path, "SELECT avg(gap) FROM tokens")
    assert len([*Path("/proc/self/fd").iterdir()]) == before
