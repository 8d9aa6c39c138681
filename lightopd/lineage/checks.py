"""Refusals of lineage: teacher, student and tokenizer must be the ones that a cache speaks of.

Each check returns the overrides it used, to be recorded in everything made afterwards, or raises.
"""

import json
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from lightopd.errors import LineageError
from lightopd.schemas.configs import Allowed
from lightopd.schemas.manifest import (
    CacheManifest,
    ModelFingerprint,
    Override,
    Precision,
    SftLineage,
    TokenizerFingerprint,
)

REASON = (
    "another teacher biases the gradient by an amount that stays when the student is close to its rollouts, "
    "and fixed rollouts, unlike live ones, give no way out of it (arXiv 2604.13010, Theorems 3.8 and 3.9)"
)
Vocabularies = tuple[Mapping[str, int], Mapping[str, int]]
"""Token-to-id maps of the cached and of the found tokenizer, for naming the tokens that differ."""

# A pad token fills positions that no score and no loss reads, and people set it freely.
_COMPARED_ROLES = ("bos", "eos", "unk")


def all_overrides(groups: Iterable[tuple[Override, ...]]) -> tuple[Override, ...]:
    """Overrides of all that something is made from, none twice: each is told by all that follows from it."""
    return tuple(dict.fromkeys(override for group in groups for override in group))


def check_teacher(
    sft: SftLineage, teacher: ModelFingerprint | None, allow: Collection[Allowed], stage: str
) -> tuple[Override, ...]:
    """Refuse a scoring teacher that did not write the student's fine-tuning data.

    Args:
        sft: what is known about the student's fine-tuning teacher.
        teacher: the model that scores; None where an imported signal does not say.
        stage: the stage that asks, for the message and for the record.

    Raises:
        LineageError: the teachers differ or cannot be compared, and `teacher-mismatch` is not allowed.

    Source: teacher consistency, arXiv 2604.13010, Theorems 3.8 and 3.9.
    """
    if sft.proof == "none" or (teacher is not None and _is_same_teacher(sft, teacher)):
        return ()
    scorer = "an unknown model" if teacher is None else _shown(teacher)
    if sft.teacher is None and sft.name is None:
        found = f"the student's SFT teacher is unknown, {scorer} scores"
        remedy = (
            "say who it was with --sft-teacher MODEL, or that none is claimed with --sft-teacher none "
            "(the rollouts stay), or"
        )
    else:
        found = f"the SFT teacher is {_shown_sft(sft)}, {scorer} scores"
        if teacher is not None and sft.teacher is not None:
            found += _what_differs(sft.teacher, teacher)
        remedy = "score with the SFT teacher, redo SFT with this one, or"
    return refuse_unless_allowed("teacher-mismatch", found, f"{REASON}; {remedy}", allow=allow, stage=stage)


def check_student(
    cached: ModelFingerprint | None, found: ModelFingerprint, allow: Collection[Allowed], stage: str
) -> tuple[Override, ...]:
    """Refuse a student that did not sample the cached rollouts.

    Args:
        cached: the model that sampled; None where an imported cache does not say.
        found: the student of this run.

    Raises:
        LineageError: they differ or cannot be compared, and `student-mismatch` is not allowed.
    """
    if cached is not None and found.is_same_as(cached):
        return ()
    sampler = "an unknown model" if cached is None else _shown(cached)
    differs = "" if cached is None else _what_differs(cached, found)
    return refuse_unless_allowed(
        "student-mismatch",
        f"the rollouts were sampled by {sampler}, this student is {_shown(found)}{differs}",
        "off its own rollouts a student is pushed away from them, not towards the teacher; "
        "take the student that sampled, sample again with this one, or",
        allow=allow,
        stage=stage,
    )


def check_role(
    role: str,
    rollouts: CacheManifest,
    declared: SftLineage | None,
    model: ModelFingerprint,
    tokenizer: TokenizerFingerprint,
    allow: Collection[Allowed],
    stage: str,
) -> tuple[Override, ...]:
    """Refuse a model that is not what its role in a cache says, or that reads other tokens.

    Args:
        role: `teacher` is held to the fine-tuning data, `self` to the rollouts, any other to neither.
        rollouts: manifest of the cache.
        declared: who taught the student, where that is said now.

    Returns:
        The overrides of the cache and of this model.

    Raises:
        LineageError: as `check_teacher`, `check_student` and `check_tokenizer` do.
    """
    found = rollouts.overrides
    if role == "teacher":
        found += check_teacher(declared or rollouts.sft, model, allow, stage)
    elif role == "self":
        found += check_student(rollouts.sampler, model, allow, stage)
    return found + check_tokenizer(rollouts.tokenizer, tokenizer, allow, stage)


