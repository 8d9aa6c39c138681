"""A shard exists whole or not at all, and its bytes depend on its rows only."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from cache_cases import make_rollout

from lightopd.cache.shards import (
    marker_path,
    shard_path,
    valid_shard,
    why_invalid,
    write_shard,
)
from lightopd.cache.tables import rollouts_to_table

FINGERPRINT = "f" * 64


def small_table(seed=0):
    rng = np.random.default_rng(seed)
    return rollouts_to_table([make_rollout(rng, length) for length in (4, 9, 1)])


def write(folder, index=0, table=None, fingerprint=FINGERPRINT, dropped=None):
    return write_shard(
        folder, index, table or small_table(), kind="rollouts", fingerprint=fingerprint, dropped=dropped
    )


def in_another_process(code):
    paths = f"import sys; sys.path[:0] = [sys.argv[1], *{sys.path!r}]"
    imports = f"{paths}; from pathlib import Path; import test_shards as t"
    return [sys.executable, "-c", f"{imports}\n{code}", str(Path(__file__).parent)]


def test_a_written_shard_is_valid_and_its_marker_tells_rows_tokens_and_dropped(tmp_path):
    marker = write(tmp_path, dropped={"prompt longer than the context": 2})
    assert (marker.rows, marker.tokens) == (3, 14)
    assert marker.dropped == {"prompt longer than the context": 2}
    assert marker.size_bytes == shard_path(tmp_path, 0).stat().st_size
    assert valid_shard(tmp_path, 0, FINGERPRINT) == marker
    assert sorted(path.name for path in tmp_path.iterdir()) == ["part-00000.json", "part-00000.parquet"]


def test_equal_tables_give_equal_bytes_in_another_process_too(tmp_path):
    write(tmp_path / "a")
    subprocess.run([*in_another_process("t.write(Path(sys.argv[2]))"), str(tmp_path / "b")], check=True)
    for name in ("part-00000.parquet", "part-00000.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_bytes_do_not_depend_on_how_the_table_is_chunked(tmp_path):
    table = small_table()
    pieces = [table.slice(0, 1), table.slice(1)]
    write(tmp_path / "a", table=table)
    write(tmp_path / "b", table=type(table).from_batches([b for piece in pieces for b in piece.to_batches()]))
    assert shard_path(tmp_path / "a", 0).read_bytes() == shard_path(tmp_path / "b", 0).read_bytes()


def test_every_file_says_what_it_is(tmp_path):
    write(tmp_path)
    metadata = pq.read_schema(shard_path(tmp_path, 0)).metadata
    assert metadata[b"lightopd.schema_version"] == b"3"
    assert metadata[b"lightopd.kind"] == b"rollouts"
    assert metadata[b"lightopd.fingerprint"] == FINGERPRINT.encode()


def test_any_flipped_byte_makes_a_shard_invalid(tmp_path):
    write(tmp_path)
    path = shard_path(tmp_path, 0)
    content = path.read_bytes()
    for place in range(0, len(content), 97):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        assert valid_shard(tmp_path, 0, FINGERPRINT) is None
    assert "SHA-256" in why_invalid(tmp_path, 0, FINGERPRINT)


def test_a_truncated_shard_is_invalid_and_the_reason_has_both_sizes(tmp_path):
    marker = write(tmp_path)
    path = shard_path(tmp_path, 0)
    path.write_bytes(path.read_bytes()[:-10])
    reason = why_invalid(tmp_path, 0, FINGERPRINT)
    assert str(marker.size_bytes) in reason
    assert str(marker.size_bytes - 10) in reason


def test_a_shard_without_marker_without_file_or_of_another_fingerprint_is_invalid(tmp_path):
    assert "marker" in why_invalid(tmp_path, 0, FINGERPRINT)
    write(tmp_path)
    assert "fingerprint" in why_invalid(tmp_path, 0, "e" * 64)
    shard_path(tmp_path, 0).unlink()
    assert "missing" in why_invalid(tmp_path, 0, FINGERPRINT)
    marker_path(tmp_path, 0).write_text("{broken")
    assert "marker" in why_invalid(tmp_path, 0, FINGERPRINT)


def test_what_a_killed_writer_leaves_is_not_a_shard_and_the_next_write_clears_it(tmp_path):
    write(tmp_path / "whole")
    folder = tmp_path / "killed"
    folder.mkdir()
    content = shard_path(tmp_path / "whole", 0).read_bytes()
    (folder / ".part-00000.parquet.tmp").write_bytes(content[:100])
    (folder / ".part-00000.json.tmp").write_text("{")
    shard_path(folder, 0).write_bytes(content)
    assert valid_shard(folder, 0, FINGERPRINT) is None
    assert [path.name for path in folder.glob("*.parquet")] == ["part-00000.parquet"]
    write(folder)
    for path in (tmp_path / "whole").iterdir():
        assert (folder / path.name).read_bytes() == path.read_bytes()
    assert len(list(folder.iterdir())) == 2


def test_after_kill_nine_every_marker_belongs_to_a_whole_shard(tmp_path):
    code = "for index in range(100_000): t.write(Path(sys.argv[2]), index, t.small_table())"
    process = subprocess.Popen([*in_another_process(code), str(tmp_path)])
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("part-*.json"))) < 5:
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.003)
    process.send_signal(signal.SIGKILL)
    process.wait()
    markers = sorted(tmp_path.glob("part-*.json"))
    assert all(valid_shard(tmp_path, index, FINGERPRINT) for index in range(len(markers)))
    parquet = len(list(tmp_path.glob("part-*.parquet")))
    assert parquet - len(markers) in (0, 1)


def test_the_marker_is_plain_json(tmp_path):
    write(tmp_path)
    assert json.loads(marker_path(tmp_path, 0).read_text())["rows"] == 3
