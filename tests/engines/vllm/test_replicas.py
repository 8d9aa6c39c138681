"""Replicas behind one address, and servers beside each other, that do not compute the same."""

import re
import shutil

import pytest
from engine_cases import CONTEXT, VOCABULARY, random_sequences, tiny_model
from fake_engine import FakeEngine
from fake_vllm_server import FakeServer
from tiny_models import tokenizer

from lightopd.engines.noise import COPIES, refuse_replicas
from lightopd.engines.vllm.server import load_server_engine
from lightopd.errors import EngineError
from lightopd.schemas.configs import ModelConfig, ServerEngine

SEQUENCES = random_sequences(1, [(20, 3), (3, 7), (4, 0)])


def serve(seed=3, **options):
    engine = FakeEngine(seed=seed, vocabulary_size=VOCABULARY, context_length=CONTEXT)
    return FakeServer(engine, tokenizer(), **options)


@pytest.fixture
def ask(tmp_path):
    """Check servers with these options for each, one address for each."""
    tiny_model("qwen3").save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    opened = []

    def check(*options, limit=0.05, sequences=SEQUENCES):
        servers = [serve(**one) for one in options]
        opened.extend(servers)
        urls = tuple(server.url for server in servers)
        engine = load_server_engine(ServerEngine(urls=urls), ModelConfig(path=str(tmp_path)))
        try:
            for server in servers:
                server.bodies.clear()
            refuse_replicas(engine, sequences, limit)
        finally:
            engine.close()
        return servers

    yield check
    for server in opened:
        server.stop()


def test_every_address_gets_the_shortest_sequence_many_times_at_once(ask):
    servers = ask({}, {})
    for server in servers:
        assert len(server.bodies) == COPIES
        assert {len(body["prompt"]) for body in server.bodies} == {10}
        assert server.most_at_once > 1


def test_one_replica_of_three_behind_an_address_is_found_and_told_with_numbers(ask):
    with pytest.raises(EngineError, match=r"[56] of 16 answers, up to 0\.4 nats") as caught:
        ask({"odd_replica": 0.4})
    assert "max_noise_nats 0.05" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_differences_below_the_limit_are_noise(ask):
    (server,) = ask({"odd_replica": 0.04})
    assert len(server.bodies) == COPIES


def test_of_two_servers_with_other_weights_both_numbers_are_told(ask):
    with pytest.raises(
        EngineError, match=r"http://127.0.0.1:\d+: .* answers.*; http://127.0.0.1:\d+: .* answers"
    ):
        ask({}, {"seed": 4})


def test_nothing_is_requested_where_no_response_is_to_be_scored(ask):
    (server,) = ask({}, sequences=random_sequences(1, [(4, 0)]))
    assert not server.bodies


def test_precompute_refuses_a_server_with_an_odd_replica_and_leaves_no_signal(lightopd, world, tmp_path):
    cache = shutil.copytree(world.cache, tmp_path / "cache")
    shutil.rmtree(cache / "signals")
    server = FakeServer(FakeEngine(vocabulary_size=24, context_length=64), tokenizer(), odd_replica=0.4)
    try:
        asked = ["precompute", "--cache", cache, "--teacher", world.teacher, "--top-k", 4]
        code, _, err = lightopd(*asked, "--server", server.url)
    finally:
        server.stop()
    assert code == 6, err
    assert re.search(rf"do not agree .*{server.url}: [56] of {COPIES} answers, up to 0\.4 nats", err), err
    assert "limit max_noise_nats 0.05" in err
    assert not (cache / "signals").exists()
