"""The study: its arms are whole, its statistics and measures right, and its page is what the results say."""

import math
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor

import page
import pytest
from arms import STUDY, TUNING_SEED, Cell, combinations, prompts_seed, read_arms, read_regime, settings_of
from cells import QUICK, VALIDATION, cache_of, identity, made_once, run_of
from crowd import until
from make_tiny_models import SFT_SEED
from measures import extrapolated_kl, gradient_gap
from models import TEACHERS
from summary import best_tuning, interval, read_lines

from lightopd.config import build_run
from lightopd.pipelines import DEMO, RECIPES, rollout
from lightopd.schemas.configs import RolloutConfig

ARMS = read_arms()
TEACHER, STUDENT = DEMO / "teacher", DEMO / "student"


@pytest.fixture(scope="module")
def rollouts(tmp_path_factory):
    prompts = {"kind": "running_totals", "split": "train", "count": 12, "render": "plain"}
    cache = tmp_path_factory.mktemp("rollouts") / "cache"
    sampling = {"temperature": 1.0, "max_tokens": 20}
    rollout.run(RolloutConfig(prompts=prompts, student=str(STUDENT), cache=cache, sampling=sampling))
    return cache


@pytest.mark.parametrize("name", ARMS)
def test_every_run_of_an_arm_is_a_run_file(name):
    arm = ARMS[name]
    for regime in arm.regimes:
        assert arm.scorer in read_regime(regime)
        for grid in combinations(arm.grid):
            for tuned in combinations(arm.tune):
                settings = settings_of(arm, Cell(name, regime, grid, tuned, 3))
                run = build_run(settings | {"out": "X", "teacher": str(TEACHER), "student": str(STUDENT)})
                assert run.rollout["sampling"]["seed"] == run.train["seed"] == 3
                assert run.prompts.seed == prompts_seed(read_regime(regime), 3)


def test_every_question_has_an_arm_or_says_that_it_has_none():
    asked = {number for arm in ARMS.values() for number in arm.questions}
    assert asked <= set(page.QUESTIONS)
    assert all(arm.seeds >= 5 or not arm.trains for arm in ARMS.values())
    assert set(page.QUESTIONS) - asked == {9}, "its methods are measured with all others"
    assert set(page.ON_ONE_CACHE) <= {path.stem for path in (RECIPES / "methods").glob("*.yaml")}


def test_an_arm_that_is_tuned_like_another_names_one_that_is_tuned():
    for arm in ARMS.values():
        like = ARMS[arm.tuned_like] if arm.tuned_like else None
        assert like is None or (like.tune and not like.grid and set(arm.regimes) <= set(like.regimes))


def test_all_arms_that_search_try_the_same_number_of_settings():
    assert len({len(list(combinations(arm.tune))) for arm in ARMS.values() if arm.tune}) == 1


def test_tuning_prompts_are_none_that_a_measured_run_sees():
    for name in ("small_gap", "large_gap"):
        described = read_regime(name)
        seeds = {
            described["run"]["eval_prompts"]["seed"],
            described.get("sft", {}).get("prompts", {}).get("seed"),
        }
        assert VALIDATION["seed"] not in {*seeds, *range(5)}


def test_no_run_has_the_prompts_that_its_student_was_fine_tuned_on():
    for name in (path.stem for path in (STUDY / "regimes").glob("*.yaml")):
        regime = read_regime(name)
        seed = regime.get("finetuning_prompts_seed")
        made = TEACHERS.get(regime["teacher"])
        if seed is None:
            assert regime["teacher"] == "smollm2" or not made.with_student, name
            continue
        assert seed == (made.seed if made else 0) + SFT_SEED
        drawn = [prompts_seed(regime, own) for own in (*range(5), TUNING_SEED)]
        assert seed not in drawn
        assert len(set(drawn)) == 6


def test_an_interval_is_student_s_t_over_the_seeds():
    found = interval([1.0, 2.0, 3.0])
    assert found.mean == 2.0
    assert found.half_width == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)
    assert math.isnan(interval([1.0]).half_width)


def test_the_best_setting_is_that_of_the_highest_validation_accuracy():
    lines = [
        {
            "arm": "a",
            "regime": "r",
            "grid": {},
            "is_tuning": tuning,
            "tuned": {"lr": lr},
            "accuracy": accuracy,
            "kl": accuracy,
        }
        for lr, accuracy, tuning in ((1, 0.5, True), (2, 0.7, True), (3, 0.7, True), (4, 0.9, False))
    ]
    assert best_tuning(lines, ("a", "r", ())) == {"lr": 2}
    assert best_tuning(lines, ("a", "r", ()), lowest="kl") == {"lr": 1}
    assert best_tuning(list(reversed(lines)), ("a", "r", ())) == {"lr": 2}, "the lower of equals"
    assert best_tuning(lines, ("b", "r", ())) is None