def check_tokenizer(
    cached: TokenizerFingerprint | None,
    found: TokenizerFingerprint,
    allow: Collection[Allowed] | None,
    stage: str,
    vocabularies: Vocabularies | None = None,
) -> tuple[Override, ...]:
    """Refuse a tokenizer whose token-to-id map, special ids or chat template is not the cached one.

    The pad token is not compared: no score and no loss reads it.

    Args:
        cached: tokenizer of the rollouts; None where an imported cache does not say.
        found: tokenizer of the model in this run.
        vocabularies: the two maps, where both are at hand.

    Raises:
        LineageError: a part differs and is not allowed; parts are checked in the order above.
    """
    if cached is None:
        return refuse_unless_allowed(
            "tokenizer-mismatch",
            "the cache does not say which tokenizer its ids belong to",
            "if you know it is this model's,",
            allow=allow,
            stage=stage,
        )
    differences: list[tuple[Allowed, str, str]] = []
    if cached.vocabulary != found.vocabulary:
        differences.append(
            ("tokenizer-mismatch", _vocabulary_difference(cached, found, vocabularies), "the ids")
        )
    for role in _COMPARED_ROLES:
        before, now = cached.special_ids.get(role, []), found.special_ids.get(role, [])
        if before != now:
            told = f"{role} ids are {before} in the cache and {now} in this model"
            differences.append(("special-ids-mismatch", told, "special ids"))
    if cached.template != found.template:
        before_and_now = f"{_short(cached.template)} in the cache and {_short(found.template)} in this model"
        told = f"the chat template is {before_and_now}"
        differences.append(("template-mismatch", told, "the template"))
    overrides: tuple[Override, ...] = ()
    for allowed, told, part in differences:
        remedy = f"take the model whose tokenizer made the cache, correct {part}, or"
        overrides += refuse_unless_allowed(allowed, told, remedy, allow=allow, stage=stage)
    return overrides


def precision_note(cached: Precision | None, found: Precision | None) -> str | None:
    """One line where rollouts are scored in another precision than they were sampled in; None where not."""
    if cached is None or found is None or cached == found:
        return None
    before, now = (f"{p.dtype}{f' ({p.quantization})' if p.quantization else ''}" for p in (cached, found))
    return f"precision differs: sampled in {before}, scored in {now}; the gap contains that rounding"


def _is_same_teacher(sft: SftLineage, teacher: ModelFingerprint) -> bool:
    if sft.teacher is not None:
        return teacher.is_same_as(sft.teacher)
    return sft.name is not None and sft.name == teacher.source


def refuse_unless_allowed(
    allowed: Allowed, found: str, remedy: str, *, allow: Collection[Allowed] | None, stage: str
) -> tuple[Override, ...]:
    """Refuse, or name the override that lets it pass; `allow` is None where a stage has no overrides."""
    if allow is None:
        raise LineageError(f"{stage} refused: {found}; {remedy.removesuffix(' or').removesuffix(',')}")
    if allowed in allow:
        return (Override(stage=stage, allowed=allowed, found=found),)
    raise LineageError(
        f"{stage} refused: {found}; {remedy} continue with --allow {allowed}, which is recorded"
    )


def _shown(model: ModelFingerprint) -> str:
    commit = f"@{model.commit[:12]}" if model.commit else ""
    return f"{model.source}{commit} ({_short(model.identity)})"


def _shown_sft(sft: SftLineage) -> str:
    name = _shown(sft.teacher) if sft.teacher is not None else f"{sft.name!r} by name"
    return f"{name}, {sft.proof}"


def _what_differs(one: ModelFingerprint, other: ModelFingerprint) -> str:
    """Why two identities differ, where it is not that these are other weights."""
    if one.weights != other.weights:
        formats = _stored_format(one), _stored_format(other)
        if one.config != other.config or None in formats or formats[0] == formats[1]:
            return ""
        return (
            f"; the one is stored in {formats[0]}, the other in {formats[1]}: rounded weights are other "
            "weights, take the folder that is recorded and set dtype to run it in another format"
        )
    part = "config.json" if one.config != other.config else "adapter"
    return f"; the weights are equal, the {part} is not"


def _stored_format(model: ModelFingerprint) -> str | None:
    """The number format that a model's folder names; None where the folder is not at hand."""
    try:
        config = json.loads((Path(model.source).expanduser() / "config.json").read_text("utf-8"))
        stored = config.get("dtype") or config.get("torch_dtype")
    except (OSError, ValueError, AttributeError, RecursionError):
        return None
    return stored if isinstance(stored, str) else None


def _vocabulary_difference(
    cached: TokenizerFingerprint, found: TokenizerFingerprint, vocabularies: Vocabularies | None
) -> str:
    told = (
        f"token ids differ: {cached.size} tokens in the cache ({_short(cached.vocabulary)}), "
        f"{found.size} in this model ({_short(found.vocabulary)})"
    )
    if vocabularies is None:
        return told
    before, now = vocabularies
    different = sorted(token for token in {*before, *now} if before.get(token) != now.get(token))
    shown = ", ".join(f"{token!r} is {before.get(token)} and {now.get(token)}" for token in different[:3])
    return f"{told}; {len(different)} tokens differ, such as {shown}"


def _short(digest: str | None) -> str:
    return "absent" if digest is None else digest[:12]
