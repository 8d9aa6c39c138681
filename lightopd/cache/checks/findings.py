"""What a check of a cache found, and what can be done about it."""

from dataclasses import dataclass
from enum import Enum


class Mending(Enum):
    """How `lightopd verify --repair` deals with a finding."""

    NONE = "none"
    """It cannot: the finding says what to do."""
    STAGE = "stage"
    """Nothing is in the way; the stage makes what is missing."""
    ASIDE = "aside"
    """The file is moved aside, and the stage makes it again."""
    AFTER_ROLLOUTS = "after rollouts"
    """As `ASIDE`, unless the rollouts' shard that it was held against is moved aside itself."""
    INDEX = "index"
    """The file is moved aside and built again at once."""


@dataclass(frozen=True, slots=True)
class Finding:
    """Something in a cache that is not as it must be."""

    file: str
    """Path relative to the cache folder."""
    row: int | None
    """Row of the file, from 0; None where it is about the whole file."""
    what: str
    """What is wrong, in words."""
    mending: Mending = Mending.NONE

    def __str__(self) -> str:
        return f"{self.file}{'' if self.row is None else f' row {self.row}'}: {self.what}"
