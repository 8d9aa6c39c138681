import json
import pickle
from decimal import Decimal
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lightopd.errors import ConfigError, InputError
from lightopd.prompts.load import load_prompts
from lightopd.rewards.reward import reward_of
from lightopd.schemas.configs import FilePrompts, ReasoningGymPrompts, RunningTotalsPrompts


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    return path


def load(path: Path, **settings: object):
    return load_prompts(FilePrompts.model_validate({"path": path, **settings}))


def test_rows_with_text_or_messages_become_prompts_in_order(tmp_path):
    turns = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    path = write(
        tmp_path / "p.jsonl",
        {"prompt": "1+1", "answer": 2, "id": 7, "domain": "math"},
        {"messages": turns, "id": "chat"},
    )
    first, second = load(path, verifier="last_number")
    assert (first.prompt_id, first.text, first.messages) == ("7", "1+1", None)
    assert (first.answer, first.domain, first.verifier) == ("2", "math", "last_number")
    assert (second.prompt_id, second.text, second.messages) == ("chat", None, tuple(turns))
    assert (second.answer, second.domain, second.verifier) == (None, None, None)


def test_the_id_of_a_row_without_one_depends_on_its_prompt_alone(tmp_path):
    one = load(write(tmp_path / "one.jsonl", {"prompt": "a"}, {"prompt": "b", "answer": "x"}))
    other = load(write(tmp_path / "other.jsonl", {"prompt": "b", "more": 1}, {"prompt": "c"}))
    assert one[1].prompt_id == other[0].prompt_id
    assert len({prompt.prompt_id for prompt in (*one, *other)}) == 3


def test_limit_takes_the_first_rows_and_reads_no_further(tmp_path):
    path = write(tmp_path / "p.jsonl", {"prompt": "a"}, {"prompt": "b"}, "{broken")
    assert [prompt.text for prompt in load(path, limit=2)] == ["a", "b"]


def test_empty_lines_and_a_byte_order_mark_are_no_rows(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_bytes('\ufeff{"prompt": "a"}\n\n{"prompt": "b"}\n\n'.encode())
    assert [prompt.text for prompt in load(path)] == ["a", "b"]


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("x", "x"),
        ("", ""),
        (2, "2"),
        (2.0, "2"),
        (2.5, "2.5"),
        (-3, "-3"),
        (None, None),
        (10**20, str(10**20)),
    ],
)
def test_an_answer_is_text_or_a_number(tmp_path, answer, expected):
    (prompt,) = load(write(tmp_path / "p.jsonl", {"prompt": "a", "answer": answer}))
    assert prompt.answer == expected


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{broken", "row 7 is not valid JSON .*correct or remove it"),
        ("[1, 2]", "row 7 is a list; write one JSON object"),
        ({"question": "a"}, r"row 7 has neither `prompt` nor `messages` \(keys: \['question'\]\)"),
        ({"prompt": "a", "messages": []}, "row 7 has both `prompt` and `messages`"),
        ({"prompt": 3}, r"row 7: `prompt` is 3 \(int\); it must be text"),
        ({"prompt": ""}, "row 7: `prompt` is ''"),
        ({"messages": "hello"}, r"row 7: `messages` is 'hello' \(str\); it must be a list"),
        ({"messages": []}, "row 7: `messages` is .*at least one turn"),
        ({"messages": [{"role": "user"}]}, "row 7: turn 1 of `messages` .*needs `role` and `content`"),
        ({"messages": [{"role": "user", "content": "a"}, "b"]}, "row 7: turn 2 of `messages` is 'b'"),
        (
            {"messages": [{"role": "assistant", "content": "a"}]},
            "row 7 has an assistant's turn alone; put a user's turn before it",
        ),
        ({"prompt": "a", "answer": ["x"]}, "row 7: `answer` is .*text or a finite number"),
        ({"prompt": "a", "answer": True}, r"row 7: `answer` is True \(bool\)"),
        ('{"prompt": "a", "answer": NaN}', "row 7: `answer` holds nan, which is no number"),
        ({"prompt": "a", "id": 1.5}, r"row 7: `id` is 1\.5 \(float\)"),
        ({"prompt": "a", "id": ""}, "row 7: `id` is ''"),
        ({"prompt": "a", "domain": 3}, r"row 7: `domain` is 3 \(int\)"),
        ({"prompt": "a", "id": "id-2"}, "row 7 has id 'id-2' as row 2 does"),
        ({"prompt": "row 3"}, "row 7 holds the same prompt as row 3 does; .*`id` of its own"),
    ],
)
def test_a_bad_row_is_named_with_file_row_and_remedy(tmp_path, row, message):
    good = [
        {"prompt": f"row {i}"} if i == 3 else {"prompt": f"row {i}", "id": f"id-{i}"} for i in range(1, 7)
    ]
    path = write(tmp_path / "prompts.jsonl", *good, row)
    with pytest.raises(InputError, match=rf"prompts\.jsonl, {message}") as refused:
        load(path)
    assert "\n" not in str(refused.value)


