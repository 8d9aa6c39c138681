"""DP-SGD's gradient: each rollout's clipped to one length, added up, and noise put on the sum."""

import hashlib
import math

import torch
from torch import Tensor, nn

from lightopd.schemas.finetune import PrivacyConfig


class PrivateGradients:
    """Takes each rollout's gradient off the model, and gives the step's back.

    The losses are divided by the step's expected number of rollouts B, so lengths are compared with clip / B
    and the noise has the standard deviation noise * clip / B: (sum clip(g_i, C) + N(0, noise^2 C^2)) / B.

    Args:
        config: clip and noise.
        model: what is trained.
        batch_sequences: B.
        key: of the noise; whoever has it can take the noise off.

    Source: arXiv 2604.04461, algorithm 1; arXiv 1607.00133.
    """

    def __init__(self, config: PrivacyConfig, model: nn.Module, batch_sequences: int, key: int) -> None:
        self.clip = math.inf if config.clip is None else config.clip / batch_sequences
        self.deviation = config.noise * self.clip if config.noise else 0.0
        self.key = key
        self._trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._sums: list[Tensor | None] = [None] * len(self._trained)
        self._was_clipped: list[Tensor] = []

    def add_rollout(self) -> None:
        """Clip the gradient that the model has, add it to the step's, and leave none."""
        own = [parameter.grad for parameter in self._trained if parameter.grad is not None]
        lengths = [torch.linalg.vector_norm(gradient, dtype=torch.float64) for gradient in own]
        length = torch.stack(lengths).norm()
        factor = (self.clip / length).clamp(max=1.0)
        self._was_clipped.append(factor < 1)
        for place, parameter in enumerate(self._trained):
            gradient, total = parameter.grad, self._sums[place]
            if gradient is None:
                continue
            gradient.mul_(factor.to(gradient.dtype))
            self._sums[place] = gradient if total is None else total.add_(gradient)
            parameter.grad = None

    def finish(self, step: int) -> dict[str, float]:
        """Give the model the step's gradient, noise included; the share of its rollouts that was clipped.

        Args:
            step: its number, from 0, which with the key decides the noise.
        """
        was_clipped, self._was_clipped = self._was_clipped, []
        sums, self._sums = self._sums, [None] * len(self._trained)
        generators: dict[torch.device, torch.Generator] = {}
        for parameter, total in zip(self._trained, sums, strict=True):
            if self.deviation:
                generator = generators.setdefault(parameter.device, self._generator(parameter.device, step))
                noise = torch.randn(parameter.shape, generator=generator, device=parameter.device)
                noise = (noise * self.deviation).to(parameter.dtype)
                # A weight that no rollout has reached is noised as well: which ones were is not said.
                total = noise if total is None else total.add_(noise)
            parameter.grad = total
        if not was_clipped:
            return {"clipped_rollouts": math.nan}
        return {"clipped_rollouts": float(torch.stack(was_clipped).double().mean())}

    def _generator(self, device: torch.device, step: int) -> torch.Generator:
        digest = hashlib.sha256(f"noise {self.key} {step}".encode()).digest()
        return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little"))
