"""Damaged inputs at every border end in one line that a user can act on, and never in a traceback.

Each input is made of a seed and a number, so `pytest -k` and the number in a failure make it again.
"""

import json
import random
import struct
import threading
import traceback
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from fuzzing import as_json, damaged, damaged_bytes, depth_of
from tiny_models import save_model, write_prompts

from lightopd.cache.formats.convert import convert_official
from lightopd.config import load_run, load_stage
from lightopd.engines.kinds import load_engine
from lightopd.errors import LightopdError
from lightopd.lineage.fingerprint import fingerprint_model
from lightopd.models.attention import attention_of
from lightopd.models.limits import model_limits, precision_of
from lightopd.models.load import load_model
from lightopd.prompts.render import render_prompts
from lightopd.prompts.tokens import identified_tokenizer
from lightopd.schemas.configs import FilePrompts, ModelConfig, ServerEngine

SEED = 17
FEW, MANY = 12, 5000
"""Inputs of each kind in the short form and in the long one."""


def lengths(*known):
    """Both forms of a kind; the short one has the numbers of inputs that have failed, too."""
    short, long = [*range(FEW), *known], pytest.param(range(FEW, MANY), marks=pytest.mark.fuzz)
    return pytest.mark.parametrize("numbers", [short, long], ids=["few", "many"])


@pytest.fixture
def survives():
    """Tries an input: one line (the command takes control characters out of it), or it counts as a failure.

    Failures are told together at the end, one of each kind, so that a long form is run once for all kinds.
    """
    kinds = {}

    def attempt_of(attempt, number):
        try:
            attempt()
        except LightopdError as error:
            if "\n" in str(error):
                kinds.setdefault("several lines", f"input {number}: {error}")
        except Exception as error:  # noqa: BLE001 - this is what is looked for
            last = traceback.extract_tb(error.__traceback__)[-1]
            kind = f"{type(error).__name__} at {last.filename}:{last.lineno}"
            kinds.setdefault(kind, f"input {number}: {str(error)[:300]}")

    yield attempt_of
    if kinds:
        pytest.fail("\n".join(f"{kind}: {first}" for kind, first in kinds.items()))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"), 0)


@lengths()
def test_prompts(numbers, survives, folder, tmp_path):
    write_prompts(tmp_path / "p.jsonl", 3)
    rows = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    rows[1]["prompt"] = [{"role": "user", "content": "1+1="}]
    path = tmp_path / "damaged.jsonl"
    for number in numbers:
        dice = random.Random(f"{SEED}/prompts/{number}")
        lines = [as_json(damaged(row, dice)) for row in rows]
        content = "\n".join(lines).encode("utf-8", "surrogatepass")
        path.write_bytes(content if dice.random() < 0.6 else damaged_bytes(content, dice))
        survives(lambda: render_prompts(FilePrompts(path=path), ModelConfig(path=str(folder))), number)


SETTINGS = {
    "student": "s", "cache": "c", "out": "o", "steps": 3, "optimizer": {"lr": 1e-3, "warmup_steps": 0},
    "objective": {"terms": [{"name": "a", "target": {"kind": "divergence", "divergence": "reverse_kl"}}]},
}  # fmt: skip
RUN = {
    "out": "o", "teacher": "t", "student": "s", "prompts": "p.jsonl",
    "rollout": {"sampling": {"n": 2, "temperature": 1.0}}, "train": {"steps": 2, "adapter": {"rank": 2}},
}  # fmt: skip


@lengths()
def test_configs(numbers, survives, tmp_path):
    path = tmp_path / "damaged.yaml"
    for number in numbers:
        dice = random.Random(f"{SEED}/configs/{number}")
        whole = RUN if number % 2 else SETTINGS
        made = as_json(damaged(whole, dice)) if dice.random() < 0.5 else yaml.safe_dump(whole)
        content = made.encode("utf-8", "surrogatepass")
        path.write_bytes(content if dice.random() < 0.5 else damaged_bytes(content, dice))
        load = load_run if number % 2 else lambda *rest: load_stage("train", *rest)
        survives(lambda load=load: load([str(path)], [], {}), number)


