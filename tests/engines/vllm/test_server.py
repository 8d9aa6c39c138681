"""The server engine against servers that misbehave; `test_engine_vllm.py` has the real one."""

import logging
import pickle

import numpy as np
import pytest
from engine_cases import CONTEXT, VOCABULARY, behavior_logprobs, random_sequences, tiny_model
from fake_engine import FakeEngine
from fake_vllm_server import FakeServer
from tiny_models import tokenizer
from typer.testing import CliRunner

from lightopd.cli import stages
from lightopd.cli.main import app
from lightopd.engines.kinds import describe_engine, tail_of
from lightopd.engines.vllm import server_http
from lightopd.engines.vllm.server import load_server_engine
from lightopd.errors import ConfigError, EngineError
from lightopd.pipelines.run import RUNNERS
from lightopd.schemas.configs import ModelConfig, SamplingConfig, ServerEngine
from lightopd.schemas.records import Sequence

TOY = FakeEngine(seed=3, vocabulary_size=VOCABULARY, context_length=CONTEXT)


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch):
    monkeypatch.setattr(server_http, "FIRST_PAUSE_S", 0.001)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    tiny_model("qwen3").save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return ModelConfig(path=str(folder))


@pytest.fixture
def serve():
    servers = []

    def start(**options):
        options = {"tokenizer": tokenizer(), **options}
        servers.append(FakeServer(TOY, options.pop("tokenizer"), **options))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


@pytest.fixture
def connect(model):
    engines = []

    def load(*servers, **settings):
        urls = [server if isinstance(server, str) else server.url for server in servers]
        engines.append(load_server_engine(ServerEngine(urls=urls, **settings), model))
        return engines[-1]

    yield load
    for engine in engines:
        engine.close()


SEQUENCES = random_sequences(1, [(3, 7), (20, 1), (1, 12), (9, 30)])


def test_scores_are_the_models_own_through_json(serve, connect):
    scores = connect(serve()).score(SEQUENCES, 5)
    for found, exact in zip(scores, TOY.score(SEQUENCES, 5), strict=True):
        np.testing.assert_allclose(found.logprobs, exact.logprobs, atol=1e-6)
        np.testing.assert_array_equal(found.topk_ids, exact.topk_ids)
        np.testing.assert_allclose(found.tail_logprobs, exact.tail_logprobs, atol=1e-5)


def test_every_sampling_setting_is_sent_so_that_no_default_of_the_server_counts(serve, connect):
    server = serve()
    prompt = np.array([3, 4], dtype=np.int32)
    connect(server).generate([prompt], SamplingConfig(max_tokens=5, temperature=0.7, top_p=0.9), ["k"], (2,))
    body = server.bodies[-1]
    assert (body["prompt"], body["max_tokens"], body["temperature"], body["top_p"]) == ([3, 4], 5, 0.7, 0.9)
    assert (body["top_k"], body["min_p"], body["repetition_penalty"]) == (0, 0.0, 1.0)
    assert body["stop_token_ids"] == [2]
    assert body["ignore_eos"]
    assert not body["add_special_tokens"]


@pytest.mark.parametrize("options", [{}, {"stops_late": 1}, {"ignores_stop": True}, {"processed": True}])
def test_a_response_ends_with_the_token_that_completes_a_text_whatever_the_server_sends_behind_it(
    serve, connect, options
):
    server = serve(**options)
    engine, prompts = connect(server), [np.array([3 + row], np.int32) for row in range(10)]
    keys = [f"p{i}" for i in range(len(prompts))]
    plain = engine.generate(prompts, SamplingConfig(max_tokens=40), keys, [])
    sampling = SamplingConfig(max_tokens=40, stop=("1", "="))
    found = engine.generate(prompts, sampling, keys, [])
    assert server.bodies[-1]["stop"] == ["1", "="]
    assert server.bodies[-1]["include_stop_str_in_output"]
    ones = set(tokenizer().convert_tokens_to_ids(["1", "="]))
    ends = [next((i + 1 for i, token in enumerate(one.response_ids) if token in ones), None) for one in plain]
    assert any(ends)
    for before, after, end in zip(plain, found, ends, strict=True):
        assert after.response_ids.tolist() == before.response_ids[:end].tolist()
        np.testing.assert_array_equal(after.logprobs, before.logprobs[:end])
        assert after.finish_reason == ("length" if end is None else "stop")


def test_a_server_that_tokenises_anew_is_refused(serve, connect):
    with pytest.raises(EngineError, match="tokenises anew"):
        connect(serve(tokenises_anew=True))


NARROWED = SamplingConfig(max_tokens=9, temperature=0.7, top_p=0.9)


def drawn_by(engine, sampling):
    prompts = [sequence.prompt_ids for sequence in SEQUENCES]
    return engine.generate(prompts, sampling, [f"p{i}" for i in range(len(prompts))], [2])


