"""Replicas as actors of a Ray cluster: a real one, of a head and two nodes on this machine."""

import json
import os
import re
import shlex
import shutil
import signal
import sys
from pathlib import Path

import pytest
from crowd import crowd, is_gone, shards_of, stopped_in_the_middle, until

from lightopd.cache.claims.store import FolderStore
from lightopd.pipelines.workers.actor import Job, refusal
from lightopd.pipelines.workers.ray_actors import _lost

pytestmark = pytest.mark.ray

PAGE = Path(__file__).parents[3] / "docs" / "scale.md"
NUM_SHARDS = 12
LEAST = {"object_store_memory": 80 * 1024 * 1024, "include_log_monitor": False}


@pytest.fixture(scope="module")
def cluster():
    """A head that runs no actor, and two nodes of one core."""
    from ray.cluster_utils import Cluster

    on_sigterm = signal.getsignal(signal.SIGTERM)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_worker_niceness", "0")  # 15 else: on a busy machine they would wait for ever
        head = {"num_cpus": 0, "include_dashboard": False, "no_monitor": True, **LEAST}
        found = started(lambda: Cluster(initialize_head=True, head_node_args=head))
        for _ in range(2):
            started(lambda: found.add_node(num_cpus=1, **LEAST))
        yield found
        found.shutdown()
    signal.signal(signal.SIGTERM, on_sigterm)


def started(start):
    """What a call starts; tried again, for Ray gives a node up that a busy machine is slow to start."""
    for _ in range(4):
        try:
            return start()
        except Exception as error:  # noqa: BLE001 - Ray raises just that
            said = error
    raise said


