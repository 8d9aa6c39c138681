"""What `precompute` refuses of a horizon before a model is loaded."""

from lightopd.cache.signals.horizon import in_words
from lightopd.cache.store import Cache
from lightopd.errors import ConfigError
from lightopd.pipelines.shared.sequences import response_lengths
from lightopd.schemas.configs import PrecomputeConfig
from lightopd.schemas.manifest import SignalManifest


def check_horizon(config: PrecomputeConfig, cache: Cache) -> None:
    """Refuse a horizon behind every response's end, and one of hidden states.

    Raises:
        ConfigError: names it, and the longest response.
    """
    _check_kind(config)
    if isinstance(config.horizon, int):
        longest = max(response_lengths(cache).values(), default=0)
        _check_below(config.horizon, longest, f"the longest response of {cache.path} has {longest}")


def check_horizon_below(config: PrecomputeConfig, max_tokens: int) -> None:
    """Refuse a horizon that no response can be longer than, before one is sampled.

    Raises:
        ConfigError: names it, and the limit of the sampling.
    """
    _check_kind(config)
    if isinstance(config.horizon, int):
        _check_below(config.horizon, max_tokens, f"rollout.sampling.max_tokens is {max_tokens}")


def _check_kind(config: PrecomputeConfig) -> None:
    if config.horizon is not None and config.keep == "hidden":
        raise ConfigError(
            "keep: hidden keeps the states of whole responses, and horizon would cut them; leave one out"
        )


def _check_below(horizon: int, longest: int, where: str) -> None:
    if horizon >= longest:
        raise ConfigError(
            f"horizon is {horizon} tokens, and {where}: it leaves nothing out; set it lower, give a share "
            "such as 0.3, or leave it out"
        )


def check_support_reaches(config: PrecomputeConfig, support: SignalManifest) -> None:
    """Refuse a support that ends before the responses do, or before the horizon.

    Raises:
        ConfigError: names both horizons.
    """
    own, theirs = config.horizon, support.horizon
    if theirs is None or (own is not None and type(own) is type(theirs) and own <= theirs):
        return
    raise ConfigError(
        f"signal {support.name} has ids of the {in_words(theirs)} of each response, and they are needed for "
        f"{'whole responses' if own is None else 'the ' + in_words(own)}; set horizon to {theirs}"
    )
