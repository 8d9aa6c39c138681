"""The privacy that a run spends, by Opacus's accountants."""

import math
import warnings

from lightopd.errors import ConfigError
from lightopd.schemas.finetune import PrivacyConfig


def sampling_rate(batch_sequences: int, num_prompts: int) -> float:
    """Probability with which a prompt is in a step.

    Raises:
        ConfigError: a step is to have more rollouts than there are prompts.
    """
    if batch_sequences > num_prompts:
        raise ConfigError(
            f"privacy draws each prompt once at most in a step: batch_sequences is {batch_sequences}, and "
            f"there are {num_prompts} prompts; set it to that or less"
        )
    return batch_sequences / num_prompts


def check_passes(config: PrivacyConfig, batch_sequences: int, num_prompts: int, num_rollouts: int) -> None:
    """Refuse passes in which a prompt would meet one step twice, or two steps of one pass.

    Raises:
        ConfigError: names the numbers, and the other sampling.
    """
    if config.sampling != "passes":
        return
    remedy = "set privacy.sampling to poisson"
    if num_rollouts != num_prompts:
        raise ConfigError(
            f"privacy.sampling passes needs one rollout of each prompt, and {num_prompts} prompts have "
            f"{num_rollouts}; {remedy}, or sample with n: 1"
        )
    if num_prompts % batch_sequences:
        raise ConfigError(
            f"privacy.sampling passes needs whole passes: {num_prompts} prompts are no multiple of "
            f"batch_sequences {batch_sequences}, so a step would hold the end of one and the beginning of "
            f"the next; {remedy}, or choose a divisor"
        )


def epsilon(config: PrivacyConfig, *, steps: int, batch_sequences: int, num_prompts: int) -> float:
    """The epsilon of (epsilon, delta) after so many steps; infinite without noise.

    Neighbours differ in one prompt, whose rollouts are there or not; its share of the sum of a step is at
    most the clip. Poisson sampling is the accountants' own. In passes a prompt is in one step of each, and
    nothing is gained from who else was drawn: the Gaussian mechanism at rate 1, once for each pass begun.
    """
    if config.noise == 0:
        return math.inf
    from opacus.accountants import create_accountant

    rate = sampling_rate(batch_sequences, num_prompts)
    uses = (rate, steps) if config.sampling == "poisson" else (1.0, math.ceil(steps * rate - 1e-9))
    accountant = create_accountant(config.accountant)
    accountant.history = [(config.noise, *uses)]
    with warnings.catch_warnings():
        # Orders beyond the list would tighten the bound; it holds as it is. Rate 1 has a log of zero.
        warnings.simplefilter("ignore")
        return float(accountant.get_epsilon(delta=config.delta))
