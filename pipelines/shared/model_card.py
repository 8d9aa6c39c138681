"""The model card of a trained student: what it began as, who taught it, on what, and under which settings.

Written as `README.md` into the student's folder. Models are named as in their hub repository or by the last
part of their path: a card is published, and where a folder lay is nobody's business.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from lightopd import __version__
from lightopd.files import write_atomically
from lightopd.lineage.fingerprint import model_folder
from lightopd.schemas.base import StrictModel
from lightopd.schemas.configs import ModelConfig
from lightopd.schemas.manifest import ModelFingerprint, StudentLineage

CARD = "README.md"
KEPT = ("language", "license", "license_name", "license_link")
"""What the card of the model that training began with says of this one, too."""
NOT_SHOWN = {"cache", "student", "out", "teacher", "prompts", "continue_from", "accuracy", "loggers", "allow"}
"""Settings that name a place, or decide nothing about the weights."""


def write_model_card(
    folder: Path,
    lineage: StudentLineage,
    began_as: ModelConfig,
    settings: StrictModel,
    facts: Mapping[str, Any],
) -> None:
    """Write the card beside a student's weights.

    Args:
        folder: of the student.
        lineage: the student's.
        began_as: the model that training began with.
        settings: of the stage.
        facts: further lines of the card's table.

    Raises:
        OutputError: it cannot be written.
    """
    source = model_folder(began_as)
    header: dict[str, Any] = {
        "library_name": "peft" if lineage.student.adapter else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["lightopd", "on-policy-distillation" if lineage.made_by == "train" else "distillation"],
        **({"base_model": began_as.path} if source.commit else {}),
        **_kept(source.path / CARD),
    }
    overrides = ", ".join(sorted({override.allowed for override in lineage.overrides}))
    rows = {
        "made by": f"`lightopd {lineage.made_by}` {__version__}",
        "began as": _named(lineage.base),
        "fine-tuning teacher": _teacher(lineage),
        **facts,
        **({"cache": f"content `{lineage.cache[:12]}`"} if lineage.cache else {}),
        **({"refusals set aside": overrides} if overrides else {}),
        "these weights": f"`{lineage.student.identity[:12]}`",
    }
    shown = settings.model_dump(mode="json", exclude=NOT_SHOWN, exclude_none=True)
    lines = [
        *("---", yaml.safe_dump(header, sort_keys=False, allow_unicode=True).rstrip(), "---", ""),
        *(f"# A student of {_short_name(lineage.sft.teacher) or lineage.sft.name or 'its own'}", ""),
        *("| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items()), ""),
        *("Which weights these are and where they come from is in `lightopd_student.json`.", ""),
        *("## Settings", "", "```yaml", yaml.safe_dump(shown, sort_keys=False).rstrip(), "```", ""),
    ]
    write_atomically(folder / CARD, "\n".join(lines).encode())


def scored_by(models: Mapping[str, ModelFingerprint | None]) -> dict[str, str]:
    """A line of the card for the models whose signals were trained on."""
    named = [f"{_named(model)} as `{signal}`" for signal, model in sorted(models.items())]
    return {"scored by": ", ".join(named)} if named else {}


def _kept(card: Path) -> dict[str, Any]:
    from huggingface_hub import metadata_load

    try:
        found = metadata_load(card) if card.is_file() else None
    except (ValueError, OSError, yaml.YAMLError):  # a card that cannot be read says nothing
        found = None
    return {key: found[key] for key in KEPT if key in found} if isinstance(found, dict) else {}


def _teacher(lineage: StudentLineage) -> str:
    sft = lineage.sft
    if sft.proof in ("none", "unknown"):
        return "none is claimed" if sft.proof == "none" else "unknown"
    return f"{_named(sft.teacher) if sft.teacher else sft.name} ({sft.proof})"


def _named(model: ModelFingerprint | None) -> str:
    return "unknown" if model is None else f"{_short_name(model)} (`{model.identity[:12]}`)"


def _short_name(model: ModelFingerprint | None) -> str | None:
    if model is None or model.commit is not None:
        return model.source if model else None
    return Path(model.source).name
