"""What SQL and the index may write, and that a finished stage does not fail for its index."""

import signal
import threading
import time

import duckdb
import pytest
from cache_cases import make_cache

from lightopd.cache.index import INDEX, build_index, query, refresh_index
from lightopd.cache.store import open_cache
from lightopd.cache.verify import verify


@pytest.mark.parametrize("inside", ["rollouts/part-00000.parquet", "new.csv", "../c/rollouts/x.csv"])
def test_a_result_is_never_written_into_the_cache(tmp_path, lightopd, inside):
    make_cache(tmp_path / "c")
    out = tmp_path / "c" / inside
    command = ["sql", tmp_path / "c", "select 1 as x", "--format", "csv", "--force", "--out", out]
    code, _, err = lightopd(*command)
    assert code == 7
    assert "lies inside the cache" in err
    assert verify(tmp_path / "c") == []


def test_a_file_that_is_there_is_replaced_with_force_only(tmp_path, lightopd):
    make_cache(tmp_path / "c")
    out = tmp_path / "x.csv"
    out.write_text("mine")
    command = ["sql", tmp_path / "c", "select 1 as x", "--format", "csv", "--out", out]
    code, _, err = lightopd(*command)
    assert (code, out.read_text()) == (7, "mine")
    assert "--force" in err
    assert lightopd(*command, "--force")[0] == 0
    assert out.read_text().split() == ['"x"', "1"]


def test_an_interrupt_ends_a_query_within_seconds(tmp_path):
    make_cache(tmp_path)
    long = "select count(*) from range(1000000) a, range(1000000) b where a.range * b.range % 7 = 3"
    threading.Timer(0.5, signal.raise_signal, [signal.SIGINT]).start()
    started_s = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        query(tmp_path, long)
    assert time.monotonic() - started_s < 5


def test_a_finished_stage_does_not_fail_for_its_index(tmp_path, caplog, monkeypatch):
    cache, *_ = make_cache(tmp_path)

    def lost(_):
        raise duckdb.IOException("another process holds it")

    monkeypatch.setattr("lightopd.cache.index.build_index", lost)
    refresh_index(cache)
    assert "another process holds it; `lightopd index" in caplog.text


def test_two_builders_of_an_index_do_not_disturb_each_other(tmp_path):
    make_cache(tmp_path)
    (tmp_path / f".{INDEX}.1.tmp").write_bytes(b"another process is writing this")
    build_index(open_cache(tmp_path))
    assert (tmp_path / f".{INDEX}.1.tmp").exists()


def _build_while(timer, cache):
    timer.start()
    build_index(cache)
    timer.join()
    time.sleep(1)


def test_ctrl_c_while_an_index_is_built_is_ctrl_c_and_leaves_nothing(tmp_path):
    cache, *_ = make_cache(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    started_s = time.monotonic()
    build_index(cache)
    whole_s = time.monotonic() - started_s
    for share in range(8):
        (tmp_path / INDEX).unlink(missing_ok=True)
        timer = threading.Timer(whole_s * share / 10, signal.raise_signal, [signal.SIGINT])
        with pytest.raises(KeyboardInterrupt):
            _build_while(timer, cache)
        assert sorted({*tmp_path.rglob("*")} - {tmp_path / INDEX}) == before


def test_index_and_import_hold_the_folder(tmp_path, lightopd):
    from lightopd.pipelines.shared.run_folder import writing

    make_cache(tmp_path / "c")
    with writing(tmp_path / "c"):
        code, _, err = lightopd("index", tmp_path / "c")
    assert code == 7
    assert "another lightopd process is writing here" in err
