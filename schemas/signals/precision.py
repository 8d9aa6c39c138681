"""How exactly a signal keeps the log-probabilities of its entries; those of sampled tokens are float32."""

from collections.abc import Mapping
from typing import Literal

TopkDtype = Literal["float32", "float16", "sixteenths", "eighths", "quarters"]
"""All of float32; the nearest float16 value; the nearest multiple of a part of a nat, for the tail too."""

STEP_NATS: Mapping[str, float] = {"sixteenths": 1 / 16, "eighths": 1 / 8, "quarters": 1 / 4}
"""Distance of the values that are stored; none is off by more than half of it."""
