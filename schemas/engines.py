"""A model, what runs it and how it draws: transformers or vLLM in this process, or a vLLM server."""

import json
import re
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from lightopd.schemas.base import StrictModel

ADAPTER_CONFIG = "adapter_config.json"
MAX_STOP_BYTES = 1000
"""Longest text that ends a response: it is looked for at every token."""
MIN_SHAPE_TOKENS = 256
"""Fewer distributions have a mean that says more of them than of the model."""


def _as_horizon(value: Any) -> int | float:
    """A number of tokens or a share, also as text, as a command line gives it."""
    found: Any = value
    if isinstance(value, str):
        with suppress(ValueError):
            found = float(value) if "." in value else int(value)
    if isinstance(found, int) and not isinstance(found, bool) and found >= 1:
        return found
    if isinstance(found, float) and 0 < found < 1:
        return found
    raise ValueError(
        f"{value!r} is no horizon; give a number of tokens, 1 or more, such as 512, or a share of each "
        "response between 0 and 1, such as 0.3; leave it out for whole responses"
    )


Horizon = Annotated[int | float, BeforeValidator(_as_horizon)]
"""How far into each response a signal goes: so many tokens, or a share of its tokens."""


def base_of(adapter: Path) -> str:
    """The base model that an adapter's folder names: a folder, or a hub repository id.

    Raises:
        ValueError: it names none, or a folder that is not there.
    """
    remedy = "give the base model as the path and this folder as adapter"
    try:
        base = json.loads((adapter / ADAPTER_CONFIG).read_text("utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        base = None
    if not isinstance(base, str) or not base:
        raise ValueError(f"{adapter / ADAPTER_CONFIG} does not name its base model; {remedy}")
    if base.startswith((".", "/", "~")) and not Path(base).expanduser().is_dir():
        raise ValueError(f"the base of adapter {adapter} is {base}, and there is no such folder; {remedy}")
    return base


class ModelConfig(StrictModel):
    """A causal language model: a folder, or a hub repository where one can be reached."""

    path: str = Field(min_length=1)
    """Folder of a Hugging Face model or of a PEFT adapter that names its base, or a hub repository id."""
    revision: str | None = None
    """Commit, tag or branch of a hub repository; a folder has none."""
    adapter: Path | None = None
    """Folder of a PEFT adapter that is applied on top of the model."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Number format the weights are run in; `auto` keeps the one they are stored in."""
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    """Attention of transformers; `auto` is `sdpa`, or `eager` for models that `sdpa` does not have whole."""
    trust_remote_code: bool = False
    """Run Python code that the model folder brings along; leave off for models you did not read."""

    @model_validator(mode="before")
    @classmethod
    def _a_plain_string_is_a_path(cls, value: Any) -> Any:
        given = {"path": str(value)} if isinstance(value, str | Path) else value
        if not isinstance(given, dict) or given.get("adapter") is not None:
            return given
        folder = Path(str(given.get("path", ""))).expanduser()
        if not (folder / ADAPTER_CONFIG).is_file() or (folder / "config.json").exists():
            return given
        return {**given, "path": base_of(folder), "adapter": folder}


class HfEngine(StrictModel):
    """transformers in this process."""

    kind: Literal["hf"] = "hf"
    """Generate and score with transformers."""
    device: str = "auto"
    """`auto` takes CUDA where there is one; else a torch device such as `cpu` or `cuda:1`."""
    batch_tokens: int = Field(16384, ge=1)
    """Padded tokens in one forward pass while scoring."""
    generate_rollouts: int = Field(64, ge=1)
    """Rollouts that are generated together."""


class VllmEngine(StrictModel):
    """vLLM in this process; what is left out is vLLM's own choice."""

    kind: Literal["vllm"] = "vllm"
    """Generate and score with vLLM (extra `vllm`)."""
    tensor_parallel_size: int = Field(1, ge=1)
    """GPUs that share each layer."""
    pipeline_parallel_size: int = Field(1, ge=1)
    """Groups of GPUs that each hold a part of the layers."""
    quantization: str | None = None
    """Quantisation applied to the weights, such as `fp8`; left out, the model's own, if it has one."""
    gpu_memory_utilization: float | None = Field(None, gt=0, le=1)
    """Share of each GPU's memory that vLLM may take."""
    kv_cache_gib: float | None = Field(None, gt=0)
    """Memory for keys and values instead of that share; left out, 2 GiB on a CPU."""
    max_model_len: int | None = Field(None, ge=2)
    """Most tokens in prompt and response together; left out, the model's context."""
    batch_tokens: int = Field(2048, ge=32)
    """Most tokens in one forward pass; its log-probabilities take about 8 bytes a token and vocabulary id."""
    eager: bool | None = None
    """Run without compiled graphs: starts sooner, runs slower; left out, so on a CPU only."""
    seed: int = 0
    """vLLM's own seed; rollouts draw from theirs, see `sampling.seed`."""

    @model_validator(mode="before")
    @classmethod
    def _copies_are_replicas(cls, value: Any) -> Any:
        if not isinstance(value, dict) or "data_parallel_size" not in value:
            return value
        copies = value["data_parallel_size"]
        if str(copies) != "1":  # 1 stands in every config that was saved while there was such a setting
            raise ValueError(
                f"data_parallel_size is {copies}, and one process runs one copy of the model; at rollout and "
                f"precompute, set sharing.replicas to {copies} (--replicas {copies}) instead"
            )
        return {name: given for name, given in value.items() if name != "data_parallel_size"}


class SharingConfig(StrictModel):
    """How processes share the shards of one cache."""

    replicas: int = Field(1, ge=1)
    """Processes that this command starts, each with an engine of its own."""
    execution: Literal["local", "ray"] = "local"
    """Where: on this machine, or as actors of the Ray cluster at `RAY_ADDRESS` (extra `ray`)."""
    cpus: int = Field(1, ge=1)
    """With `execution: ray`, cores that are set aside for each: the threads of an engine on a CPU."""
    exclusive: bool = False
    """Refuse a cache that another process is writing; otherwise its shards are shared with it."""
    lease_s: float = Field(120.0, ge=0.2, le=86_400.0)
    """A process that gives no sign of life for so long loses the shard it works on to another, in seconds."""

    @model_validator(mode="after")
    def _replicas_share(self) -> "SharingConfig":
        if self.exclusive and self.replicas > 1:
            raise ValueError("exclusive refuses every other process, and replicas are several; leave one out")
        if self.exclusive and self.execution == "ray":
            raise ValueError(
                "exclusive refuses every other process, and Ray's actors are others; leave one out"
            )
        if self.cpus > 1 and self.execution == "local":
            raise ValueError(
                f"cpus is {self.cpus}, what Ray sets aside, and execution is local; leave it out, or set "
                "execution to ray"
            )
        return self


class ServerEngine(StrictModel):
    """A running vLLM server, or several that serve the same model."""

    kind: Literal["server"] = "server"
    """Generate and score on a vLLM server that is already running."""
    urls: tuple[str, ...] = Field(min_length=1)
    """Addresses such as `http://gpu-box:8000`; one, a list, or several with commas between."""
    model: str | None = None
    """Name the model is served under; left out, the only one that the server lists."""
    api_key_env: str | None = Field(None, pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")
    """Environment variable that holds the API key; the key itself is never stored or logged."""
    concurrency: int = Field(64, ge=1)
    """Requests in flight on each server."""
    timeout_s: float = Field(1800.0, gt=0)
    """Longest wait for one answer, in seconds."""
    max_answer_mib: int = Field(2048, ge=1)
    """Most of one answer that is read, in MiB."""
    attempts: int = Field(6, ge=1)
    """Tries of one request, with growing pauses, after refused connections, time-outs, 429 and 5xx."""

    @field_validator("urls", mode="before")
    @classmethod
    def _one_string_is_a_list(cls, urls: Any) -> Any:
        return [url.strip() for url in urls.split(",")] if isinstance(urls, str) else urls

    @field_validator("urls")
    @classmethod
    def _plain_addresses(cls, urls: tuple[str, ...]) -> tuple[str, ...]:
        plain = tuple(url.rstrip("/").removesuffix("/v1") for url in urls)
        for url in plain:
            if "@" in url:
                raise ValueError("give the key through api_key_env, not inside an address")
            if not re.fullmatch(r"https?://[^/\s?#]+(/[^\s?#]*)?", url):
                raise ValueError(f"{url!r} is not an address such as http://gpu-box:8000")
        if len(set(plain)) < len(plain):
            raise ValueError("an address is given twice")
        return plain


class SamplingConfig(StrictModel):
    """The sampling contract; it is stored with the rollouts."""

    n: int = Field(1, ge=1, le=1_000_000)
    """Rollouts per prompt."""
    temperature: float = Field(1.0, ge=0.0)
    """Sampling temperature; 0 takes the most likely token. Stored log-probabilities are always at 1."""
    top_p: float = Field(1.0, gt=0.0, le=1.0)
    """Nucleus: sample from the smallest set of tokens whose probability reaches this."""
    top_k: int = Field(0, ge=0)
    """Sample from so many most likely tokens; 0 from all."""
    min_p: float = Field(0.0, ge=0.0, le=1.0)
    """Leave out tokens less likely than this share of the most likely one's probability."""
    repetition_penalty: float = Field(1.0, gt=0.0, le=2.0)
    """Divides the logits of tokens that occurred already; engines vllm and server only."""
    stop_ids: tuple[int, ...] = ()
    """Token ids that end a response beside the model's own end tokens."""
    stop: tuple[str, ...] = ()
    """Texts that end a response, such as `["</answer>"]`; it ends with the token that completes one."""
    max_tokens: int = Field(1024, ge=1)
    """Longest response in tokens, the end token included."""
    seed: int = 0
    """Every rollout draws from its own stream, made from this seed, the prompt and the sample index."""

    @property
    def is_raw(self) -> bool:
        """Whether responses are drawn from the model's own distribution, which log-probabilities speak of."""
        narrowed = self.top_p != 1 or self.top_k or self.min_p or self.repetition_penalty != 1
        return self.temperature == 1 and not narrowed

    @field_validator("stop", mode="before")
    @classmethod
    def _one_text_is_a_list_of_one(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @field_validator("stop")
    @classmethod
    def _stop_texts_can_be_found(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for text in value:
            if not 0 < len(text.encode("utf-8", "replace")) <= MAX_STOP_BYTES:
                raise ValueError(f"stop has {text[:40]!r}; a text has 1 to {MAX_STOP_BYTES} bytes")
        return value

    @model_validator(mode="after")
    def _stop_ids_are_ids(self) -> "SamplingConfig":
        if any(token < 0 for token in self.stop_ids):
            raise ValueError(f"stop_ids has {min(self.stop_ids)}; an id is 0 or more")
        return self


def _kind_is_hf_unless_given(value: Any) -> Any:
    return {"kind": "hf", **value} if isinstance(value, dict) and "kind" not in value else value


EngineConfig = Annotated[
    HfEngine | VllmEngine | ServerEngine,
    Field(discriminator="kind"),
    BeforeValidator(_kind_is_hf_unless_given),
]