@pytest.fixture(scope="module")
def start(cluster, tmp_path_factory):
    """Starts a command on the cluster."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_ADDRESS", cluster.address)
        with crowd(tmp_path_factory.mktemp("crowd")) as start:
            yield start


@pytest.fixture(scope="module")
def alone(start, world, tmp_path_factory):
    """A cache of 12 shards with its signal, made by one process."""
    cache = tmp_path_factory.mktemp("alone") / "cache"
    asked = ["--student", world.sft / "student", "--prompts", world.root / "prompts.jsonl", "--n", 2]
    sets = ["--set", "sampling.max_tokens=10", "--set", "shard_rollouts=2"]
    for arguments in (["rollout", *asked, *sets, "--cache", cache], scoring(world, cache)):
        code, err = start(*arguments).wait()
        assert code == 0, err
    return cache


def scoring(world, cache, *more):
    return ["precompute", "--cache", cache, "--teacher", world.teacher, "--top-k", 4, *more]


def by_actors(replicas):
    return ["--execution", "ray", "--replicas", replicas, "--set", "sharing.lease_s=3600", "--json"]


def without_signal(cache, path):
    shutil.copytree(cache, path)
    shutil.rmtree(path / "signals")
    return path


def finished(cache):
    """When each shard of the signal was finished, by its marker."""
    markers = sorted((cache / "signals/teacher").glob("part-*.json"))
    return {path.name: path.stat().st_mtime_ns for path in markers}


def made_by_others(cache, killed):
    """Shards that the processes beside a killed one made, by the last line of each in the journal."""
    lines = (cache / "signals/teacher/journal.jsonl").read_text().splitlines()
    made = {record["pid"]: record["made"] for record in map(json.loads, lines)}
    return sum(count for pid, count in made.items() if pid != killed)


def parent_of(pid):
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def test_what_no_node_has_is_refused(cluster, world, alone, tmp_path, lightopd, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    asked = ["precompute", "--cache", without_signal(alone, tmp_path / "cache"), "--teacher", world.teacher]
    code, _, err = lightopd(*asked, "--top-k", 4, "--execution", "ray", "--set", "sharing.cpus=64")
    assert code == 2, err
    assert "each actor wants 64 CPU and 0 GPU of one node" in err
    assert "set sharing.cpus" in err


def test_two_actors_make_the_cache_of_one_process(start, world, tmp_path):
    """By the commands of docs/scale.md."""
    script = re.search(r"<!-- test: ray -->\n```bash\n(.*?)```", PAGE.read_text(), re.DOTALL)[1]
    cache, prompts = tmp_path / "CACHE", world.root / "prompts.jsonl"
    paths = {
        "STUDENT": world.sft / "student",
        "TEACHER": world.teacher,
        "CACHE": cache,
        "prompts.jsonl": prompts,
    }
    sampling = ["--n", "2", "--set", "sampling.max_tokens=10", "--set", "shard_rollouts=6"]
    for line in script.splitlines():
        program, stage, *words = (str(paths.get(word, word)) for word in shlex.split(line))
        code, err = start(stage, *words, *(sampling if stage == "rollout" else [])).wait()
        assert (program, code) == ("lightopd", 0), err
        assert err.count(f"{stage}: 4/4 shards") == 1
    for part in ("rollouts", "signals/teacher"):
        assert shards_of(cache / part) == shards_of(world.cache / part)
    for report in (cache / "rollout.report.json", cache / "signals/teacher/precompute.report.json"):
        assert json.loads(report.read_text())["figures"]["replicas"] == 2
    assert not (cache / ".lightopd.claims").exists()


def test_two_actors_make_a_cache_at_a_url_each_in_the_mirror_of_its_node(start, world, alone, tmp_path):
    """By the command of docs/scale.md; of a file system's URL, and from a machine with another user cache."""
    line = re.search(r"<!-- test: ray at a url -->\n```bash\n(.*?)```", PAGE.read_text(), re.DOTALL)[1]
    url, bucket, user = f"file://{tmp_path}/bucket", tmp_path / "bucket", tmp_path / "user"
    shutil.copytree(without_signal(alone, tmp_path / "cache"), bucket)
    paths = {"TEACHER": world.teacher, "s3://caches/run1": url, "second": "teacher"}
    _, stage, *words = (str(paths.get(word, word)) for word in shlex.split(line))
    code, err = start(stage, *words, user=user).wait()
    assert code == 0, err
    assert err.count(f"{stage}: 12/12 shards") == 1
    signal_there = bucket / "signals/teacher"
    assert shards_of(signal_there) == shards_of(alone / "signals/teacher")
    assert json.loads((signal_there / "precompute.report.json").read_text())["figures"]["replicas"] == 2
    assert f"cache: {url}\n" in (signal_there / "precompute.yaml").read_text()
    assert not list(user.rglob("signals/teacher/journal.jsonl")), (
        "the actors worked in the mirror of the command's machine"
    )
    assert not [path for path in (bucket / ".lightopd.claims").rglob("*") if path.is_file()]


def test_a_killed_actor_is_started_again_and_costs_one_shard(start, world, alone, tmp_path):
    cache = without_signal(alone, tmp_path / "cache")
    process = start(*scoring(world, cache, *by_actors(1)))
    replica = stopped_in_the_middle(cache, "signals/teacher", is_first=False)
    actor, there = parent_of(replica), finished(cache)
    assert 0 < len(there) < NUM_SHARDS
    os.kill(actor, signal.SIGKILL)
    until(lambda: is_gone(actor), 300)
    if not is_gone(replica):
        os.kill(replica, signal.SIGCONT)
    code, err = process.wait()
    assert code == 0, err
    assert "replica 1 of 1: killed, and started again on" in err
    assert any("was killed and started again (1 x)" in note for note in json.loads(process.out)["notes"])
    assert shards_of(cache / "signals/teacher") == shards_of(alone / "signals/teacher")
    assert there.items() <= finished(cache).items(), "a finished shard was written again"
    assert made_by_others(cache, replica) <= NUM_SHARDS - len(there), "a finished shard was scored again"


def test_an_actor_lets_go_of_its_shard_when_the_command_is_stopped(start, world, alone, tmp_path):
    cache = without_signal(alone, tmp_path / "cache")
    process = start(*scoring(world, cache, *by_actors(1)))
    replica = stopped_in_the_middle(cache, "signals/teacher")
    assert len(shards_of(cache / "signals/teacher")) < 24, "nothing was left to do"
    os.kill(replica, signal.SIGCONT)
    process.send(signal.SIGTERM)
    code, err = process.wait()
    assert code == 143, err
    assert "Traceback" not in err
    assert is_gone(replica)
    store = FolderStore(cache / ".lightopd.claims", "signals/teacher")
    assert not any(map(store.read, store.all_keys()))


