"""The recipes on the demo's task: what each is given, and what stands in for inputs that the task has not."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lightopd.pipelines import DEMO, RECIPES
from lightopd.pipelines.methods import list_methods

METHODS = RECIPES / "methods"
TEACHER, STUDENT = DEMO / "teacher", DEMO / "student"
PROMPTS_PER_SEED = 2000
ROLLOUTS_PER_PROMPT = 4
TOP_K = 16
STEPS = 100
BATCH = 128
LEARNING_RATES = (1e-5, 1e-4, 1e-3)
SETTINGS = (
    f"running totals; {PROMPTS_PER_SEED:,} prompts with {ROLLOUTS_PER_PROMPT} rollouts of the student each, "
    f"top-{TOP_K} of 32 tokens; {STEPS} steps of {BATCH} rollouts, cosine schedule, 5 warm-up steps; "
    "2,000 held-out prompts at temperature 1"
)
"""The task in words, for the pages."""
SAMPLING = {"temperature": 1.0, "max_tokens": 20}
ANSWERS = Path("sft") / "answers"
"""Of the teacher, in a seed's folder."""

WITH_ANSWER = "{{ answer }};{{ prompt }}"
"""`90;12+7+30+41=` for `12+7+30+41=`."""
WITH_WRONG_ADDEND = (
    "{% set addends = prompt[:-1].split('+') %}"
    "{{ addends[:-1] | join('+') }}+{{ addends[-1] | int % 50 + 1 }}="
)
"""`12+7+30+42=` for `12+7+30+41=`."""


@dataclass(frozen=True, slots=True)
class Scorer:
    """What makes a signal."""

    model: Path
    role: Literal["teacher", "self", "reference"]
    template: str | None = None
    """What it sees instead of the prompt."""


SIGNALS = {
    "teacher": Scorer(TEACHER, "teacher"),
    "reference": Scorer(STUDENT, "reference"),
    "rollout_student": Scorer(STUDENT, "reference"),
    "warmup": Scorer(STUDENT, "reference"),
    "dpo": Scorer(TEACHER, "teacher"),
    "reverse_dpo": Scorer(STUDENT, "reference"),
    "privileged": Scorer(TEACHER, "teacher"),
    "second_teacher": Scorer(TEACHER, "teacher", WITH_WRONG_ADDEND),
    "shown": Scorer(STUDENT, "self", WITH_ANSWER),
    "negative": Scorer(TEACHER, "reference", WITH_WRONG_ADDEND),
    **{f"exposure_{level}": Scorer(TEACHER, "teacher", WITH_WRONG_ADDEND) for level in (0, 1)},
    **{f"exposure_{level}": Scorer(TEACHER, "teacher") for level in (2, 3, 4)},
}

REFERENCE = "the reference is the student at rollout"
TURNS = "a turn is one of the three totals"
PRIVILEGED = "the teacher on the plain prompt plays the student that is shown the solution"
SHOWN = (
    "the student is shown the answer before the prompt (`90;12+7+30+41=`), which it has not learnt to read"
)
PAIRS = "4,000 rollouts: an answer of the teacher and one of the student to each prompt"


@dataclass(frozen=True, slots=True)
class Case:
    """A recipe and what it is given on the task."""

    recipe: str
    stand_in: str = ""
    """What stands in for an input that the task has not; empty where nothing has to."""
    changed: str = ""
    """Settings of the recipe that the task calls for, beside the common ones."""
    settings: Callable[[Path], Mapping[str, Any]] = lambda _folder: {}
    """The changed settings, for the train config, from the folder of a seed."""
    name: str = ""
    """Name of the run, the recipe's when it has only one."""
    cache: Literal["plain", "pairs"] = "plain"
    """Rollouts of the student, or pairs of an answer of the teacher and one of the student."""

    @property
    def run(self) -> str:
        """Name of the run's folder and figures."""
        return self.name or self.recipe


