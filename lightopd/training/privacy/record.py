"""What a private run keeps to itself: the key of its draws and its noise, and how many prompts it has.

`OUT/privacy.json` lets a run be resumed with the same draws. Whoever reads it can take the noise off again,
so it stays with the cache and is never published.
"""

import json
import math
import secrets
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lightopd.errors import TrainingError
from lightopd.files import json_bytes, write_atomically
from lightopd.schemas.finetune import FinetuneConfig, PrivacyConfig
from lightopd.training.privacy.accounting import check_passes, epsilon, sampling_rate

PRIVACY = "privacy.json"


@dataclass(frozen=True, slots=True)
class PrivacyRecord:
    """The secret of a run, and the number that its bound rests on."""

    key: int
    num_prompts: int


def record_of(
    out: Path, finetune: FinetuneConfig, groups_P: NDArray[np.int64], step: int
) -> PrivacyRecord | None:
    """The run's record, made where it begins; None where it is not private.

    Args:
        out: folder of the run.
        finetune: of the run.
        groups_P: number of the prompt of each rollout that is trained on.
        step: steps already done.

    Raises:
        TrainingError: the run has begun, and its record is gone.
        ConfigError: batch and sampling do not fit the cache.
    """
    config = finetune.privacy
    if config is None:
        return None
    num_prompts = len(np.unique(groups_P))
    sampling_rate(finetune.batch_sequences, num_prompts)
    check_passes(config, finetune.batch_sequences, num_prompts, len(groups_P))
    found = read_record(out)
    if found is None and step:
        raise TrainingError(
            f"{out / PRIVACY} is gone, without which step {step} cannot be resumed under the same noise; put "
            "it back, or train into a new folder"
        )
    if found is None:
        key = secrets.randbits(64) if config.seed is None else config.seed
        found = PrivacyRecord(key, num_prompts)
        out.mkdir(parents=True, exist_ok=True)
        write_atomically(out / PRIVACY, json_bytes({"key": key, "num_prompts": num_prompts}))
        (out / PRIVACY).chmod(0o600)
    return found


def read_record(out: Path) -> PrivacyRecord | None:
    """The record of a run that has begun."""
    path = out / PRIVACY
    if not path.is_file():
        return None
    try:
        return PrivacyRecord(**json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise TrainingError(
            f"{path} is damaged ({error}); put it back, or train into a new folder"
        ) from error


def privacy_spent(out: Path, finetune: FinetuneConfig, steps: int) -> dict[str, float | str | None]:
    """What the report of a run says of its privacy; nothing where it is not private."""
    config, record = finetune.privacy, read_record(out)
    if config is None or record is None:
        return {}
    return _spent(finetune, config, steps, record.num_prompts)


def _spent(
    finetune: FinetuneConfig, config: PrivacyConfig, steps: int, prompts: int
) -> dict[str, float | str | None]:
    size = finetune.batch_sequences
    spent = epsilon(config, steps=steps, batch_sequences=size, num_prompts=prompts)
    return {
        "epsilon": None if math.isinf(spent) else spent,
        "delta": config.delta,
        "noise_multiplier": config.noise,
        "clip": config.clip,
        "sampling": config.sampling,
        "sampling_rate": sampling_rate(size, prompts),
        "accountant": config.accountant,
    }


def planned_privacy(finetune: FinetuneConfig, num_prompts: int) -> dict[str, float | str | None]:
    """What a run would have spent after its last step; nothing where it is not private.

    Args:
        finetune: of the run.
        num_prompts: prompts of the cache; those without a trained token are not trained on.
    """
    if finetune.privacy is None:
        return {}
    return _spent(finetune, finetune.privacy, finetune.steps, num_prompts)


def privacy_notes(spent: dict[str, float | str | None]) -> tuple[str, ...]:
    """What a reader of the bound must not miss."""
    if not spent:
        return ()
    if spent["epsilon"] is None:
        return ("privacy.noise is 0: nothing is private",)
    return (
        f"({spent['epsilon']:.3g}, {spent['delta']:.3g}) differential privacy of a prompt with its rollouts, "
        "for the weights alone: cache, metrics.csv and privacy.json speak of single prompts; keep them back",
    )
