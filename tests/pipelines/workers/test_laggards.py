"""A process that sleeps beyond its lease, wherever it falls asleep, leaves what another made meanwhile."""

import numpy as np
import pytest
from cache_cases import make_rollout

from lightopd.cache.claims.claims import Claims
from lightopd.cache.claims.store import FolderStore
from lightopd.cache.shards import shard_path, valid_shard, write_shard
from lightopd.cache.tables import rollouts_to_table
from lightopd.pipelines.workers import shared_shards as module
from lightopd.pipelines.workers.shared_shards import CLAIMS, SharedShards

FINGERPRINT = "f" * 64
LEASE_S = 10.0


def table(seed):
    rng = np.random.default_rng(seed)
    return rollouts_to_table([make_rollout(rng, length) for length in (4, 9)])


class Worker:
    """A process that makes shards of a cache; it renews no claim, and its clock stands still."""

    def __init__(self, cache):
        self.now_s = 0.0
        store = FolderStore(cache / CLAIMS, "rollouts")
        self.claims = Claims(store, LEASE_S, lambda: self.now_s)
        self.shards = SharedShards(cache / "rollouts", "rollouts", store, self.claims, lease_s=0.01)
        self.made, self.told = [], []

    def work(self, seed, fits=lambda _: True):
        """Make shard 0, if it is this worker's to make."""
        for index in self.shards.claimed([0], FINGERPRINT, self.told.append, fits):
            if self.shards.write(index, table(seed), fingerprint=FINGERPRINT) is not None:
                self.made.append(index)

    def take_over(self):
        """Make shard 0 in the place of who holds its claim and gives no sign of life."""
        assert not self.claims.take("part-00000")
        self.now_s += LEASE_S + 1
        self.work(seed=2, fits=lambda _: False)
        assert self.made == [0]


def files_of(folder):
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.glob("part-*")}


@pytest.fixture
def workers(tmp_path):
    return Worker(tmp_path), Worker(tmp_path)


@pytest.mark.parametrize("found", ["nothing", "a damaged shard"])
def test_one_that_slept_over_its_look_at_a_shard_takes_nothing_away(tmp_path, workers, monkeypatch, found):
    (laggard, other), folder, made = workers, tmp_path / "rollouts", []
    if found == "a damaged shard":
        write_shard(folder, 0, table(1), kind="rollouts", fingerprint=FINGERPRINT)
        shard_path(folder, 0).write_bytes(b"damaged")

    def slow(*asked):
        seen = valid_shard(*asked)
        if not made:
            made.append(None)
            other.take_over()
            made[0] = files_of(folder)
        return seen

    monkeypatch.setattr(module, "valid_shard", slow)
    laggard.work(seed=3)
    assert files_of(folder) == made[0]
    assert valid_shard(folder, 0, FINGERPRINT)
    assert laggard.made == []


def test_one_that_slept_over_its_look_at_a_shard_that_does_not_fit_takes_nothing_away(tmp_path, workers):
    (laggard, other), folder, made = workers, tmp_path / "rollouts", []
    write_shard(folder, 0, table(1), kind="rollouts", fingerprint=FINGERPRINT)

    def fits(_):
        if not made:
            other.take_over()
            made.append(files_of(folder))
            return False
        return True

    laggard.work(seed=3, fits=fits)
    assert files_of(folder) == made[0]
    assert valid_shard(folder, 0, FINGERPRINT)
    assert (laggard.made, laggard.told) == ([], [0])