def test_a_server_with_processed_logprobs_gives_both_kinds(serve, connect):
    samples = drawn_by(connect(serve(processed=True)), NARROWED)
    drawn = [Sequence(one.prompt_ids, s.response_ids) for one, s in zip(SEQUENCES, samples, strict=True)]
    for sample, scores in zip(samples, TOY.score(drawn, VOCABULARY), strict=True):
        np.testing.assert_allclose(sample.logprobs, scores.logprobs, rtol=0, atol=1e-5)
        wanted = behavior_logprobs(scores, sample.response_ids, NARROWED)
        np.testing.assert_allclose(sample.behavior_logprobs, wanted, rtol=0, atol=1e-5)
        assert (sample.behavior_logprobs > sample.logprobs).mean() > 0.5


def test_a_server_with_raw_logprobs_knows_who_sampled_only_where_that_is_the_model_itself(serve, connect):
    engine = connect(serve())
    assert all(sample.behavior_logprobs is None for sample in drawn_by(engine, NARROWED))
    for sampling, value in ((SamplingConfig(max_tokens=9), None), (SamplingConfig(temperature=0), 0.0)):
        for sample in drawn_by(engine, sampling.model_copy(update={"max_tokens": 9})):
            expected = sample.logprobs if value is None else np.zeros_like(sample.logprobs)
            np.testing.assert_array_equal(sample.behavior_logprobs, expected)


def test_servers_that_report_different_kinds_of_logprobs_are_refused(serve, connect):
    with pytest.raises(EngineError, match="start all with --logprobs-mode processed_logprobs"):
        connect(serve(), serve(processed=True))


def test_a_server_whose_logprobs_are_not_the_models_is_refused(serve, connect):
    with pytest.raises(EngineError, match="log-probabilities of another kind"):
        connect(serve(broken_logprobs=True))


def test_a_server_with_another_tokenizer_is_refused(serve, connect):
    with pytest.raises(EngineError, match="another tokenizer"):
        connect(serve(tokenizer=tokenizer("9876543210+=,-*/()")))


def test_a_server_of_another_model_is_refused_by_its_files(serve, connect, model, tmp_path):
    tiny_model("qwen3", seed=1).save_pretrained(tmp_path)
    with pytest.raises(EngineError, match=r"is another model than .*; start it with this one"):
        connect(serve(root=str(tmp_path)))
    connect(serve(root=model.path))


def test_a_server_whose_files_are_elsewhere_is_used_and_said_to_be_unproven(serve, connect, caplog):
    with caplog.at_level(logging.WARNING, logger="lightopd"):
        connect(serve(root="/models/elsewhere"))
    assert "cannot be seen from here" in caplog.text


def test_a_server_with_a_longer_context_is_another_model(serve, connect):
    with pytest.raises(EngineError, match=r"context of 4096 tokens.*; start it with this model"):
        connect(serve(max_model_len=4096))


def test_a_server_of_an_adapter_is_refused_where_none_is_given(serve, connect):
    with pytest.raises(EngineError, match="is an adapter"):
        connect(serve(parent="base"))


def test_a_model_that_is_not_served_is_named(serve, connect):
    with pytest.raises(EngineError, match="serves toy and no other"):
        connect(serve(), model="other")


@pytest.mark.parametrize("options", [{"max_logprobs": 4}, {"clip_logprobs": 4}])
def test_a_server_that_gives_too_few_logprobs_is_refused_before_anything_is_scored(serve, connect, options):
    server = serve(**options)
    engine = connect(server)
    engine.score(SEQUENCES[:1], 3)
    asked = len(server.bodies)
    with pytest.raises(EngineError, match="--max-logprobs 5"):
        engine.score(SEQUENCES, 5)
    assert len(server.bodies) <= asked + 1 + len(SEQUENCES)


def test_a_response_that_the_server_cuts_short_is_an_error(serve, connect):
    engine = connect(serve(max_tokens=3))
    with pytest.raises(EngineError, match=r"rollout k ended after 3 of 9 tokens"):
        engine.generate([np.array([3, 4], dtype=np.int32)], SamplingConfig(max_tokens=9), ["k"], ())


@pytest.mark.parametrize("temperature", [0.001, 3.0])
def test_a_temperature_that_vllm_would_change_is_refused(serve, connect, temperature):
    engine = connect(serve())
    with pytest.raises(ConfigError, match=r"sampling\.temperature"):
        engine.generate([np.array([3], dtype=np.int32)], SamplingConfig(temperature=temperature), ["k"], ())


def test_busy_servers_are_asked_again(serve, connect):
    server = serve()
    engine = connect(server)
    server.statuses = [429, 503, 500]
    exact = TOY.score(SEQUENCES[:1], 0)[0].logprobs
    np.testing.assert_allclose(engine.score(SEQUENCES[:1], 0)[0].logprobs, exact, atol=1e-6)
    assert server.statuses == []


def test_a_refusal_is_not_asked_again(serve, connect):
    server = serve()
    engine = connect(server)
    server.statuses = [400, 400]
    with pytest.raises(EngineError, match="answered 400: busy"):
        engine.score(SEQUENCES[:1], 0)
    assert server.statuses == [400]


