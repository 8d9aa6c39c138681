"""A file or a folder that must survive: written, flushed, renamed, and the folder's list of names flushed."""

import errno
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from cache_cases import STUDENT, make_cache
from recording_disk import RecordingDisk
from safetensors import SafetensorError

from lightopd.cache.index import build_index
from lightopd.cache.manifests import rollouts_folder
from lightopd.cache.shards import marker_path, shard_path
from lightopd.errors import OutputError
from lightopd.files import output_error, own_suffix, put_folder, write_atomically
from lightopd.lineage.fingerprint import write_student_lineage
from lightopd.processes import this_machine
from lightopd.schemas.manifest import CACHE_MANIFEST, STUDENT_LINEAGE, SftLineage, StudentLineage


@pytest.fixture
def disk(monkeypatch):
    return RecordingDisk().install(monkeypatch)


@pytest.mark.parametrize("shared", [False, True])
def test_a_file_is_flushed_whole_before_its_name_and_its_name_after(tmp_path, disk, shared):
    write_atomically(tmp_path / "a" / "report.json", b"x" * 100_000, shared=shared)
    disk.check_survives(tmp_path / "a" / "report.json")
    assert [event[0] for event in disk.events] == ["fsync", "rename", "fsync"]
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["report.json"]


def test_a_folder_is_flushed_file_by_file_before_its_name_and_its_name_after(tmp_path, disk):
    part, final = tmp_path / ".step.tmp", tmp_path / "step"
    (part / "inner").mkdir(parents=True)
    (part / "a.txt").write_text("a")
    (part / "inner" / "b.txt").write_text("b")
    put_folder(part, final)
    disk.check_survives(final)


def test_a_folder_replaces_the_one_before_and_leaves_nothing_else(tmp_path):
    final = tmp_path / "student"
    for text in ("one", "two"):
        part = tmp_path / ".student.tmp"
        part.mkdir()
        (part / "weights").write_text(text)
        put_folder(part, final)
        assert [path.name for path in tmp_path.iterdir()] == ["student"]
        assert (final / "weights").read_text() == text


def test_every_file_of_a_cache_survives_and_a_marker_follows_its_shard(tmp_path, disk):
    cache, *_ = make_cache(tmp_path)
    folder = rollouts_folder(cache.path)
    for path in (tmp_path / CACHE_MANIFEST, shard_path(folder, 0), marker_path(folder, 0)):
        disk.check_survives(path)
    named = [event[2] for event in disk.events if event[0] == "rename"]
    assert named.index(shard_path(folder, 1)) < named.index(marker_path(folder, 1))


def test_the_index_is_built_beside_its_place_and_survives(tmp_path, disk):
    cache, *_ = make_cache(tmp_path)
    build_index(cache)
    disk.check_survives(tmp_path / "index.duckdb")


def test_a_students_lineage_survives(tmp_path, disk):
    lineage = StudentLineage(student=STUDENT, base=None, sft=SftLineage(proof="unknown"), made_by="sft")
    write_student_lineage(tmp_path, lineage)
    disk.check_survives(tmp_path / STUDENT_LINEAGE)


def interrupt(*_):
    raise KeyboardInterrupt


def test_an_interrupt_while_writing_leaves_nothing_behind(tmp_path):
    os.mkfifo(tmp_path / ".report.json.tmp")
    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    try:
        with pytest.raises(KeyboardInterrupt):
            write_atomically(tmp_path / "report.json", b"{}")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_an_output_error_and_leaves_nothing_behind(tmp_path):
    (tmp_path / ".report.json.tmp").symlink_to("/dev/full")
    with pytest.raises(
        OutputError, match=r"report.json \(5000 bytes\): No space left.*free space.*bytes are free"
    ):
        write_atomically(tmp_path / "report.json", b"x" * 5000)
    assert list(tmp_path.iterdir()) == []
    assert Path("/dev/full").exists()


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.EPERM])
def test_a_folder_that_cannot_be_written_is_told_with_the_remedy(number, tmp_path):
    error = output_error(OSError(number, os.strerror(number)), tmp_path / "a" / "x.json", 7)
    assert os.strerror(number) in str(error)
    assert "make the folder writable" in str(error)


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_folder_without_write_permission_is_an_output_error(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(OutputError, match="make the folder writable"):
        write_atomically(tmp_path / "x", b"x")


def test_a_file_where_a_folder_is_needed_is_an_output_error(tmp_path):
    (tmp_path / "rollouts").write_text("")
    with pytest.raises(OutputError, match="a file lies where a folder is needed"):
        write_atomically(tmp_path / "rollouts" / "x", b"x")


def test_a_full_disk_is_known_from_the_words_of_a_library_too(tmp_path):
    told = "Error while serializing: I/O error: No space left on device (os error 28)"
    error = output_error(SafetensorError(told), tmp_path / "model.safetensors")
    assert f"cannot write {tmp_path / 'model.safetensors'}: No space left on device; free space" in str(error)


def test_what_killed_processes_left_of_a_shared_file_goes_with_the_next_write(tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    here = own_suffix().removesuffix(f".{os.getpid()}")
    left = [tmp_path / f".a.json{here}.{ended.pid}.tmp{end}" for end in ("", ".wal")]
    others = [
        tmp_path / f".a.json{here}.{os.getppid()}.tmp",
        tmp_path / f".a.json.{socket.gethostname()}.0123456789abcdef.{ended.pid}.tmp",
        tmp_path / f".a.json.elsewhere.{this_machine()}.{ended.pid}.tmp",
    ]
    for path in left + others:
        path.touch()
    write_atomically(tmp_path / "a.json", b"{}", shared=True)
    assert sorted(tmp_path.iterdir()) == sorted([*others, tmp_path / "a.json"])


def test_what_a_container_with_the_same_host_name_is_writing_stays(tmp_path):
    """Another process namespace, in which numbers of processes mean other processes."""
    write = "import sys, lightopd.files as f; open(sys.argv[1] + f.own_suffix() + '.tmp', 'x').close()"
    words = ["unshare", "--pid", "--fork", sys.executable, "-P", "-c", write, str(tmp_path / ".a.json")]
    try:
        done = subprocess.run(words, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("unshare is not installed")
    if "unshare failed" in done.stderr:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr
    (written,) = tmp_path.iterdir()
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    live = written.with_name(written.name.replace(".1.tmp", f".{ended.pid}.tmp"))
    written.rename(live)
    write_atomically(tmp_path / "a.json", b"{}", shared=True)
    assert live.exists()