def test_bytes_that_are_no_text_are_named(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_bytes(b'{"prompt": "a"}\n{"prompt": "\xff"}\n')
    with pytest.raises(InputError, match=r"p\.jsonl, row 2 is not valid JSON"):
        load(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("gone.jsonl", None, r"no prompt file .*gone\.jsonl"),
        ("empty.jsonl", b"", r"empty\.jsonl has no prompts"),
        ("blank.jsonl", b"\n\n", r"blank\.jsonl has no prompts"),
        ("p.txt", b"prompt\na\n", r"p\.txt ends in '\.txt'; prompts are read from \.jsonl"),
        ("p.parquet", b"not parquet at all", r"p\.parquet cannot be read as Parquet"),
        ("empty.parquet", b"", r"empty\.parquet cannot be read as Parquet"),
    ],
)
def test_an_unusable_file_is_named(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message) as refused:
        load(tmp_path / name)
    assert "\n" not in str(refused.value)


def test_parquet_gives_the_same_prompts_as_json_lines(tmp_path):
    rows = [
        {"prompt": "a", "messages": None, "answer": 3.0, "id": 1, "extra": "x"},
        {
            "prompt": None,
            "messages": [{"role": "user", "content": "b"}],
            "answer": None,
            "id": 2,
            "extra": "y",
        },
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "p.parquet")
    assert load(tmp_path / "p.parquet") == load(write(tmp_path / "p.jsonl", *rows))


def test_keys_that_parquet_adds_to_a_turn_are_dropped(tmp_path):
    turns = [{"role": "user", "content": "a", "name": "bob"}, {"role": "user", "content": "b"}]
    pq.write_table(pa.Table.from_pylist([{"messages": turns}]), tmp_path / "p.parquet")
    (prompt,) = load(tmp_path / "p.parquet")
    assert prompt.messages == tuple(turns)


def test_parquet_rows_are_counted_over_batches_and_decimals_are_numbers(tmp_path):
    table = pa.table({"prompt": [str(i) for i in range(70_000)], "answer": [Decimal("1.50")] * 70_000})
    pq.write_table(table, tmp_path / "p.parquet")
    prompts = load(tmp_path / "p.parquet")
    assert (len(prompts), prompts[-1].text, prompts[-1].answer) == (70_000, "69999", "1.50")
    pq.write_table(pa.table({"prompt": [*map(str, range(69_999)), ""]}), tmp_path / "p.parquet")
    with pytest.raises(InputError, match="row 70000: `prompt` is ''"):
        load(tmp_path / "p.parquet")


def test_parquet_without_a_prompt_column_names_its_columns(tmp_path):
    pq.write_table(pa.table({"question": ["a"]}), tmp_path / "p.parquet")
    with pytest.raises(InputError, match=r"keys: \['question'\]\); .* such as --map prompt=question"):
        load(tmp_path / "p.parquet")


def test_an_unknown_verifier_is_refused_before_any_prompt_is_read(tmp_path):
    with pytest.raises(ConfigError, match="no verifier 'last_numbr'; did you mean last_number"):
        load(tmp_path / "gone.jsonl", verifier="last_numbr")


def test_running_totals_come_with_their_verifier():
    config = RunningTotalsPrompts(kind="running_totals", count=5, seed=3, limit=2)
    first, second = load_prompts(config)
    assert first.prompt_id != second.prompt_id
    assert reward_of(first, f"1,2,{first.answer}") == 1.0
    assert reward_of(first, "1,2,0") == 0.0


def test_more_running_totals_than_there_can_be_is_a_config_error():
    with pytest.raises(ConfigError, match="running_totals: count"):
        load_prompts(RunningTotalsPrompts(kind="running_totals", count=10**9))


def gym(**settings: object) -> ReasoningGymPrompts:
    return ReasoningGymPrompts.model_validate(
        {"kind": "reasoning_gym", "task": "basic_arithmetic", **settings}
    )


def test_generated_tasks_are_the_same_for_one_seed_and_others_for_another():
    pytest.importorskip("reasoning_gym")
    one, again, other = (load_prompts(gym(count=5, seed=seed)) for seed in (1, 1, 2))
    assert one == again
    assert [prompt.text for prompt in one] != [prompt.text for prompt in other]
    assert one[:2] == load_prompts(gym(count=5, seed=1, limit=2))


def test_a_generated_task_is_scored_by_its_own_verifier_also_after_pickling():
    pytest.importorskip("reasoning_gym")
    for prompt in pickle.loads(pickle.dumps(load_prompts(gym(count=5, seed=1, options={"max_digits": 2})))):
        assert prompt.answer is not None
        assert reward_of(prompt, f" {prompt.answer}\n") == 1.0
        assert reward_of(prompt, f"I think <answer>{prompt.answer}</answer>.") == 1.0
        assert reward_of(prompt, "no") == 0.0


def test_tasks_that_repeat_a_question_have_ids_of_their_own():
    pytest.importorskip("reasoning_gym")
    narrow = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1, "operators": ["+"]}
    prompts = load_prompts(gym(count=300, options=narrow))
    assert len({prompt.text for prompt in prompts}) < 300
    assert len({prompt.prompt_id for prompt in prompts}) == 300


def test_an_unknown_task_names_close_ones():
    pytest.importorskip("reasoning_gym")
    with pytest.raises(ConfigError, match="no task 'basic_arithmetics'; did you mean basic_arithmetic"):
        load_prompts(gym(task="basic_arithmetics"))


@pytest.mark.parametrize("options", [{"max_digit": 2}, {"min_digits": 5, "max_digits": 2}])
def test_options_that_a_task_refuses_are_a_config_error(options):
    pytest.importorskip("reasoning_gym")
    with pytest.raises(ConfigError, match="task 'basic_arithmetic' refuses options"):
        load_prompts(gym(options=options))
