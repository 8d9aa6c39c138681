"""A cache at a URL for one process alone: others are refused, and so is it where others are."""

import pytest

from lightopd.cache.buckets.stores.bucket import Bucket
from lightopd.cache.claims.claims import Claims
from lightopd.cache.claims.exclusive import EXCLUSIVE, exclusively, refuse_exclusive
from lightopd.cache.claims.store import BucketStore
from lightopd.errors import OutputError

LEASE_S = 0.4
PATIENT_S = 4.0
"""Of a lease whose holder is seen to live on a busy machine too."""


@pytest.fixture
def bucket(tmp_path):
    return Bucket(f"file://{tmp_path}/bucket", is_made=True)


@pytest.fixture
def store(bucket):
    """The claims of all parts."""
    return BucketStore(bucket, ".claims")


def test_one_that_shares_and_another_exclusive_one_are_refused_while_it_works(store):
    with exclusively(store, PATIENT_S, "URL"):
        for other in (refuse_exclusive, lambda *given: exclusively(*given).__enter__()):
            with pytest.raises(OutputError, match=r"URL: process \d+ on .* is writing here"):
                other(store, PATIENT_S, "URL")
    refuse_exclusive(store, LEASE_S, "URL")
    assert store.bucket.sizes() == {}


def test_it_is_refused_where_a_process_makes_any_part(store, bucket):
    with Claims(BucketStore(bucket, ".claims/signals/teacher"), PATIENT_S) as claims:
        claims.take("part-00001")
        assert store.all_keys() == ["signals/teacher/part-00001"]
        told = pytest.raises(OutputError, match="leave out --exclusive to share its work")
        with told, exclusively(store, PATIENT_S, "URL"):
            pass
        refuse_exclusive(store, PATIENT_S, "URL")
    with exclusively(store, LEASE_S, "URL"):
        pass


def test_who_comes_as_it_ends_keeps_its_claims(store, monkeypatch):
    other, release = Claims(store, LEASE_S), Claims.release

    def release_to_another(claims, key):
        release(claims, key)
        other.take(EXCLUSIVE)

    monkeypatch.setattr(Claims, "release", release_to_another)
    with exclusively(store, LEASE_S, "URL"):
        pass
    assert other.holds(EXCLUSIVE)


def test_a_claim_that_nobody_renews_stands_in_nobodys_way(store):
    """Of a holder on another machine, which is known to be gone by its silence alone."""
    gone = Claims(store, LEASE_S)
    gone.take(EXCLUSIVE)
    refuse_exclusive(store, LEASE_S, "URL")
    gone.take(EXCLUSIVE)
    with exclusively(store, LEASE_S, "URL"):
        assert not gone.holds(EXCLUSIVE)
