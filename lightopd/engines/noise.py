"""How much an engine disagrees with itself: the floor that every later comparison is judged against."""

from collections.abc import Sequence

import numpy as np

from lightopd.engines.base import AsksServers, Engine
from lightopd.errors import EngineError
from lightopd.schemas import records
from lightopd.schemas.configs import ModelConfig
from lightopd.schemas.manifest import NoiseFloor

SAMPLE = 8
"""Sequences that are scored twice."""
COPIES = 16
"""Times that one sequence is scored at once by every address of a server engine."""
SHORT_TOKENS = 32
"""Most response tokens of that sequence."""


def measure_noise(engine: Engine, sequences: Sequence[records.Sequence]) -> NoiseFloor:
    """Score the first few sequences alone and then in one batch, and compare, nats.

    Only sampled-token log-probabilities are compared; `tokens` is 0 when no sequence has a response.
    """
    chosen = [sequence for sequence in sequences if len(sequence.response_ids)][:SAMPLE]
    alone = [engine.score([sequence], 0)[0].logprobs for sequence in chosen]
    together = [scores.logprobs for scores in engine.score(chosen, 0)] if chosen else []
    return compare(alone, together)


def refuse_noise(found: NoiseFloor, limit_nats: float, between: str, dtype: str) -> None:
    """Refuse a teacher whose scores are not settled well enough to distil.

    Args:
        dtype: the number format the teacher runs in, as a config names it.

    Raises:
        EngineError: the mean difference is above the limit; names both.
    """
    if found.mean_nats > limit_nats:
        remedy = (
            "the format is float32, so the engine computes another model: set its attention to eager, "
            "or take another engine"
            if dtype == "float32"
            else f"run the teacher in a wider number format than {dtype}, or raise it"
        )
        raise EngineError(
            f"{between} lie {found.mean_nats:.3g} nats apart on average, {found.max_nats:.3g} at most; the "
            f"limit is max_noise_nats {limit_nats:g}: {remedy}"
        )


def refuse_replicas(engine: AsksServers, sequences: Sequence[records.Sequence], limit_nats: float) -> None:
    """Score one short sequence many times at once on every address; refuse those that do not agree.

    Behind one address there may be several replicas, of which each answers a part of what is asked at once.
    Each answer is compared with the median of all.

    Args:
        engine: that of the servers.
        sequences: the shortest with a response is scored, its first tokens.
        limit_nats: most that an answer may differ by, mean over the tokens.

    Raises:
        EngineError: with the numbers of every address.
    """
    chosen = [sequence for sequence in sequences if len(sequence.response_ids)]
    if not chosen:
        return
    shortest = min(chosen, key=lambda each: len(each.prompt_ids) + len(each.response_ids))
    short = records.Sequence(shortest.prompt_ids, shortest.response_ids[:SHORT_TOKENS])
    answers = engine.score_everywhere(short, COPIES)
    stacked = {url: np.stack(logprobs).astype(np.float64) for url, logprobs in answers.items()}
    if not stacked:
        return
    median_R = np.median(np.concatenate(list(stacked.values())), axis=0)
    apart = {url: np.abs(logprobs_CR - median_R).mean(axis=1) for url, logprobs_CR in stacked.items()}
    if max(found_C.max() for found_C in apart.values()) > limit_nats:
        told = "; ".join(
            f"{url}: {(found_C > limit_nats).sum()} of {len(found_C)} answers, up to {found_C.max():.3g} nats"
            for url, found_C in apart.items()
        )
        raise EngineError(
            f"scoring the same {len(short.response_ids)} tokens at once, servers and their replicas do not "
            f"agree (from the median of all, mean over tokens, limit max_noise_nats {limit_nats:g}: {told}): "
            "let all serve the same weights in the same number format, or raise the limit"
        )


def reference_logprobs(model: ModelConfig, sequences: Sequence[records.Sequence]) -> list[records.Floats]:
    """Log-probabilities by the plain model of transformers; its memory is free again afterwards.

    Float32, eager attention, one sequence at a time, the model's own logits: nothing of an engine of ours.
    """
    if not sequences:
        return []
    import torch

    from lightopd.models.load import choose_device, load_model

    device = choose_device("auto")
    plain = load_model(model.model_copy(update={"dtype": "float32", "attention": "eager"}), device)
    found: list[records.Floats] = []
    for sequence in sequences:
        ids = np.concatenate([sequence.prompt_ids, sequence.response_ids]).astype(np.int64)
        asked_R = torch.from_numpy(ids[len(sequence.prompt_ids) :]).to(device)
        with torch.inference_mode():
            logits_TV = plain(input_ids=torch.from_numpy(ids).to(device)[None], use_cache=False).logits[0]
            logits_RV = logits_TV[len(sequence.prompt_ids) - 1 : -1].float()
            logprobs_R = logits_RV.gather(1, asked_R[:, None])[:, 0] - logits_RV.logsumexp(1)
        found.append(logprobs_R.cpu().numpy())
    return found


def compare(first: Sequence[records.Floats], second: Sequence[records.Floats]) -> NoiseFloor:
    """Absolute differences of two scorings of the same tokens, nats."""
    differences = [np.abs(a.astype(np.float64) - b) for a, b in zip(first, second, strict=True)]
    flat = np.concatenate(differences) if differences else np.zeros(0)
    if not len(flat):
        return NoiseFloor(mean_nats=0.0, max_nats=0.0, tokens=0)
    return NoiseFloor(mean_nats=float(flat.mean()), max_nats=float(flat.max()), tokens=len(flat))
