"""What a vLLM server must show before it is used, on every address."""

import asyncio
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lightopd.engines.vllm.server_http import NoAnswerError, ServerPool
from lightopd.engines.vllm.server_replies import (
    Choice,
    Completion,
    Models,
    Tokens,
    Version,
    parse,
    response_rows,
)
from lightopd.errors import EngineError, InputError
from lightopd.lineage.fingerprint import fingerprint_model
from lightopd.models.limits import ModelLimits, model_limits
from lightopd.models.tokenizer import PROBE_TEXTS, load_tokenizer
from lightopd.schemas import records
from lightopd.schemas.configs import ModelConfig, ServerEngine
from lightopd.schemas.manifest import EngineRecord

log = logging.getLogger(__name__)

DECODED_IDS = 512
"""Ids spread evenly over the vocabulary whose text is tokenised on both sides."""
PROMPTS, PROMPT_TOKENS = 4, 8
ALLOWED_NATS, ALLOWED_SHARE = 0.1, 0.05
"""How far a token's log-probability may differ between drawing and scoring: noise of half precision."""
PROCESSED_NATS = 1e-3
"""How far that of the only candidate may be from 0."""


@dataclass(frozen=True, slots=True)
class Served:
    """What the servers serve."""

    name: str
    """Name to ask for."""
    limits: ModelLimits
    """The context is one less than the server's own: scoring asks for one token beyond the sequence."""
    is_processed: bool
    """Log-probabilities of drawn tokens are those after temperature and truncation."""


@dataclass(frozen=True, slots=True)
class Card:
    """One server's own description, or what is common to all."""

    name: str
    root: str
    parent: str | None
    max_model_len: int
    version: str

    @property
    def record(self) -> EngineRecord:
        return EngineRecord(kind="server", version=self.version, settings={"served_model": self.name})


async def served_model(pool: ServerPool, engine: ServerEngine) -> Card:
    """What the servers say they serve; all must say the same.

    Raises:
        EngineError: a server does not reply, does not serve the model, or they differ.
    """
    cards = await asyncio.gather(*(_card(pool, url, engine.model) for url in pool.urls))
    for url, card in zip(pool.urls, cards, strict=True):
        if card != cards[0]:
            raise EngineError(
                f"the servers differ: {pool.urls[0]} has {cards[0]}, {url} has {card}; start all with one "
                "vLLM, model and settings, or leave the odd one out of engine.urls"
            )
    return cards[0]


async def probe(pool: ServerPool, engine: ServerEngine, model: ModelConfig) -> Served:
    """Refuse servers of another model or tokenizer, and those whose log-probabilities are not the model's.

    Raises:
        EngineError: says what the server did and how to start it.
    """
    card = await served_model(pool, engine)
    limits = model_limits(model)
    _check_card(card, model, limits.context_length)
    if limits.rope_switch is not None and card.max_model_len > limits.rope_switch:
        raise EngineError(
            f"the server's {card.name} has a context of {card.max_model_len} tokens, and beyond "
            f"{limits.rope_switch} vLLM takes the long factors of its positions for every length; start it "
            f"with --max-model-len {limits.rope_switch}"
        )
    tokenizer = load_tokenizer(model)
    modes = []
    for url in pool.urls:
        await _check_tokenizer(pool, url, card.name, tokenizer)
        modes.append(await _is_processed(pool, url, card.name, min(limits.vocabulary_size, len(tokenizer))))
    if any(modes) and not all(modes):
        raise EngineError(
            f"{pool.urls[modes.index(True)]} reports log-probabilities after temperature and truncation, "
            f"{pool.urls[modes.index(False)]} reports the raw ones; start all with --logprobs-mode "
            f"processed_logprobs"
        )
    return Served(card.name, ModelLimits(limits.vocabulary_size, card.max_model_len - 1), modes[0])


async def check_top_k(pool: ServerPool, name: str, top_k: int) -> None:
    """Refuse servers that give fewer log-probabilities than are asked for; silent ones are passed over.

    Raises:
        EngineError: names the server.
    """
    pair = records.Sequence(np.zeros(1, np.int32), np.zeros(1, np.int32))
    for url in pool.urls:
        try:
            asked = {"temperature": 0.0, "prompt_logprobs": top_k}
            choice = await _complete(pool, url, name, [0, 0], asked)
            response_rows("a pair of tokens", choice, pair, top_k)
        except NoAnswerError:
            log.warning("%s does not reply; the other servers take its work", url)
        except EngineError as error:
            raise EngineError(
                f"{url} does not give {top_k} log-probabilities ({error}); start it with --max-logprobs "
                f"{top_k} or more, or lower top_k"
            ) from error


async def _card(pool: ServerPool, url: str, name: str | None) -> Card:
    version, models = await asyncio.gather(pool.get(url, "/version"), pool.get(url, "/v1/models"))
    cards = {card.id: card for card in parse(Models, models, f"{url}/v1/models").data}
    if name is None and len(cards) != 1:
        raise EngineError(f"{url} serves {', '.join(cards) or 'nothing'}; name one in engine.model")
    card = next(iter(cards.values())) if name is None else cards.get(name)
    if card is None:
        raise EngineError(f"{url} serves {', '.join(cards) or 'nothing'} and no {name}; correct engine.model")
    told = parse(Version, version, f"{url}/version").version
    return Card(card.id, card.root or "", card.parent, card.max_model_len, told)


