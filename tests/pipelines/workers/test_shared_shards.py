"""Several processes on one cache make what one makes, each shard once, whoever dies or sleeps."""

import json
import shutil
import signal

import pytest
from crowd import crowd, until

from lightopd.cache.buckets.stores.bucket import Bucket
from lightopd.cache.claims.claims import Claims
from lightopd.cache.claims.exclusive import EXCLUSIVE, exclusively
from lightopd.cache.claims.store import BucketStore, FolderStore
from lightopd.pipelines.workers.shared_shards import CLAIMS

pytestmark = pytest.mark.slow

NUM_SHARDS = 12
HASTY = ["--set", "sharing.lease_s=1.0"]
PATIENT_S = 8.0
"""Of a lease whose holder is seen to live on a busy machine too."""


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    with crowd(tmp_path_factory.mktemp("crowd")) as start:
        yield start


@pytest.fixture(scope="module")
def alone(start, world, tmp_path_factory):
    """A cache of 12 shards and its signal, each made by one process."""
    cache = tmp_path_factory.mktemp("alone") / "cache"
    for arguments in (rollout(world, cache), precompute(world, cache)):
        code, err = start(*arguments).wait()
        assert code == 0, err
    return cache


def rollout(world, cache):
    asked = ["--student", world.sft / "student", "--prompts", world.root / "prompts.jsonl", "--n", 2]
    sets = ["sampling.max_tokens=10", "shard_rollouts=2"]
    return ["rollout", *asked, "--cache", cache, *(word for each in sets for word in ("--set", each))]


def precompute(world, cache):
    return ["precompute", "--cache", cache, "--teacher", world.teacher, "--top-k", 4]


def content(folder):
    """What a cache holds, without what tells of time."""
    clocked = ("journal.jsonl", "index.duckdb", ".lightopd.lock")
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in clocked and not path.name.endswith((".report.json", ".yaml"))
    }


def made(journal):
    """Shards that each process made, by its own last record; who came when all was made has none."""
    records = [json.loads(line) for line in journal.read_text().splitlines()]
    return {record["pid"]: record["made"] for record in records}


def wait_until_each_holds_a_shard(commands):
    """Of commands that sleep then: from here on they all work at once."""
    for command in commands:
        command.wait_asleep()
    for command in commands:
        command.send(signal.SIGCONT)


def copied(alone, path):
    shutil.copytree(alone, path)
    shutil.rmtree(path / "signals")
    return path


def markers(folder):
    return len(list(folder.glob("part-*.json")))


def test_four_rollouts_at_once_make_the_cache_of_one(start, world, alone, tmp_path):
    wanted = {name: data for name, data in content(alone).items() if not name.startswith("signals")}
    cache = tmp_path / "cache"
    commands = [start(*rollout(world, cache), sleeps_at=0) for _ in range(4)]
    wait_until_each_holds_a_shard(commands)
    for command in commands:
        code, err = command.wait()
        assert code == 0, err
    assert content(cache) == wanted
    shares = made(cache / "journal.jsonl")
    assert shares.keys() == {command.pid for command in commands}
    assert min(shares.values()) >= 1
    assert sum(shares.values()) == NUM_SHARDS
    assert not (cache / ".lightopd.claims").exists()


def test_three_teachers_at_once_make_the_signal_of_one(start, world, alone, tmp_path):
    cache = copied(alone, tmp_path / "cache")
    commands = [start(*precompute(world, cache), sleeps_at=0) for _ in range(3)]
    wait_until_each_holds_a_shard(commands)
    for command in commands:
        code, err = command.wait()
        assert code == 0, err
    assert content(cache) == content(alone)
    shares = made(cache / "signals/teacher/journal.jsonl")
    assert shares.keys() == {command.pid for command in commands}
    assert min(shares.values()) >= 1
    assert sum(shares.values()) == NUM_SHARDS
    code, err = start("verify", cache).wait()
    assert code == 0, err


def test_at_a_url_three_machines_make_what_one_makes_though_one_is_killed(start, world, alone, tmp_path):
    """Each has a mirror of its own; what is at the URL in the end is the cache of one, and nothing else."""
    url, bucket = f"file://{tmp_path}/bucket", tmp_path / "bucket"
    for arguments in (rollout(world, url), precompute(world, url)):
        users = [tmp_path / f"user-{number}" for number in range(3)]
        # All sleep in their first shard, but one in its second, when it may be putting its first.
        commands = [start(*arguments, user=user, sleeps_at=int(user == users[0])) for user in users]
        for command in commands:
            command.wait_asleep()
        commands[0].send(signal.SIGKILL)
        assert commands[0].wait()[0] == -signal.SIGKILL
        for command in commands[1:]:
            command.send(signal.SIGCONT)
        for command in commands[1:]:
            code, err = command.wait()
            assert code == 0, err
    Bucket(url, is_made=True)  # as the next writer does, which removes what the killed ones were putting
    assert content(bucket) == content(alone)
    code, err = start("verify", url, user=tmp_path / "user-3").wait()
    assert code == 0, err


