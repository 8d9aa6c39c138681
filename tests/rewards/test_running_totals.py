import hashlib
import json
import random
from pathlib import Path

import demo_responses
import pytest

from lightopd.rewards import running_totals as tasks

DEMO = Path(__file__).parents[2] / "pipelines" / "demos" / "models"


def test_a_seed_gives_the_same_prompts_and_a_shorter_list_is_a_prefix():
    first = tasks.running_totals(7, 200)
    assert tasks.running_totals(7, 200) == first
    assert tasks.running_totals(7, 50) == first[:50]
    assert tasks.running_totals(8, 200) != first


def test_the_first_prompt_of_seed_0_never_changes():
    assert tasks.running_totals(0, 1) == [{"prompt": "25+49+27+3=", "answer": "104"}]


def test_prompts_do_not_repeat():
    assert len({row["prompt"] for row in tasks.running_totals(0, 5000)}) == 5000


def test_train_and_held_out_prompts_are_disjoint_for_any_seeds():
    train = {row["prompt"] for seed in range(3) for row in tasks.running_totals(seed, 3000)}
    held_out = {row["prompt"] for seed in range(3) for row in tasks.running_totals(seed, 1000, "heldout")}
    assert not train & held_out


def test_about_one_prompt_in_sixteen_is_held_out():
    prompts = [f"{a}+{b}+3+4=" for a in range(1, 51) for b in range(1, 51)]
    share = sum(tasks.split_of(prompt) == "heldout" for prompt in prompts) / len(prompts)
    assert abs(share - 1 / 16) < 0.015


def test_an_answer_is_the_sum_and_the_reference_earns_the_whole_reward():
    for row in tasks.running_totals(3, 500, "heldout"):
        addends = [int(part) for part in row["prompt"][:-1].split("+")]
        assert len(addends) == 4
        assert all(1 <= addend <= 50 for addend in addends)
        assert row["answer"] == str(sum(addends))
        assert tasks.total_reward(demo_responses.reference_response(row["prompt"]), row["answer"]) == 1.0


def test_the_reference_response_holds_every_running_total():
    assert demo_responses.reference_response("12+7+30+41=") == "19,49,90"
    assert demo_responses.reference_response("12+7+30+41=", from_last=True) == "71,78,90"


def test_the_longest_prompt_is_longer_than_all_that_are_drawn():
    longest = demo_responses.longest_prompt(4)
    rows = tasks.running_totals(0, 2000)
    assert longest == "50+50+50+50="
    assert max(len(row["prompt"]) for row in rows) <= len(longest)
    responses = [demo_responses.reference_response(row["prompt"]) for row in rows]
    assert max(map(len, responses)) <= len(demo_responses.reference_response(longest))


def test_a_longer_sum_has_as_many_numbers_as_requested_and_needs_every_total():
    for row in tasks.running_totals(3, 50, "heldout", addends=8):
        assert row["prompt"].count("+") == 7
        right = demo_responses.reference_response(row["prompt"])
        assert tasks.total_reward(right, row["answer"], addends=8) == 1.0
        assert tasks.total_reward(right, row["answer"]) == 0.0
        assert tasks.total_reward(right.partition(",")[2], row["answer"], addends=8) == 0.0


def test_more_prompts_than_a_short_sum_has_are_refused_with_what_there_are():
    with pytest.raises(ValueError, match="2000 prompts of 2 numbers cannot be drawn from about 156"):
        tasks.running_totals(0, 2000, "heldout", addends=2)


def test_a_corrupted_response_has_one_wrong_digit_and_goes_on_from_what_is_written():
    rng = random.Random(0)
    wrong_totals = set()
    for row in tasks.running_totals(0, 300):
        first, *addends = [int(part) for part in row["prompt"][:-1].split("+")]
        right = demo_responses.reference_response(row["prompt"])
        response, index = demo_responses.corrupted_response(row["prompt"], rng)
        assert response[:index] == right[:index]
        assert response[index].isdigit()
        assert response[index] != right[index]
        totals = response.split(",")
        previous, mistakes = first, []
        for position, (addend, total) in enumerate(zip(addends, totals, strict=True)):
            if int(total) != previous + addend:
                expected = str(previous + addend)
                assert sum(a != b for a, b in zip(total, expected, strict=True)) == 1
                mistakes.append(position)
            previous = int(total)
        assert mistakes == [response[:index].count(",")]
        wrong_totals.update(mistakes)
    assert wrong_totals == {0, 1, 2}


@pytest.mark.parametrize("prompt", ["", "12+7", "12=", "a+b=", "1++2=", "-1+2=", "1+2==", " 1+2="])
def test_a_prompt_of_another_form_is_refused_with_its_text(prompt):
    with pytest.raises(ValueError, match="expected a prompt like") as caught:
        demo_responses.reference_response(prompt)
    assert repr(prompt) in str(caught.value)


@pytest.mark.parametrize("count", [-1, 100_001])
def test_a_count_out_of_range_is_refused(count):
    with pytest.raises(ValueError, match=str(count)):
        tasks.running_totals(0, count)


def test_only_the_last_total_decides():
    assert tasks.total_reward("19,49,90", "90") == 1.0
    assert tasks.total_reward("18,48,90", "90") == 1.0
    assert tasks.total_reward("19,49,91", "90") == 0.0


@pytest.mark.parametrize(
    "response",
    ["", "90", ",", ",,90", "49,90", "1,19,49,90", "19,49,90,", "19,49,090", "19, 49, 90", "19,49,90\n",
     "19,49,90<eos>", "19,49,", "x,49,90", "19,49,9", "\u0661,\u0662,90"],
)  # fmt: skip
def test_malformed_text_earns_nothing(response):
    assert tasks.total_reward(response, "90") == 0.0


def sha256_of(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def provenance_of(name: str) -> dict[str, object]:
    return json.loads((DEMO / name / "provenance.json").read_text())


@pytest.mark.parametrize("name", ["teacher", "base", "student"])
def test_the_provenance_beside_a_shipped_model_names_its_own_weights(name):
    assert provenance_of(name)["sha256"] == sha256_of(DEMO / name / "model.safetensors")


def test_the_shipped_student_names_the_shipped_teacher_and_base():
    student = provenance_of("student")
    assert student["teacher_sha256"] == sha256_of(DEMO / "teacher" / "model.safetensors")
    assert student["base_sha256"] == sha256_of(DEMO / "base" / "model.safetensors")


def test_the_shipped_models_share_one_tokenizer_and_stay_small():
    tokenizers = {(DEMO / name / "tokenizer.json").read_bytes() for name in ("teacher", "base", "student")}
    assert len(tokenizers) == 1
    assert sum(file.stat().st_size for file in DEMO.rglob("*") if file.is_file()) < 7_000_000
