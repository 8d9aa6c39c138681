"""How a cache's prompts were rendered: the time they were shown, and what a later stage compares."""

from collections.abc import Collection, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from pydantic import JsonValue

from lightopd.cache.manifests import read_manifest
from lightopd.errors import OutputError
from lightopd.lineage.checks import refuse_unless_allowed
from lightopd.prompts.tokens import DATED, writes_the_date
from lightopd.schemas.base import canonical_hash
from lightopd.schemas.configs import Allowed, PromptsConfig
from lightopd.schemas.manifest import CACHE_MANIFEST, CacheManifest, Override
from lightopd.schemas.records import Prompt


def shown_time(cache: Path) -> datetime | None:
    """The time that a cache's chat template was shown; None where there is no cache or none was recorded.

    A cache from before the time was recorded was rendered shortly before its manifest was written.

    Raises:
        CacheError: the manifest is broken.
    """
    path = cache / CACHE_MANIFEST
    if not path.is_file():
        return None
    recorded = read_manifest(path, CacheManifest).rendered_at
    return datetime.fromisoformat(recorded) if recorded else datetime.fromtimestamp(path.stat().st_mtime)


def rendering_of(config: PromptsConfig, prompts: Sequence[Prompt]) -> dict[str, JsonValue]:
    """How prompts become ids, for a manifest: the config's way, and the rows' own options."""
    rendering: dict[str, JsonValue] = {"render": config.render, "template_options": config.template_options}
    own = {canonical_hash(prompt.template_options): prompt.template_options for prompt in prompts}
    if any(own.values()):
        rendering["row_options"] = [own[key] for key in sorted(own)]
    return rendering


def taught_rendering(answers: dict[str, JsonValue]) -> dict[str, JsonValue]:
    """The rendering of fine-tuning answers for a student's lineage; rows without options are said, too."""
    return {**answers, "row_options": answers.get("row_options", [{}])}


def check_rendering(
    taught: dict[str, Any] | None, now: dict[str, Any], allow: Collection[Allowed], stage: str
) -> tuple[Override, ...]:
    """Refuse prompts rendered in another way than those of the student's fine-tuning.

    Args:
        taught: of the fine-tuning answers, or of the rollouts of the training since; None where unknown.

    Raises:
        LineageError: they differ, and `template-mismatch` is not allowed.
    """
    if taught is None:
        return ()
    differing = [
        f"{key} is {taught.get(key)} in the student's training and {now.get(key)} here"
        for key in ("render", "template_options")
        if taught.get(key) != now.get(key)
    ]
    if not differing and "row_options" in taught:
        known = taught["row_options"]
        differing = [
            f"rows have chat_template_kwargs {own}, in the student's training {known}"
            for own in now.get("row_options", [{}])
            if own not in known
        ][:1]
    if not differing:
        return ()
    return refuse_unless_allowed(
        "template-mismatch",
        f"prompts are rendered in another way than the student was taught on: {'; '.join(differing)}",
        "set prompts.render, prompts.template_options and chat_template_kwargs as they were, or",
        allow=allow,
        stage=stage,
    )


def refuse_another_day(cache: Path, manifest: CacheManifest, tokenizer: Any) -> None:
    """Say why prompts differ from those in a cache where the date, which was not recorded, is the cause.

    Raises:
        OutputError: the cache was made on another day than its files say.
    """
    path = cache / CACHE_MANIFEST
    if not path.is_file() or not writes_the_date(tokenizer):
        return
    there = read_manifest(path, CacheManifest)
    if there.rendered_at is None and _same_but_prompts(there, manifest):
        raise OutputError(
            f"{cache} holds other prompts than these; {DATED}, and this cache does not say on which "
            "day it was made: name another folder, or set the file time of lightopd.json to that day"
        )


def _same_but_prompts(there: CacheManifest, now: CacheManifest) -> bool:
    fields = {"prompts": now.prompts}
    return there.prompts != now.prompts and there.model_copy(update=fields).fingerprint() == now.fingerprint()
