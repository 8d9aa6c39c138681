"""avg@k of the student while it is trained, on prompts with answers.

The live module answers: its weights are neither copied nor loaded again. Random numbers follow from seed,
prompt and sample index alone, so no generator of the run moves, and neither the number of devices nor a
resumed run changes an answer beyond rounding in the logits.
"""

# P = prompts, S = answers to each

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lightopd.engines.base import check_prompts
from lightopd.engines.hf.generate import generate
from lightopd.engines.stop_strings import readers_of
from lightopd.errors import InputError
from lightopd.models.head import head_of
from lightopd.models.load import LoadedModel, context_length_of
from lightopd.prompts.render import RenderedPrompts, render_prompts
from lightopd.prompts.tokens import response_text
from lightopd.rewards.reward import reward_of
from lightopd.schemas.configs import AccuracyConfig, ModelConfig
from lightopd.training.measures.evaluation import accuracy
from lightopd.training.student.compile import uncompiled

log = logging.getLogger(__name__)

AVG_AT_K = "avg_at_k"
"""Name of the metric: mean reward over prompts and answers, NaN in steps without a measurement."""


@dataclass(frozen=True, slots=True)
class AccuracyMeter:
    """Prompts that a reward can be given for, ready to be put to the student; see `make_meter`."""

    rendered: RenderedPrompts
    config: AccuracyConfig

    def is_due(self, step: int) -> bool:
        """Whether step `step`, counted from 1, is to be measured even if it is not the last."""
        return step % self.config.every == 0

    def num_answers(self, steps: int) -> int:
        """Answers that are generated in a run of so many steps."""
        return -(-steps // self.config.every) * len(self.rendered.prompts) * self.config.sampling.n

    def measure(
        self,
        student: PreTrainedModel,
        step: int,
        place: tuple[int, int],
        reduce: Callable[[Tensor], Tensor],
    ) -> float:
        """Mean reward of the student's answers, the same on every rank; logged.

        Args:
            student: whole on this device; it comes back in the mode that it was in.
            step: for the log.
            place: this rank and their number; each rank answers its share of the prompts.
            reduce: adds a tensor up over the ranks; called once.

        Raises:
            EngineError: NaN or +inf logits, or not enough memory.
            InputError: the verifier fails on an answer.
        """
        began_s = time.monotonic()
        with _answering(student) as loaded:
            rewards_PS = reduce(self._rewards(loaded, *place))
        ids = [prompt.prompt_id for prompt in self.rendered.prompts for _ in range(rewards_PS.shape[1])]
        found = accuracy(ids, rewards_PS.flatten().tolist())
        assert found is not None
        log.info(
            "step %d: avg@%d %.4f, standard error %.4f over %d prompts, %.1f s",
            step,
            rewards_PS.shape[1],
            found.avg_at_k,
            found.standard_error,
            len(self.rendered.prompts),
            time.monotonic() - began_s,
        )
        return found.avg_at_k

    def _rewards(self, loaded: LoadedModel, rank: int, world_size: int) -> Tensor:
        """float32 [P, S], as a cache stores them; zero where another rank answers."""
        num_prompts, num_samples = len(self.rendered.prompts), self.config.sampling.n
        rows = [(p, s) for p in range(rank, num_prompts, world_size) for s in range(num_samples)]
        samples = generate(
            loaded,
            [self.rendered.prompt_ids[p] for p, _ in rows],
            self.config.sampling,
            [f"{self.rendered.prompts[p].prompt_id}/{s}" for p, s in rows],
            self.rendered.stops,
            self.config.generate_rollouts,
            "accuracy.generate_rollouts",
            readers_of(self.rendered.tokenizer, self.config.sampling),
        )
        rewards_PS = torch.zeros(num_prompts, num_samples)
        for (p, s), sample in zip(rows, samples, strict=True):
            reward = reward_of(
                self.rendered.prompts[p], response_text(sample.response_ids, self.rendered.tokenizer)
            )
            assert reward is not None
            rewards_PS[p, s] = reward
        return rewards_PS.to(loaded.device)


def make_meter(config: AccuracyConfig, student: ModelConfig) -> AccuracyMeter:
    """Load and render the prompts, and judge an empty answer to each; no weights are read.

    What a verifier cannot judge, for want of a package or of a number in an answer, would otherwise end the
    run at its first measurement.

    Raises:
        InputError: unusable prompts, none with an answer, one that leaves no room for a response, or one
            that the verifier fails on.
        ConfigError: a verifier is unknown or its package is missing, or there is no chat template.
    """
    rendered = render_prompts(config.prompts, student)
    judged = [row for row, prompt in enumerate(rendered.prompts) if prompt.verifier is not None]
    if not judged:
        raise InputError(
            f"none of the {len(rendered.prompts)} prompts of accuracy has an answer, so no reward can be "
            "given; add the column answer, or leave out accuracy"
        )
    prompts = [rendered.prompts[row] for row in judged]
    prompt_ids = [rendered.prompt_ids[row] for row in judged]
    limits = rendered.limits
    check_prompts(
        prompt_ids, [prompt.prompt_id for prompt in prompts], limits.vocabulary_size, limits.context_length
    )
    for prompt in prompts:
        reward_of(prompt, "")
    return AccuracyMeter(replace(rendered, prompts=prompts, prompt_ids=prompt_ids), config)


@contextmanager
def _answering(student: PreTrainedModel) -> Iterator[LoadedModel]:
    """The student as an engine runs it, for a while.

    Out of training mode, because recomputed activations and a key-value cache exclude each other. In float32,
    as the exported student is stored and evaluated, under mixed precision too; only flash attention, which
    knows no float32, is left the trainer's own precision.
    """
    head = head_of(student)
    device = head.weight_VD.device
    is_flash = (student.config._attn_implementation or "").startswith("flash")
    modes = [(module, module.training) for module in student.modules()]
    student.eval()
    try:
        autocast = nullcontext() if is_flash else torch.autocast(device.type, enabled=False)
        with autocast, uncompiled(student):
            yield LoadedModel(student, head, device, context_length_of(student))
    finally:
        for module, is_training in modes:
            module.training = is_training