@lengths(1405, 1424, 1438, 2417, 3514, 3620, 3680, 4160, 4450)
def test_model_folders(numbers, survives, folder, tmp_path):
    files = {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}
    names = [
        "config.json",
        "generation_config.json",
        "tokenizer_config.json",
        "tokenizer.json",
        "model.safetensors",
    ]
    for file, content in files.items():
        (tmp_path / file).write_bytes(content)
    model = ModelConfig(path=str(tmp_path))

    def read():
        model_limits(model), precision_of(model), attention_of(model), fingerprint_model(model)
        identified_tokenizer(model)

    for number in numbers:
        dice = random.Random(f"{SEED}/models/{number}")
        name = names[number % len(names)]
        if name.endswith(".json") and dice.random() < 0.8:
            content = as_json(damaged(json.loads(files[name]), dice)).encode("utf-8", "surrogatepass")
        elif name == "model.safetensors" and dice.random() < 0.6:
            size = struct.unpack("<Q", files[name][:8])[0]
            header = as_json(damaged(json.loads(files[name][8 : 8 + size]), dice)).encode(
                "utf-8", "surrogatepass"
            )
            content = struct.pack("<Q", len(header)) + header + files[name][8 + size :]
        else:
            content = damaged_bytes(files[name], dice)
        (tmp_path / name).write_bytes(content)
        survives(read, number)
        if number % 10 == 0:
            survives(lambda: load_model(model, "cpu"), number)
        (tmp_path / name).write_bytes(files[name])


@pytest.fixture(scope="module")
def hostile():
    """A server that answers what it is told: path to bytes."""
    answers = {}

    class Handler(BaseHTTPRequestHandler):
        def _answer(self):
            length = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(length)) if length else {}
            content = answers["make"](self.path, body)
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = _answer

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}", answers
    server.shutdown()
    thread.join()


def honest(path, body, tokens):
    """What vLLM would answer."""
    if path == "/version":
        return {"version": "0.32.0"}
    if path == "/v1/models":
        return {"data": [{"id": "toy", "root": "x", "parent": None, "max_model_len": 65}]}
    if path == "/tokenize":
        return {"tokens": tokens.encode(body["prompt"], add_special_tokens=False)}
    ids = body["prompt"]
    choice = {
        "prompt_token_ids": ids,
        "token_ids": [3],
        "finish_reason": "length",
        "logprobs": {"token_logprobs": [-1.0]},
    }
    if body.get("prompt_logprobs") is not None:
        choice["prompt_logprobs"] = [None, *({str(token): {"logprob": -1.0, "rank": 1}} for token in ids[1:])]
    return {"choices": [choice]}


@lengths(89)
def test_server_replies(numbers, survives, folder, hostile):
    url, answers = hostile
    model = ModelConfig(path=str(folder))
    tokens, _ = identified_tokenizer(model)
    paths = ["/version", "/v1/models", "/tokenize", "/v1/completions"]
    for number in numbers:
        dice = random.Random(f"{SEED}/answers/{number}")

        def make(path, body, dice=dice, bad=paths[number % 4]):
            answer = honest(path, body, tokens)
            if path != bad:
                return json.dumps(answer).encode()
            content = as_json(damaged(answer, dice)).encode("utf-8", "surrogatepass")
            return content if dice.random() < 0.8 else damaged_bytes(content, dice)

        answers["make"] = make
        survives(lambda: load_engine(ServerEngine(urls=url, attempts=1, timeout_s=5), model).close(), number)


@lengths(239)
def test_imports(numbers, survives, tmp_path):
    row = {
        "prompt": "1+1=",
        "metadata": {
            "prompt_tokens": [3, 4, 5], "response_tokens": [6, 7], "teacher_log_probs": [-0.5, -1.0],
            "loss_mask": [1, 1], "response": "2",
        },
    }  # fmt: skip
    path = tmp_path / "rows.parquet"
    for number in numbers:
        dice = random.Random(f"{SEED}/imports/{number}")
        try:
            made = damaged(row, dice)
            # Arrow itself needs memory without bound to make a table nested thousands deep.
            made = row if depth_of(made) > 60 else made
            pq.write_table(pa.Table.from_pylist([row, made, row] if dice.random() < 0.5 else [made]), path)
        except (pa.ArrowException, OverflowError, UnicodeError, TypeError, AttributeError, RecursionError):
            pq.write_table(pa.Table.from_pylist([row]), path)
        if dice.random() < 0.4:
            path.write_bytes(damaged_bytes(path.read_bytes(), dice))
        survives(lambda n=number: convert_official(path, tmp_path / f"cache{n}", vocabulary_size=24), number)