def test_a_server_that_died_ends_in_one_line_and_its_neighbour_takes_the_work(serve, connect):
    first, second = serve(), serve()
    both, alone = connect(first, second), connect(first, attempts=3)
    first.stop()
    assert len(both.score(SEQUENCES, 3)) == len(SEQUENCES)
    with pytest.raises(EngineError, match=r"no reply from .* after 3 tries") as caught:
        alone.score(SEQUENCES, 3)
    assert "\n" not in str(caught.value)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_a_server_that_hangs_is_given_up(serve, connect):
    with pytest.raises(EngineError, match="no reply in time"):
        connect(serve(), timeout_s=1e-6, attempts=2)


def test_requests_in_flight_are_bounded_and_spread(serve, connect):
    servers = [serve(), serve()]
    engine = connect(*servers, concurrency=2)
    for server in servers:
        server.most_at_once = 0
    engine.score(random_sequences(2, [(3, 4)] * 40), 0)
    assert [server.most_at_once for server in servers] == [2, 2]


def test_servers_that_differ_are_refused(serve, connect):
    with pytest.raises(EngineError, match=r"the servers differ.*; start all with one vLLM"):
        connect(serve(), serve(version="0.31.0"))


def test_the_api_key_comes_from_the_environment_and_is_shown_nowhere(
    serve, connect, model, monkeypatch, caplog
):
    server = serve(api_key="s3cret-key")
    with pytest.raises(EngineError, match=r"401.*engine\.api_key_env"):
        connect(server)
    with pytest.raises(ConfigError, match="TEACHER_KEY, which is not set"):
        connect(server, api_key_env="TEACHER_KEY")
    monkeypatch.setenv("TEACHER_KEY", "wrong-key")
    with pytest.raises(EngineError) as caught:
        connect(server, api_key_env="TEACHER_KEY")
    assert "wrong-key" not in str(caught.value)
    monkeypatch.setenv("TEACHER_KEY", "s3cret-key")
    with caplog.at_level(logging.DEBUG):
        engine = connect(server, api_key_env="TEACHER_KEY")
        server.statuses = [503]
        engine.score(SEQUENCES, 2)
    record, _ = describe_engine(ServerEngine(urls=server.url, api_key_env="TEACHER_KEY"), model)
    assert "s3cret-key" not in caplog.text + repr(record)


def test_the_description_names_the_server_and_the_precision_of_the_model(serve, model):
    server = serve()
    settings = ServerEngine(urls=server.url)
    record, precision = describe_engine(settings, model)
    assert (precision.dtype, tail_of(settings)) == ("float32", "derived")
    assert (record.kind, record.version, record.settings) == ("server", "0.32.0", {"served_model": "toy"})


@pytest.mark.parametrize("urls", ["http://key@host", "host:8000", "http://", "http://a,http://a/v1"])
def test_an_address_that_is_none_is_refused(urls):
    with pytest.raises(ValueError):
        ServerEngine(urls=urls)


def test_several_addresses_may_stand_in_one_string():
    assert ServerEngine(urls="http://a:1/v1/, http://b:2").urls == ("http://a:1", "http://b:2")


@pytest.mark.parametrize(
    ("given", "found"),
    [
        (["--server", "http://a", "--set", "engine.api_key_env=K"], {"kind": "server", "api_key_env": "K"}),
        (["--engine", "vllm", "--set", "engine.max_model_len=9"], {"kind": "vllm", "max_model_len": 9}),
        (["--set", "engine.batch_tokens=8"], {"kind": "hf", "batch_tokens": 8}),
    ],
)
def test_the_command_takes_engine_or_server_and_settings_of_it(monkeypatch, given, found):
    seen = []
    monkeypatch.setitem(RUNNERS, "precompute", lambda loaded, **_: seen.append(loaded.engine))
    monkeypatch.setattr(stages, "show_report", lambda *_: None)
    done = CliRunner().invoke(app, ["precompute", "--cache", "c", "--teacher", "t", *given])
    assert done.exit_code == 0, done.output
    assert found.items() <= seen[0].model_dump().items()


def test_an_answer_longer_than_its_limit_is_not_read_to_its_end(serve, connect):
    server = serve(padding=3 << 20)
    with pytest.raises(EngineError, match=r"more than 1 MiB; .* raise engine\.max_answer_mib"):
        connect(server, max_answer_mib=1)


def test_a_server_that_calls_its_model_by_the_key_does_not_get_it_printed(
    serve, connect, monkeypatch, caplog
):
    key = "sk-0123456789abcdef"
    monkeypatch.setenv("TEACHER_KEY", key)
    with pytest.raises(EngineError) as caught:
        connect(serve(served=[f"one-{key}", key]), api_key_env="TEACHER_KEY")
    assert "one-***" in str(caught.value)
    assert key not in str(caught.value) + caplog.text


def test_a_server_whose_model_lies_at_no_path_is_as_one_whose_weights_cannot_be_seen(serve, connect, caplog):
    connect(serve(root="a" * 3000))
    assert "cannot be seen from here" in caplog.text
