"""What a later moment of a stage would refuse, refused before anything is paid for; no weights are read."""

from collections.abc import Sequence
from typing import Any

from lightopd.errors import ConfigError, InputError, LineageError
from lightopd.lineage.checks import check_tokenizer
from lightopd.lineage.fingerprint import declared_teacher
from lightopd.models.limits import ModelLimits, model_limits
from lightopd.prompts.tokens import identified_tokenizer
from lightopd.schemas.configs import Allowed, ModelConfig, PrecomputeConfig, SftConfig
from lightopd.schemas.manifest import Override, SftLineage, TokenizerFingerprint


def said_now(recorded: SftLineage, declared: str | None, stage: str) -> SftLineage | None:
    """What `--sft-teacher` says of a student whose own record says nothing; None where it adds nothing.

    Raises:
        LineageError: the record says something else.
    """
    if declared is None:
        return None
    said = declared_teacher(declared)
    if recorded.proof == "unknown":
        return said
    if recorded.teacher is None or said.teacher is None:
        same = said.name == (recorded.teacher.source if recorded.teacher else recorded.name)
    else:
        same = said.teacher.is_same_as(recorded.teacher)
    if not same or (said.proof == "none") != (recorded.proof == "none"):
        known = recorded.teacher.source if recorded.teacher else recorded.name or "no teacher"
        raise LineageError(
            f"{stage} refused: --sft-teacher says {declared}, and {known} is {recorded.proof}; leave "
            "--sft-teacher out, or take the student and rollouts that it speaks of"
        )
    return None


def check_ids(
    model: ModelConfig, cached: TokenizerFingerprint | None, allow: Sequence[Allowed] | None, stage: str
) -> tuple[Override, ...]:
    """Refuse a model to which the ids of `cached` mean other tokens; templates and end ids do not matter.

    Raises:
        LineageError: the token-to-id maps differ, and `tokenizer-mismatch` is not allowed.
    """
    if cached is None:
        return ()
    _, found = identified_tokenizer(model)
    aligned = found.model_copy(update={"special_ids": cached.special_ids, "template": cached.template})
    return check_tokenizer(cached, aligned, allow, stage)


def check_top_k(config: PrecomputeConfig) -> None:
    """Refuse more entries at a position than the model has tokens.

    Raises:
        ConfigError: names both numbers.
    """
    size = model_limits(config.teacher).vocabulary_size
    if config.top_k > size:
        raise ConfigError(
            f"top_k is {config.top_k}, the vocabulary of {config.teacher.path} has {size} tokens; set top_k "
            "to that or less"
        )


def check_head_holds(student: ModelConfig, tokenizer: Any) -> None:
    """Refuse a student without an output for a token of text.

    Added tokens do not count: text models share the tokenizer of a larger one that also sees. Answers
    with such an id are left out of fine-tuning.

    Raises:
        InputError: names the token and the width.
    """
    width = model_limits(student).vocabulary_size
    added = tokenizer.get_added_vocab()
    of_text = ((index, token) for token, index in tokenizer.get_vocab().items() if token not in added)
    largest, token = max(of_text, default=(0, ""))
    if largest >= width:
        raise InputError(
            f"{student.path} has {width} outputs, and {token!r} of its tokenizer is id {largest}; give it "
            f"more with resize_token_embeddings({largest + 1}), and save it"
        )


def check_dense_answers(config: SftConfig) -> None:
    """Refuse tokens of a teacher's top-k that the student has no output for, or more than there are.

    Raises:
        ConfigError: names both numbers.
    """
    if config.top_k is None:
        return
    taught, own = model_limits(config.teacher).vocabulary_size, model_limits(config.student).vocabulary_size
    if config.top_k > taught:
        raise ConfigError(
            f"sft.top_k is {config.top_k}, the vocabulary of {config.teacher.path} has {taught} tokens; set "
            "it to that or less"
        )
    if taught > own:
        raise ConfigError(
            f"sft.top_k keeps tokens of {config.teacher.path}, which has {taught} outputs, and "
            f"{config.student.path} has {own}; leave top_k out, or give the student more outputs with "
            f"resize_token_embeddings({taught})"
        )


def check_reads(reader: ModelConfig, longest_prompt: int, max_tokens: int, writer: ModelLimits) -> None:
    """Refuse a model whose context may be shorter than a prompt and the response to it.

    Args:
        reader: scores what the other model writes.
        longest_prompt: in tokens.
        max_tokens: of a response.
        writer: limits of the model that writes, which ends a response at its own context.

    Raises:
        InputError: the reader's context is shorter.
    """
    longest = min(longest_prompt + max_tokens, writer.context_length)
    context = model_limits(reader).context_length
    if longest > context:
        raise InputError(
            f"prompt and response can have {longest} tokens (longest prompt {longest_prompt}, max_tokens "
            f"{max_tokens}), the context of {reader.path} is {context}; set sampling.max_tokens to "
            f"{max(1, context - longest_prompt)} or less, or leave out the longest prompts"
        )
