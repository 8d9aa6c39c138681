import sys

import pytest

from lightopd.errors import ConfigError, InputError
from lightopd.rewards.reward import find_verifier, reward_of
from lightopd.schemas.records import Prompt


def prompt(verifier: str | None, answer: str | None = "42", **metadata: object) -> Prompt:
    return Prompt("p1", None, "question", answer=answer, verifier=verifier, metadata=metadata)


@pytest.fixture
def user_module(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text(
        "def length(response, answer, metadata):\n    return len(response) / metadata['longest']\n"
        "def told(response, answer, metadata):\n    return float(response)\n"
        "def nothing(response, answer, metadata):\n    return None\n"
        "number = 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("my_rewards", None)
    find_verifier.cache_clear()


def test_a_prompt_without_a_verifier_has_no_reward():
    assert reward_of(prompt(None), "42") is None


@pytest.mark.parametrize(
    ("response", "reward"),
    [("42", 1.0), (" 42\n", 1.0), ("4 2", 0.0), ("42.0", 0.0), ("the answer is 42", 0.0), ("", 0.0)],
)
def test_exact_compares_the_whole_response(response, reward):
    assert reward_of(prompt("exact"), response) == reward


def test_exact_takes_any_white_space_as_one():
    assert reward_of(prompt("exact", answer="a b\nc"), "a  b c ") == 1.0


@pytest.mark.parametrize(
    ("response", "answer", "reward"),
    [
        ("so 40 + 2 = 42.", "42", 1.0),
        ("42, not 41", "42", 0.0),
        ("it is 42.00", "42", 1.0),
        ("$1,234.50", "1234.5", 1.0),
        ("1{,}234", "1,234", 1.0),
        ("12,34", "34", 1.0),
        ("1,2345", "2345", 1.0),
        ("x = -3", "-3", 1.0),
        ("x = \u22123", "-3", 1.0),
        ("5-3", "3", 1.0),
        ("(2)-3", "3", 1.0),
        ("pages 10-20", "20", 1.0),
        ("0.1", ".1", 1.0),
        ("2e3", "2000", 1.0),
        ("1.2.3", "3", 1.0),
        (r"\boxed{42} is right, as 6*7 shows", "42", 1.0),
        (r"\boxed{1} or rather \boxed{\text{is } 42}", "42", 1.0),
        (r"\boxed{4", "4", 1.0),
        (r"\boxed{none} 42", "42", 0.0),
        ("0.30000000000000001", "0.3", 0.0),
        ("9" * 4000, "9" * 4000, 1.0),
        ("no number", "42", 0.0),
        ("", "42", 0.0),
        ("72", "work\n#### 72", 1.0),
    ],
)
def test_last_number_compares_numbers(response, answer, reward):
    assert reward_of(prompt("last_number", answer=answer), response) == reward


def test_last_number_needs_a_number_in_the_answer():
    with pytest.raises(InputError, match="last_number needs an answer with a number in it, got 'x'"):
        reward_of(prompt("last_number", answer="x"), "42")


def test_running_totals_is_the_demo_tasks_own_verifier():
    assert reward_of(prompt("running_totals", answer="90"), "19,49,90") == 1.0
    assert reward_of(prompt("running_totals", answer="90"), "90") == 0.0


def test_math_verify_knows_equal_expressions_or_says_what_to_install():
    half = prompt("math_verify", answer=r"$\frac{1}{2}$")
    try:
        import math_verify  # noqa: F401
    except ImportError:
        with pytest.raises(ConfigError, match="pip install math-verify"):
            reward_of(half, "$0.5$")
        return
    assert reward_of(half, r"so it is $\frac{2}{4}$") == 1.0
    assert reward_of(half, "$0.4$") == 0.0


@pytest.mark.usefixtures("user_module")
def test_a_function_by_import_path_gets_response_answer_and_metadata():
    assert reward_of(prompt("my_rewards:length", answer=None, longest=8), "four") == 0.5


@pytest.mark.usefixtures("user_module")
@pytest.mark.parametrize("told", ["nan", "inf", "-0.1", "1.1"])
def test_a_reward_outside_0_to_1_is_refused(told):
    with pytest.raises(InputError, match=rf"my_rewards:told on prompt p1 returned {told}"):
        reward_of(prompt("my_rewards:told"), told)


@pytest.mark.usefixtures("user_module")
def test_a_reward_that_is_no_number_is_refused():
    with pytest.raises(InputError, match="returned None; a reward is a number from 0 to 1"):
        reward_of(prompt("my_rewards:nothing"), "x")


@pytest.mark.usefixtures("user_module")
def test_a_function_that_fails_is_one_line_with_its_cause():
    with pytest.raises(
        InputError, match=r"my_rewards:told on prompt p1 failed with ValueError: could not"
    ) as refused:
        reward_of(prompt("my_rewards:told"), "no number")
    assert "\n" not in str(refused.value)
    assert isinstance(refused.value.__cause__, ValueError)


@pytest.mark.usefixtures("user_module")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_module_here:f", "cannot be imported: No module named"),
        ("my_rewards:no_such", "cannot be imported: .*no_such"),
        ("my_rewards:number", "is a int; name a function"),
        (":f", "cannot be imported"),
        ("exakt", "did you mean exact"),
        ("quality", "use exact, last_number"),
    ],
)
def test_an_unusable_verifier_is_a_config_error(name, message):
    with pytest.raises(ConfigError, match=message):
        find_verifier(name)