def test_the_work_goes_on_when_a_node_is_killed(cluster, start, world, alone, tmp_path):
    cache = without_signal(alone, tmp_path / "cache")
    process = start(*scoring(world, cache, *by_actors(2)))
    replica = stopped_in_the_middle(cache, "signals/teacher", is_first=False)
    actor, there = parent_of(replica), finished(cache)
    assert 0 < len(there) < NUM_SHARDS
    node = parent_of(actor)
    assert node in [each.all_processes["raylet"][0].process.pid for each in cluster.worker_nodes]
    for lost in (node, actor, replica):  # a node takes all with it
        os.kill(lost, signal.SIGKILL)
    code, err = process.wait()
    assert code == 0, err
    assert shards_of(cache / "signals/teacher") == shards_of(alone / "signals/teacher")
    assert there.items() <= finished(cache).items(), "a finished shard was written again"
    assert made_by_others(cache, replica) < NUM_SHARDS, "what the lost node had finished was scored again"
    assert not (cache / ".lightopd.claims").exists()


@pytest.mark.parametrize(
    ("address", "told"),
    [
        ("127.0.0.1:1", "error: no Ray cluster at RAY_ADDRESS=127.0.0.1:1 ("),
        ("ray://head:10001", "a head's address such as 10.0.0.1:6379 is wanted"),
        ("http://head:8265", "a head's address such as 10.0.0.1:6379 is wanted"),
    ],
)
def test_an_address_without_a_cluster_is_refused(world, tmp_path, lightopd, monkeypatch, address, told):
    monkeypatch.setenv("RAY_ADDRESS", address)
    asked = ["--student", world.sft / "student", "--prompts", world.root / "prompts.jsonl"]
    code, _, err = lightopd("rollout", *asked, "--cache", tmp_path / "cache", "--execution", "ray")
    assert (code, told in err) == (2, True), err
    assert not (tmp_path / "cache").exists()


def test_without_the_extra_ray_its_name_is_told(world, tmp_path, lightopd, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    asked = ["--student", world.sft / "student", "--prompts", world.root / "prompts.jsonl"]
    code, _, err = lightopd("rollout", *asked, "--cache", tmp_path / "cache", "--execution", "ray")
    assert (code, "pip install 'lightopd[ray]'" in err) == (2, True), err


def test_a_node_that_cannot_do_the_job_says_why(tmp_path):
    from lightopd import __version__

    token = tmp_path / "cache/.lightopd.claims/ray-1"
    job = Job("rollout", "", __version__, tmp_path, token, "box")
    assert f"does not see {tmp_path / 'cache'} as box does; put the cache on a folder" in refusal(job)
    token.parent.mkdir(parents=True)
    token.touch()
    assert refusal(job) == ""
    assert refusal(Job("rollout", "", __version__, tmp_path, None, "box")) == ""
    other = Job("rollout", "", "0.0.9", tmp_path, token, "box")
    assert f"has lightopd {__version__}, and box, where the command was given, 0.0.9" in refusal(other)
    elsewhere = Job("rollout", "", __version__, tmp_path / "none", token, "box")
    assert f"has no folder {tmp_path / 'none'}" in refusal(elsewhere)
    told = "RuntimeError: The actor with name Actor failed to import on the worker"
    assert _lost(told) == f"its node cannot import lightopd; install lightopd {__version__} on every node"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--execution", "ray", "--exclusive"], "Ray's actors are others; leave one out"),
        (["--set", "sharing.cpus=2"], "cpus is 2, what Ray sets aside, and execution is local"),
        (["--execution", "slurm"], "sharing.execution"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(tmp_path, lightopd, words, told):
    asked = ["rollout", "--student", "S", "--prompts", "P", "--cache", tmp_path, *words]
    code, _, err = lightopd(*asked)
    assert (code, told in err) == (2, True), err