def _check_card(card: Card, model: ModelConfig, context_length: int) -> None:
    if (card.parent is None) != (model.adapter is None):
        served, given = (
            "no adapter" if each is None else "an adapter" for each in (card.parent, model.adapter)
        )
        raise EngineError(
            f"the server's {card.name} is {served}, the model given has {given}; correct engine.model or the "
            f"adapter"
        )
    if card.max_model_len > context_length + 1:
        raise EngineError(
            f"the server's {card.name} has a context of {card.max_model_len} tokens, {model.path} has "
            f"{context_length}: it serves another model, or another setting of its positions; start it with "
            "this model and its own settings, or correct engine.urls"
        )
    if model.adapter is not None or not _lies_here(card.root):
        log.warning("%s: whether its weights are those of %s cannot be seen from here", card.name, model.path)
        return
    try:
        found = fingerprint_model(ModelConfig(path=card.root))
    except InputError as error:
        raise EngineError(
            f"the server's {card.name} lies in {card.root}, which cannot be read ({error}); mend that "
            f"folder, or start the server with {model.path}"
        ) from error
    if found.identity != fingerprint_model(model).identity:
        raise EngineError(
            f"the server's {card.name} lies in {card.root} and is another model than {model.path}; start it "
            "with this one, or correct engine.urls"
        )


def _lies_here(root: str) -> bool:
    """Whether the folder that a server speaks of is a model's on this machine."""
    try:
        return (Path(root) / "config.json").is_file()
    except OSError:  # what it says is too long for a path
        return False


async def _check_tokenizer(pool: ServerPool, url: str, name: str, tokenizer: Any) -> None:
    spread = np.unique(np.linspace(0, len(tokenizer) - 1, DECODED_IDS).astype(int)).tolist()
    decoded = tokenizer.decode(spread, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    for text in (*PROBE_TEXTS, decoded):
        body = {"model": name, "prompt": text, "add_special_tokens": False}
        found = parse(Tokens, await pool.post("/tokenize", body, url), f"{url}/tokenize").tokens
        if found != tokenizer.encode(text, add_special_tokens=False):
            raise EngineError(
                f"{url} has another tokenizer: it reads {text[:40]!r} as {str(found)[:60]}; serve the model "
                f"with its own tokenizer"
            )


async def _is_processed(pool: ServerPool, url: str, name: str, vocabulary_size: int) -> bool:
    """Whether a drawn token comes with its log-probability after temperature and truncation, not the raw one.

    It is drawn among one candidate and at another temperature, so the one is 0 and the other what scoring
    gives it; anything else is refused. Random ids are also what no tokenizer would make of any text, so
    a server that decodes and encodes them shows itself.
    """
    drawing = {"temperature": 0.5, "top_k": 1, "top_p": 1.0, "min_p": 0.0, "logprobs": 0, "ignore_eos": True}
    random = np.random.default_rng(0)
    drawn, scored = [], []
    for _ in range(PROMPTS):
        ids = random.integers(0, vocabulary_size, PROMPT_TOKENS).tolist()
        choice = await _complete(pool, url, name, ids, drawing)
        token = choice.token_ids[0]
        logprobs = choice.logprobs.token_logprobs if choice.logprobs is not None else []
        choice = await _complete(pool, url, name, [*ids, token], {"temperature": 0.0, "prompt_logprobs": 0})
        entry = ((choice.prompt_logprobs or [None])[-1] or {}).get(token)
        if not logprobs or entry is None:
            raise EngineError(
                f"{url} gives no log-probability of the token it drew; it is no vLLM of this year"
            )
        drawn.append(logprobs[0])
        scored.append(entry.logprob)
    difference, size = abs(np.mean(drawn) - np.mean(scored)), abs(np.mean(scored))
    is_raw = difference <= ALLOWED_NATS + ALLOWED_SHARE * size
    if not is_raw and not np.abs(drawn).max() <= PROCESSED_NATS:
        raise EngineError(
            f"{url} reports log-probabilities of another kind (mean {np.mean(drawn):.3f} nats where scoring "
            f"gives {np.mean(scored):.3f}); start it with --logprobs-mode processed_logprobs"
        )
    return not is_raw


async def _complete(
    pool: ServerPool, url: str, name: str, ids: list[int], settings: dict[str, Any]
) -> Choice:
    body = {"model": name, "prompt": ids, "max_tokens": 1, "return_token_ids": True, **settings}
    reply = await pool.post("/v1/completions", {**body, "add_special_tokens": False}, url)
    choice = parse(Completion, reply, f"{url}/v1/completions").choices[0]
    if choice.prompt_token_ids != ids or not choice.token_ids:
        raise EngineError(
            f"{url} does not return the token ids that it was sent: it tokenises anew, or is no vLLM that "
            f"knows return_token_ids"
        )
    return choice
