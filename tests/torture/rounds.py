"""One round of torture: a stage, what happens to it, its resume, and what the two differ in."""

import gc
import importlib
import random
import re
import shutil
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from compare import contents, differences
from hurts import FAULTS, Hurt, drawn
from life import Life, live
from stages import STAGES, make_inputs

INDEX = "index.duckdb"
INDEX_LEFT = "builds it later"
"""What a life says that could not write the index, and is done without it."""
TWICE = 0.25
"""Share of the rounds whose resume is hurt too."""


@dataclass
class Whole:
    """A stage's undisturbed run."""

    contents: dict[str, tuple[str, int]]
    calls: int
    seconds: float


@dataclass
class Outcome:
    """What a round was and came to."""

    number: int
    stage: str
    hurts: list[str]
    faults: list[str]
    hits: list[bool]
    lives: int = 0
    files: int = 0
    bytes: int = 0
    cpu_s: float = 0.0
    findings: list[str] = field(default_factory=list)

    def as_plain(self) -> dict:
        """For a line of JSON."""
        return asdict(self)


class Torture:
    """A folder with inputs and undisturbed runs, in which rounds are played."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.inputs, self.work = folder, folder / "inputs", folder / "work"
        self.wholes: dict[str, Whole] = {}

    def prepare(self) -> None:
        """Make the inputs, where they are not there."""
        if not (self.inputs / ".ready").exists():
            shutil.rmtree(self.inputs, ignore_errors=True)
            make_inputs(self.inputs, self.work, self._succeed)
            (self.inputs / ".ready").touch()

    def _succeed(self, words: list[str]) -> Life:
        life = live(words, self.work, None)
        if life.code != 0:
            raise SystemExit(f"lightopd {' '.join(words)} fails unhurt:\n{life.err}")
        imported(life.modules)
        return life

    def _words(self, stage: str) -> list[str]:
        shutil.rmtree(self.work, ignore_errors=True)
        self.work.mkdir()
        STAGES[stage].prepare(self.inputs, self.work)
        return STAGES[stage].words(self.inputs, self.work)

    def whole(self, stage: str) -> Whole:
        """The stage's undisturbed run, made once, in the folder in which it will be hurt."""
        if stage not in self.wholes:
            life = self._succeed(self._words(stage))
            self.wholes[stage] = Whole(contents(self.work), life.calls, life.seconds)
        return self.wholes[stage]

    def play(self, number: int, stage: str, hurts: list[Hurt]) -> Outcome:
        """Hurt a stage as often as told, resume it by the same command, and look."""
        whole, words = self.whole(stage), self._words(stage)
        outcome = Outcome(number, stage, [str(hurt) for hurt in hurts], [hurt.fault for hurt in hurts], [])
        is_clock_back = is_index_left = False
        for hurt in hurts:
            life = live(words, self.work, hurt, is_clock_back=is_clock_back)
            outcome.lives += 1
            outcome.cpu_s += life.cpu_s
            outcome.hits.append(life.is_hit)
            if not _is_done(stage, life):
                outcome.findings += [f"{hurt}: {finding}" for finding in _answer(hurt, life)]
            is_clock_back = hurt.fault == "kill, clock back"
            is_index_left |= life.code == 0 and INDEX_LEFT in life.err
        life = live(words, self.work, None, is_clock_back=is_clock_back)
        outcome.lives += 1
        outcome.cpu_s += life.cpu_s
        if life.code != 0 and not _is_done(stage, life):
            outcome.findings.append(f"the resume ended with {life.code}: {life.err[-2000:]}")
        found, wanted = contents(self.work), whole.contents
        if is_index_left and _is_done(stage, life):
            wanted = {name: of for name, of in wanted.items() if name in found or Path(name).name != INDEX}
        outcome.findings += differences(found, wanted)
        outcome.files, outcome.bytes = len(found), sum(size for _, size in found.values())
        return outcome


def drawn_round(torture: Torture, seed: int, number: int, stages: list[str]) -> tuple[str, list[Hurt]]:
    """Stage and hurts of a round; every stage and fault comes up in turn, shuffled by the seed."""
    pairs = [(stage, fault) for stage in stages for fault in FAULTS]
    random.Random(seed).shuffle(pairs)
    stage, fault = pairs[number % len(pairs)]
    chance = random.Random(f"{seed}/{number}")
    whole = torture.whole(stage)
    faults = [fault, chance.choice(list(FAULTS))] if chance.random() < TWICE else [fault]
    return stage, [drawn(chance, fault, whole.calls, whole.seconds) for fault in faults]


def imported(modules: list[str]) -> None:
    """Import what a life had to, so that the next one need not, and keep it out of the garbage's way."""
    for name in modules:
        with suppress(Exception):  # some are made by others as they are imported
            importlib.import_module(name)
    gc.freeze()


def _is_done(stage: str, life: Life) -> bool:
    """Whether a process refused to do again what an earlier one had done."""
    says = STAGES[stage].says_when_done
    return says != "" and life.code > 0 and says in life.err


def _answer(hurt: Hurt, life: Life) -> list[str]:
    """What is wrong with the way in which a process took its hurt."""
    fault = FAULTS[hurt.fault]
    found = []
    if life.code not in fault.codes and not (life.code == 0 and not life.is_hit):
        found.append(f"ended with {life.code}, not with {fault.codes}: {life.err[-1500:]}")
    elif "Traceback" in life.err or "Exception ignored" in life.err:
        found.append(f"a traceback: {life.err[-3000:]}")
    elif life.code > 0 and fault.says and not any(re.search(word, life.err) for word in fault.says):
        found.append(f"its message has no remedy: {life.err[-500:]}")
    return found
