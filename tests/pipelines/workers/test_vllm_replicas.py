"""Replicas on one box whose engine is vLLM: two processes on the CPU, each with a vLLM of its own.

Whichever is ready first is stopped in its first shard until the other one has made some: on a busy machine
one could make them all before the other has started. One process's cache is made with the session's engine.
"""

import json
import os
import shutil
import signal

import pytest
from crowd import begin, children_of, is_gone, shards_of, stopped_in_the_middle, until
from tiny_models import write_prompts
from vllm_cases import Unclosed, shared_engine

from lightopd.config import load_stage
from lightopd.pipelines import precompute, rollout

pytestmark = pytest.mark.vllm

NUM_SHARDS = 12
SAMPLED = ["sampling.max_tokens=20", "sampling.n=2", "shard_rollouts=2"]
SCORED = ["role=reference", "top_k=5"]
ENGINE = ["engine.kind=vllm", "engine.kv_cache_gib=0.1", "engine.batch_tokens=128"]
"""As of the session's engine."""
START_S = 300.0
"""Within which vLLM has started on a busy machine."""


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A cache with its signal, made by one process; the model and the prompts are beside it."""
    folder, root = tmp_path_factory.getbasetemp(), tmp_path_factory.mktemp("alone")
    engine = Unclosed(shared_engine(folder))
    write_prompts(root / "prompts.jsonl", NUM_SHARDS)
    asked = {"student": folder / "model", "prompts": root / "prompts.jsonl", "cache": root / "cache"}
    rollout.run(load_stage("rollout", [], [*SAMPLED, *ENGINE], asked), load=lambda *_: engine)
    asked = {"cache": root / "cache", "teacher": folder / "model"}
    precompute.run(load_stage("precompute", [], [*SCORED, *ENGINE], asked), load=lambda *_: engine)
    return root / "cache"


def by_two(stage, settings, *arguments):
    sets = [word for each in (*settings, *ENGINE, "sharing.lease_s=3600") for word in ("--set", each)]
    return begin(stage, *arguments, *sets, "--replicas", 2, "--json")


def made_by(journal):
    """Shards that each process made, by its own last record."""
    records = [json.loads(line) for line in journal.read_text().splitlines()]
    return {record["pid"]: record["made"] for record in records}


def test_two_replicas_with_vllm_share_the_rollouts_of_one_process(alone, tmp_path, tmp_path_factory):
    cache, model = tmp_path / "cache", tmp_path_factory.getbasetemp() / "model"
    asked = ["--student", model, "--prompts", alone.with_name("prompts.jsonl"), "--cache", cache]
    process = by_two("rollout", SAMPLED, *asked)
    first = stopped_in_the_middle(cache, "rollouts", START_S)
    before = len(shards_of(cache / "rollouts"))
    until(lambda: len(shards_of(cache / "rollouts")) > before + 1, START_S)
    os.kill(first, signal.SIGCONT)
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert json.loads(out)["figures"]["replicas"] == 2
    shares = made_by(cache / "journal.jsonl")
    assert len(shares) == 2
    assert min(shares.values()) >= 1
    assert sum(shares.values()) == NUM_SHARDS
    assert shards_of(cache / "rollouts") == shards_of(alone / "rollouts")


def test_a_killed_replica_with_vllm_costs_one_shard_and_takes_its_engine_with_it(
    alone, tmp_path, tmp_path_factory
):
    cache, model = tmp_path / "cache", tmp_path_factory.getbasetemp() / "model"
    folder = shutil.copytree(alone, cache) / "signals/teacher"
    shutil.rmtree(cache / "signals")
    process = by_two("precompute", SCORED, "--cache", cache, "--teacher", model)
    killed = stopped_in_the_middle(cache, "signals/teacher", START_S)
    before, engines = shards_of(folder), children_of(killed)
    assert engines
    until(lambda: len(shards_of(folder)) > len(before) + 1, START_S)
    os.kill(killed, signal.SIGKILL)
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert "of 2: killed (SIGKILL)" in err
    assert any("killed (SIGKILL)" in note for note in json.loads(out)["notes"])
    finished = len([name for name in before if name.endswith(".json")])
    (other,) = made_by(folder / "journal.jsonl").keys() - {killed}
    assert NUM_SHARDS - finished <= made_by(folder / "journal.jsonl")[other] <= NUM_SHARDS
    assert shards_of(folder) == shards_of(alone / "signals/teacher")
    until(lambda: all(map(is_gone, engines)))
