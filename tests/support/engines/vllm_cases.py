"""The real vLLM on tiny models: one engine in process for the whole session, and servers as processes.

vLLM's kernels on a CPU take heads of 32 values and more, so the models differ from those of `engine_cases`.
"""

import functools
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import torch
import transformers as hf
from tiny_models import CHARACTERS, tokenizer

from lightopd.engines.vllm.in_process import load_vllm_engine
from lightopd.schemas.configs import ModelConfig, VllmEngine

VOCABULARY, CONTEXT = 97, 64
START_S = 300.0


def save_vllm_model(folder: Path, seed: int = 0, vocabulary: int = VOCABULARY, layers: int = 2) -> Path:
    """A random Qwen3 of hidden size 64 with two heads, in float32, with a tokenizer of characters."""
    torch.manual_seed(seed)
    config = hf.Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=CONTEXT,
        initializer_range=0.2,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    model = hf.Qwen3ForCausalLM(config)
    model.generation_config = hf.GenerationConfig(eos_token_id=1, pad_token_id=0)
    model.save_pretrained(folder)
    tokenizer(CHARACTERS).save_pretrained(folder)
    return folder


@functools.cache
def shared_engine(folder: Path):
    """One engine over `folder/model` for all tests; `close_shared` ends it."""
    settings = VllmEngine(kv_cache_gib=0.1, batch_tokens=128)
    engine = load_vllm_engine(settings, ModelConfig(path=str(save_vllm_model(folder / "model"))))
    _open.append(engine)
    return engine


class Unclosed:
    """The shared engine, which outlives a stage."""

    def __init__(self, engine):
        self._engine = engine

    def __getattr__(self, name):
        return getattr(self._engine, name)

    def close(self):
        pass


@functools.cache
def shared_server(folder: Path):
    """One server over `folder/model` for all tests; `close_shared` ends it."""
    server = RealServer(save_vllm_model(folder / "model"), VLLM_ALLOW_LONG_MAX_MODEL_LEN="1")
    _open.append(server)
    return server


_open = []


def close_shared():
    while _open:
        _open.pop().close()


class RealServer:
    """vLLM's API server as a process group of its own on a free port of loopback; ready when made."""

    def __init__(self, model: Path, *options: str, **environment: str):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
        command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--enforce-eager"]
        command += [
            "--max-model-len",
            str(CONTEXT + 1),
            "--max-logprobs",
            "-1",
            "--max-num-seqs",
            "64",
            "--no-enable-chunked-prefill",
        ]
        command += ["--kv-cache-memory-bytes", "100000000", *options]
        defaults = {
            "VLLM_TARGET_DEVICE": "cpu",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_LOGGING_LEVEL": "ERROR",
            "TORCHDYNAMO_DISABLE": "1",
            "HF_HUB_OFFLINE": "1",
        }
        self._process = subprocess.Popen(
            command, env={**os.environ, **defaults, **environment}, start_new_session=True, cwd="/"
        )
        try:
            self._wait()
        except BaseException:
            self.kill()
            raise

    def _wait(self):
        deadline_s = time.monotonic() + START_S
        while time.monotonic() < deadline_s:
            if self._process.poll() is not None:
                raise RuntimeError(f"the server ended with {self._process.returncode}")
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=5):
                    return
            except (urllib.error.URLError, OSError):
                time.sleep(0.5)
        raise RuntimeError(f"the server was not ready after {START_S:.0f} s")

    def kill(self):
        """End the server and its processes at once, by the id of the group that was made for them."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    close = kill