def test_at_a_url_exclusive_refuses_where_others_write_and_others_refuse_its(start, world, alone, tmp_path):
    """Of a machine that is at work, and then of one that gives no sign of life any more."""
    url, user, shares = f"file://{tmp_path}/bucket", tmp_path / "user", [[], ["--exclusive"]]
    claims = BucketStore(Bucket(url, is_made=True), CLAIMS)
    command = ["precompute", "--rollouts", alone, *precompute(world, url)[1:]]
    patient = [*command, "--set", f"sharing.lease_s={PATIENT_S}"]
    with Claims(claims, PATIENT_S) as other:
        other.take("rollouts/part-00003")
        code, err = start(*patient, "--exclusive", user=user).wait()
        assert (code, f"{url}: process " in err, "is writing here" in err) == (7, True, True), err
    with exclusively(claims, PATIENT_S, url):
        for more in shares:
            code, err = start(*patient, *more, user=user).wait()
            assert (code, f"{url}: process " in err, "is writing here" in err) == (7, True, True), err
    for more in shares:
        shutil.rmtree(tmp_path / "bucket")
        Claims(claims, 1.0).take(EXCLUSIVE)
        code, err = start(*command, *HASTY, *more, user=user).wait()
        assert code == 0, err
        found = {
            name: data for name, data in content(tmp_path / "bucket").items() if ".lightopd." not in name
        }
        assert found == content(alone)


def test_what_a_killed_process_held_others_make(start, world, alone, tmp_path):
    cache = copied(alone, tmp_path / "cache")
    folder = cache / "signals/teacher"
    first = start(*precompute(world, cache), sleeps_at=2)
    first.wait_asleep()
    finished = markers(folder)
    others = [start(*precompute(world, cache)) for _ in range(2)]
    until(lambda: markers(folder) > finished)
    first.send(signal.SIGKILL)
    assert first.wait()[0] == -signal.SIGKILL
    for command in others:
        code, err = command.wait()
        assert code == 0, err
    assert content(cache) == content(alone)


def test_one_that_sleeps_beyond_its_lease_writes_nothing_when_it_wakes(start, world, alone, tmp_path):
    cache = copied(alone, tmp_path / "cache")
    folder = cache / "signals/teacher"
    sleeper = start(*precompute(world, cache), *HASTY, sleeps_at=2)
    sleeper.wait_asleep()
    assert markers(folder) < NUM_SHARDS
    code, err = start(*precompute(world, cache), *HASTY).wait()
    assert code == 0, err
    assert content(cache) == content(alone)
    written = {path: path.stat().st_mtime_ns for path in folder.glob("part-*")}
    sleeper.send(signal.SIGCONT)
    code, err = sleeper.wait()
    assert code == 0, err
    assert written == {path: path.stat().st_mtime_ns for path in folder.glob("part-*")}
    assert content(cache) == content(alone)
    assert not (cache / ".lightopd.claims").exists()


def test_exclusive_refuses_a_cache_that_others_write_and_others_refuse_its(start, world, alone, tmp_path):
    cache = copied(alone, tmp_path / "cache")
    for first, second in ((["--exclusive"], []), ([], ["--exclusive"]), (["--exclusive"], ["--exclusive"])):
        shutil.rmtree(cache / "signals", ignore_errors=True)
        holder = start(*precompute(world, cache), *first, sleeps_at=1)
        holder.wait_asleep()
        code, err = start(*precompute(world, cache), *second).wait()
        assert (code, "another lightopd process is writing here" in err) == (7, True), err
        holder.send(signal.SIGCONT)
        assert holder.wait()[0] == 0
        assert content(cache) == content(alone)


def test_settings_that_differ_are_refused_while_the_first_still_loads(start, world, alone, tmp_path):
    cache = tmp_path / "cache"
    first = start(*rollout(world, cache))
    until((cache / "lightopd.json").exists)
    first.send(signal.SIGSTOP)
    for shard in (cache / "rollouts").glob("part-*"):
        shard.unlink()
    code, err = start(*rollout(world, cache), "--temperature", 0.5).wait()
    first.send(signal.SIGCONT)
    assert (code, "under other settings (sampling.temperature" in err) == (7, True), err


def test_two_signals_are_scored_into_one_cache_at_once(start, world, alone, tmp_path):
    cache = copied(alone, tmp_path / "cache")
    more = ["--set", "role=reference", "--signal", "second"]
    commands = [start(*precompute(world, cache)), start(*precompute(world, cache), *more)]
    for command in commands:
        code, err = command.wait()
        assert code == 0, err
    assert sorted(path.name for path in (cache / "signals").iterdir()) == ["second", "teacher"]
    assert not (cache / ".lightopd.claims").exists()


def test_ctrl_c_lets_go_of_the_shard_at_once(start, world, alone, tmp_path):
    cache = copied(alone, tmp_path / "cache")
    first = start(*precompute(world, cache), "--set", "sharing.lease_s=3600", sleeps_at=1)
    first.wait_asleep()
    store = FolderStore(cache / CLAIMS, "signals/teacher")
    assert any(map(store.read, store.all_keys()))
    first.send(signal.SIGINT)
    first.send(signal.SIGCONT)
    assert first.wait()[0] == 130
    assert not any(map(store.read, store.all_keys()))
    assert start(*precompute(world, cache)).wait()[0] == 0
    assert content(cache) == content(alone)


def test_a_damaged_shard_is_made_again_by_one_of_two(start, world, alone, tmp_path):
    cache = tmp_path / "cache"
    shutil.copytree(alone, cache)
    file = cache / "signals/teacher/part-00003.parquet"
    file.write_bytes(file.read_bytes()[:-9] + b"123456789")
    commands = [start(*precompute(world, cache)) for _ in range(2)]
    for command in commands:
        code, err = command.wait()
        assert code == 0, err
    assert content(cache) == content(alone)


def test_rollouts_are_copied_by_one_of_two(start, world, alone, tmp_path):
    cache = tmp_path / "cache"
    commands = [start(*precompute(world, cache), "--rollouts", alone) for _ in range(2)]
    for command in commands:
        code, err = command.wait()
        assert code == 0, err
    assert content(cache) == content(alone)
