"""A claim is its holder's while it is renewed, and anyone's after that, by the clock of whoever looks."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest

from lightopd.cache.claims import claims as module
from lightopd.cache.claims.claims import Claims
from lightopd.cache.claims.holders import this_process
from lightopd.cache.claims.store import FolderStore


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self, start_s=0.0):
        self.now_s = start_s

    def __call__(self):
        return self.now_s


@pytest.fixture
def store(tmp_path):
    return FolderStore(tmp_path / "claims")


def pair(store):
    """Two holders whose clocks have nothing to do with each other; neither renews by itself."""
    clocks = Clock(1e6), Clock(5.0)
    return [Claims(store, 10.0, clock) for clock in clocks], clocks


def test_one_holds_what_the_other_can_have_after_its_release(store):
    (one, other), _ = pair(store)
    assert one.take("part")
    assert one.take("part")
    assert not other.take("part")
    assert (one.holds("part"), other.holds("part")) == (True, False)
    one.release("part")
    assert other.take("part")
    assert (one.holds("part"), other.holds("part")) == (False, True)


def test_a_claim_that_is_renewed_is_never_taken_over(store):
    (one, other), (_, clock) = pair(store)
    one.take("part")
    for _ in range(20):
        assert not other.take("part")
        clock.now_s += 9
        one.renew()


def test_a_claim_that_is_not_renewed_is_taken_over_after_a_lease_of_the_one_who_looks(store, caplog):
    (one, other), (_, clock) = pair(store)
    one.take("part")
    assert not other.take("part")
    clock.now_s += 9.9
    assert not other.take("part")
    clock.now_s += 0.2
    assert other.take("part")
    assert other.holds("part")
    assert not one.holds("part")
    one.renew()
    assert "another process took it over" in caplog.text
    one.release("part")
    assert other.holds("part")


def test_of_two_who_see_it_end_one_gets_it(store):
    (one, second), (_, clock) = pair(store)
    third = Claims(store, 10.0, clock)
    one.take("part")
    for each in (second, third):
        assert not each.take("part")
    clock.now_s += 11
    assert [second.take("part"), third.take("part")] == [True, False]


def test_the_lease_is_the_one_its_holder_gave(store):
    (one, _), _ = pair(store)
    clock = Clock()
    hasty = Claims(store, 0.5, clock)
    one.take("part")
    assert not hasty.take("part")
    clock.now_s = 9.0
    assert not hasty.take("part")
    clock.now_s = 10.5
    assert hasty.take("part")


def test_of_a_process_that_ended_on_this_machine_nothing_is_awaited(store):
    code = (
        "import sys, pathlib\n"
        "from lightopd.cache.claims.claims import Claims\n"
        "from lightopd.cache.claims.store import FolderStore\n"
        "assert Claims(FolderStore(pathlib.Path(sys.argv[1])), 3600.0).take('part')\n"
    )
    subprocess.run([sys.executable, "-c", code, str(store.folder)], check=True)
    assert Claims(store, 10.0, Clock()).take("part")


def test_a_process_of_another_machine_is_not_taken_for_gone():
    here = this_process()
    assert not here.is_gone()
    assert replace(here, started="1").is_gone()
    assert not replace(here, started="1", machine="another").is_gone()
    assert not replace(here, started="1", machine="").is_gone()


@pytest.mark.parametrize("content", [b"torn", b"[]", b"{}", json.dumps({"lease_s": 1}).encode()])
def test_a_claim_that_cannot_be_read_ends_as_others_do(store, content):
    clock = Clock()
    claims = Claims(store, 10.0, clock)
    store.put_if_absent("part", content)
    assert not claims.take("part")
    clock.now_s = 10.1
    assert claims.take("part")


def test_a_thread_renews_while_its_holder_works(store):
    with Claims(store, 0.2) as claims:
        claims.take("part")
        first = store.read("part")
        for _ in range(200):
            if store.read("part") != first:
                break
            module.time.sleep(0.02)
        assert store.read("part") != first
        assert claims.holds("part")
    assert store.read("part") is None


def test_a_disk_that_fails_for_a_while_does_not_end_a_claim(store, monkeypatch, caplog):
    (one, _), _ = pair(store)
    one.take("part")
    replace_if_unchanged = store.replace_if_unchanged

    def failing(key, old, new):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(store, "replace_if_unchanged", failing)
    one.renew()
    assert "could not be renewed" in caplog.text
    monkeypatch.setattr(store, "replace_if_unchanged", replace_if_unchanged)
    one.renew()
    assert one.holds("part")


def test_a_disk_that_fails_when_a_claim_was_lost_ends_no_other_claim(store, monkeypatch, caplog):
    (one, other), (_, clock) = pair(store)
    one.take("lost")
    other.take("lost")
    clock.now_s += 11
    assert other.take("lost")

    def failing(key):
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(store, "read", failing)
        one.renew()
    one.renew()
    assert "could not be renewed" in caplog.text
    assert "another process took it over" in caplog.text


def test_a_living_holder_is_named_and_a_silent_one_is_not(store):
    with Claims(store, 4.0) as claims:
        claims.take("part")
        assert "process " in Claims(store, 4.0).living_holder()
        assert claims.other_holder() is None
        assert "process " in Claims(store, 4.0).other_holder()
    silent = Claims(store, 0.4)
    silent.take("part")
    assert Claims(store, 0.4).living_holder() is None
