"""What the walk over the vocabulary is given, and what it keeps for every position."""

# N = positions, D = hidden size, V = vocabulary, K = own top-k, T = tokens in one tile
# F = vectors averaged by the student, G = vectors that average its logits
# U = slots for the distinct ids requested at a position (as many slots as ids requested)

from typing import NamedTuple

import torch
from torch import Tensor

# Stand-ins for minus infinity that stay finite, so that 0 * value is 0 and not NaN. Inside a tile the logits
# of requested tokens are sunk to SUNK; a running maximum starts at FLOOR, so exp(SUNK - maximum) is 0 even
# where every token was requested.
SUNK = -1e30
FLOOR = -1e20


class Inputs(NamedTuple):
    """What the logits are made of."""

    hidden_ND: Tensor
    weight_VD: Tensor
    bias_V: Tensor | None


class Walk(NamedTuple):
    """How the logits are made, and in which pieces.

    logits = softcap * tanh((hidden @ weight.T + bias) / softcap) / temperature, in `dtype`; the factors of
    each matrix product are held in `operand_dtype`.
    """

    softcap: float | None
    temperature: float
    chunk_tokens: int
    tile_vocab: int
    dtype: torch.dtype
    operand_dtype: torch.dtype
    is_fused: bool = False
    """Whether a tile is read once by a kernel of Triton's, or several times by torch's operations."""


class Vectors(NamedTuple):
    """Fixed vectors over the vocabulary, finite, in the dtype of the walk; they get no gradient."""

    averaged_FV: Tensor
    """The student's probabilities average these: sum_v s_v a_v."""
    weighing_GV: Tensor
    """These weigh the student's logits: sum_v c_v z_v."""

    def tile(self, tile: slice) -> "Vectors":
        """Their entries at the tokens of a tile."""
        return Vectors(self.averaged_FV[:, tile], self.weighing_GV[:, tile])


class VocabularySums(NamedTuple):
    """Sums over the tokens that were not requested, and the logits of those that were.

    sum_N adds up exp(z - max_N), moment_N adds up exp(z - max_N) * (z - max_N), and averages_NF adds up
    exp(z - max_N) times a vector. Only weighed_NG, a vector times z, is over all tokens. An empty sum leaves
    max_N at FLOOR. requested_NU is minus infinity in slots without a token.
    """

    max_N: Tensor
    sum_N: Tensor
    moment_N: Tensor
    requested_NU: Tensor
    top_ids_NK: Tensor
    top_logits_NK: Tensor
    averages_NF: Tensor
    weighed_NG: Tensor


class VectorGradient(NamedTuple):
    """What fixed vectors add to the gradient by every logit."""

    moment_N: Tensor
    averaged_NF: Tensor
    weighing_NG: Tensor


class LogitGradient(NamedTuple):
    """Gradient of the loss by every logit, in closed form.

    It is scale_N * exp(z - max_N) for a token that was not requested and requested_NU for one that was. With
    vectors, exp(z - max_N) * (moment_N * (z - max_N) + averaged_NF @ averaged_FV) is added at the tokens that
    were not requested, and weighing_NG @ weighing_GV at all.
    """

    max_N: Tensor
    scale_N: Tensor
    requested_NU: Tensor
    by_vectors: VectorGradient | None = None

    def rows(self, rows: slice) -> "LogitGradient":
        """The part of a chunk's positions."""
        by_vectors = self.by_vectors and VectorGradient(*(field[rows] for field in self.by_vectors))
        return LogitGradient(self.max_N[rows], self.scale_N[rows], self.requested_NU[rows], by_vectors)


class Gradients(NamedTuple):
    """Gradients by the three inputs; None where nobody needs one."""

    hidden_ND: Tensor | None
    weight_VD: Tensor | None
    bias_V: Tensor | None
