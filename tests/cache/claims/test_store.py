"""Claims in a folder: of several that want one thing, one gets it, and nobody undoes what came later."""

import threading

import pytest

from lightopd.cache.buckets.stores.bucket import Bucket
from lightopd.cache.claims.store import BucketStore, FolderStore
from lightopd.errors import OutputError
from lightopd.files import put_if_absent


@pytest.fixture(params=["folder", "bucket"])
def store(request, tmp_path):
    if request.param == "folder":
        return FolderStore(tmp_path / "claims")
    return BucketStore(Bucket(f"file://{tmp_path}/bucket", is_made=True), "claims")


def test_what_is_put_is_read_until_it_is_deleted(store):
    assert store.read("a") is None
    assert store.put_if_absent("a", b"1")
    assert (store.read("a"), store.all_keys()) == (b"1", ["a"])
    assert not store.put_if_absent("a", b"2")
    assert store.replace_if_unchanged("a", b"1", b"2")
    assert not store.replace_if_unchanged("a", b"1", b"3")
    assert not store.delete_if_unchanged("a", b"1")
    assert store.delete_if_unchanged("a", b"2")
    assert store.read("a") is None
    assert store.put_if_absent("a", b"4")
    assert store.read("a") == b"4"


def test_old_versions_do_not_pile_up(store):
    store.put_if_absent("a", b"0")
    for number in range(20):
        assert store.replace_if_unchanged("a", b"%d" % number, b"%d" % (number + 1))
    assert len(store._versions("a")) == 1


def test_one_that_was_slow_does_not_win_by_a_version_that_is_gone(store):
    """It read version 1, and makes version 2 after others have come to version 4 and removed 2 and 3."""
    store.put_if_absent("a", b"1")
    for old, new in ((b"1", b"2"), (b"2", b"3"), (b"3", b"4")):
        store.replace_if_unchanged("a", old, new)
    assert not store._put("a", 2, b"late")
    assert store.read("a") == b"4"


def test_of_many_at_once_one_puts_and_one_replaces(store):
    for is_replacing in (False, True):
        before, start, won = store.read("a"), threading.Barrier(8), []

        def race(number, before=before, start=start, won=won, is_replacing=is_replacing):
            start.wait()
            content = b"%d, %s" % (number, str(is_replacing).encode())
            put, replace = store.put_if_absent, store.replace_if_unchanged
            if replace("a", before, content) if is_replacing else put("a", content):
                won.append(content)

        threads = [threading.Thread(target=race, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert won == [store.read("a")]


def test_nothing_is_left_after_clearing_and_a_holder_that_did_not_know_changes_nothing(store, tmp_path):
    store.put_if_absent("a", b"1")
    store.clear()
    assert not store.replace_if_unchanged("a", b"1", b"2")
    assert not store.delete_if_unchanged("a", b"1")
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_link_whose_reply_was_lost_counts_as_made(tmp_path, monkeypatch):
    """A network file system repeats a request without a reply, and then finds its own link."""
    from lightopd import files

    link = files.os.link

    def twice(source, target):
        link(source, target)
        link(source, target)

    monkeypatch.setattr(files.os, "link", twice)
    assert put_if_absent(tmp_path / "a", b"1")
    assert (tmp_path / "a").read_bytes() == b"1"
    assert not put_if_absent(tmp_path / "a", b"2")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_file_system_without_hard_links_is_told_with_what_to_do(tmp_path, monkeypatch):
    from lightopd import files

    def refused(source, target):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(files.os, "link", refused)
    with pytest.raises(OutputError, match=r"without hard links.*give --exclusive"):
        put_if_absent(tmp_path / "a", b"1")
    assert list(tmp_path.iterdir()) == []