TEXTS: dict[str, dict[str, Any]] = {
    **{
        name: {"model": str(TEACHER), "template": "{{ prompt }}", "value": r"(\d+)"}
        for name in ("confidence", "second_confidence")
    },
    "feedback_shown": {"model": str(STUDENT), "role": "self", "gives": "context", "template": WITH_ANSWER},
    "continuations": {
        "model": str(TEACHER),
        "gives": "branches",
        "template": "continue",
        "branches": {"places": 2},
    },
}
"""Text columns: what writes them, and from what."""
SELF_TAUGHT = ("opsd", "opsd_code", "opsd_sampled", "mgsd")
SPECIAL = (
    *(Case(name, REFERENCE) for name in ("g_opd", "g_opd_baseline", "exopd", "exopd_baseline")),
    Case(
        "aligndistil",
        "the preference model is the teacher, the reverse-preference model the student at rollout",
    ),
    Case("sod", TURNS),
    Case("tcod", f"{TURNS}; all three are trained from step 4 on"),
    *(Case(name, PRIVILEGED) for name in SELF_TAUGHT),
    Case(
        "atesd",
        "exposures 0 and 1 are the teacher on the prompt with another last addend, "
        "2 to 4 on the plain prompt",
    ),
    *(
        Case(
            name,
            SHOWN,
            settings=lambda _: {"objective": {"signal": "shown"}},
            name=f"{name}_shown",
        )
        for name in SELF_TAUGHT
    ),
    Case(
        "mad_opd",
        "the second teacher is the first on the prompt with another last addend; no debate, and both are "
        "as sure as each other",
    ),
    Case("vpd", f"{PRIVILEGED}, after its training"),
    Case("vpd_teacher", SHOWN),
    Case("vision_opd", f"{PRIVILEGED}, on the teacher's own top-k"),
    Case("pipo", "the support is the teacher's top-k alone"),
    Case("caopd", f"{PRIVILEGED}; no confidence is stated"),
    Case("zppo", "the prompts are the plain ones"),
    Case("omniopd", f"{REFERENCE}; two chunks of four tokens a rollout, two continuations of each"),
    Case("erpd", f"the over-optimised model is the teacher; {REFERENCE}"),
    Case("brts", PAIRS, cache="pairs"),
    Case("v_zero", "the evidence is the prompt; wrong evidence is the prompt with another last addend"),
    *(
        Case(name, PAIRS, cache="pairs")
        for name in ("decoupling_teacher_fkl", "decoupling_teacher_rkl", "soda")
    ),
    Case("trd", f"{PAIRS}; its answers are the rewritten ones, scored on the plain prompt", cache="pairs"),
    Case("raft", f"{PAIRS}; {PRIVILEGED}, and its answers are the refined ones", cache="pairs"),
    Case(
        "video_opd",
        changed="prompts: 1000",
        settings=lambda folder: {
            "objective": {
                "select": [
                    {
                        "kind": "teacher_validated",
                        "answers": str(folder / ANSWERS),
                        "min_teacher": 0.5,
                        "sampler": "top",
                        "prompts": 1000,
                    }
                ]
            }
        },
    ),
    Case(
        "decoupling_lengths",
        changed="lengths: [4, 8, 12], min_entropy: 0",
        settings=lambda _: {
            "objective": {"curriculum": {"kind": "lengths", "lengths": [4, 8, 12], "min_entropy": 0.0}}
        },
    ),
    Case(
        "extrapolation_cliff",
        REFERENCE,
        changed="guard: {action: warn}, since the recipe as it is refuses this cache",
        settings=lambda _: {"objective": {"extrapolate": {"guard": {"action": "warn"}}}},
    ),
)


def cases() -> list[Case]:
    """Every run, by recipe."""
    special: dict[str, list[Case]] = {}
    for case in SPECIAL:
        special.setdefault(case.recipe, []).append(case)
    plain = [method.name for method in list_methods(METHODS)]
    return [case for name in plain for case in special.get(name, [Case(name)])]