def test_the_gradients_of_now_and_of_the_rollout_are_equal_before_the_first_step(rollouts):
    found = gradient_gap(STUDENT, TEACHER, STUDENT, rollouts)
    assert found.chi2 == found.gap == found.bound == 0.0
    assert found.gradient > 0.1


def test_the_teacher_has_no_gradient_with_samples_of_now_and_its_gap_is_below_the_bound(rollouts):
    at_teacher = gradient_gap(TEACHER, TEACHER, STUDENT, rollouts)
    assert at_teacher.gradient == pytest.approx(0.0, abs=1e-6)
    moved = gradient_gap(STUDENT, STUDENT, TEACHER, rollouts)
    other = gradient_gap(TEACHER, STUDENT, STUDENT, rollouts)
    assert moved.chi2 > 0
    assert 0 < other.gap <= other.bound


def test_the_target_of_exopd_lies_between_and_beyond_its_two_models(rollouts):
    at = {factor: extrapolated_kl(STUDENT, TEACHER, STUDENT, factor, rollouts) for factor in (0.0, 1.0, 1.5)}
    assert at[0.0] == pytest.approx(0.0, abs=1e-12)
    assert 0 < at[1.0] < at[1.5]
    assert extrapolated_kl(TEACHER, TEACHER, STUDENT, 1.0, rollouts) == pytest.approx(0.0, abs=1e-12)


def test_the_page_is_made_from_the_results():
    assert page.PAGE.read_text() == page.page(), "python benchmarks/study/page.py writes it"


def test_every_line_of_the_results_is_of_an_arm_that_there_is():
    lines = [line for name in ARMS for line in read_lines(page.RESULTS, name)]
    assert {path.stem for path in page.RESULTS.glob("*/*.jsonl")} <= set(ARMS)
    assert all(line["regime"] in ARMS[line["arm"]].regimes for line in lines)
    assert len({line["key"] for line in lines}) == len(lines)


def test_the_results_on_shipped_models_are_of_the_settings_of_today(tmp_path):
    for name, arm in ARMS.items():
        if arm.scorer != "teacher":
            continue  # its teacher is made by the study
        for line in read_lines(page.RESULTS, name):
            chosen = (tuple(line[kind].items()) for kind in ("grid", "tuned"))
            cell = Cell(name, line["regime"], *chosen, line["seed"])
            if cell.regime == "large_gap":
                assert line["identity"] == identity(
                    run_of(arm, cell, tmp_path), arm, line.get("device", "cpu")
                )


def test_a_cache_that_was_not_made_to_its_end_costs_what_a_whole_one_does(tmp_path):
    arm = ARMS["reverse_kl"]
    run = run_of(arm, Cell("reverse_kl", "large_gap", (), (), 0), tmp_path, QUICK)
    place, cost = cache_of(arm, run, tmp_path)
    assert cache_of(arm, run, tmp_path) == (place, cost)
    place.with_suffix(".json").unlink()
    shutil.rmtree(place / "signals")
    _, again = cache_of(arm, run, tmp_path)
    assert (place / "signals" / "teacher").is_dir()
    assert again["rollout_seconds"] == cost["rollout_seconds"]
    assert again["gap_nats"] == cost["gap_nats"]


def test_two_processes_make_a_folder_once(tmp_path, caplog):
    caplog.set_level("DEBUG", "filelock")  # which says when it waits
    begun, may_end = threading.Event(), threading.Event()

    def make(place):
        place.mkdir()
        begun.set()
        may_end.wait(60)
        return {"by": threading.current_thread().name}

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(made_once, tmp_path / "a" / "x", make)
        begun.wait(60)
        second = pool.submit(made_once, tmp_path / "a" / "x", make)
        until(lambda: "not acquired" in caplog.text, 60)
        may_end.set()
        assert first.result() == second.result()


def test_a_model_s_text_stands_on_the_page_as_it_is():
    assert page.in_a_cell("a|b <i>`x`\n") == "a&#124;b &lt;i&gt;\\`x\\`"
    answers = [{"prompt_text": "1 + 1?", "response_text": "2\nyes"}]
    lines = {"teacher": [{"regime": "smollm2", "texts": answers}], "untrained": [{"regime": "large_gap"}]}
    (shown,) = page.texts({name: ARMS[name] for name in lines}, lines)
    assert shown.splitlines()[0] == "| `smollm2`, greedily | 1 + 1? |"
    assert shown.splitlines()[2:] == ["| the teacher itself | 2<br>yes |"]
