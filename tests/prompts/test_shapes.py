"""The files that people have: what each is recognised as, and what reaches the chat template."""

import csv
import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lightopd.errors import ConfigError, InputError
from lightopd.prompts.load import load_prompts, recognise_prompts
from lightopd.schemas.configs import FilePrompts

USER = {"role": "user", "content": "1+1?"}
CALL = {"type": "function", "function": {"name": "calc", "arguments": {"expr": "1+1"}}}
TOOL = {"type": "function", "function": {"name": "calc", "parameters": {"type": "object"}}}


def config_of(path, **settings):
    return FilePrompts.model_validate({"path": path, **settings})


def write_lines(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def one_of(path, **settings):
    (prompt,) = load_prompts(config_of(path, **settings))
    return prompt


def test_nulls_that_arrow_fills_in_are_left_out_at_any_depth(tmp_path):
    other = {"type": "function", "function": {"name": "weather", "arguments": {"where": {"city": "Oslo"}}}}
    rows = [
        {"id": "a", "messages": [USER, {"role": "assistant", "content": "", "tool_calls": [call]}, answer]}
        for call, answer in ((CALL, {"role": "tool", "content": "2"}), (other, USER))
    ] + [{"id": "b", "messages": [USER], "tools": [TOOL, {**TOOL, "strict": True}]}]
    for number, row in enumerate(rows):
        row |= {"id": str(number), "tools": row.get("tools")}
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "p.parquet")
    lines = load_prompts(config_of(write_lines(tmp_path / "p.jsonl", *rows)))
    assert load_prompts(config_of(tmp_path / "p.parquet")) == lines
    assert lines[0].messages[1]["tool_calls"] == [CALL]


def test_tools_and_template_options_of_a_row_are_kept_and_tell_rows_apart(tmp_path):
    path = write_lines(
        tmp_path / "p.jsonl",
        {"messages": [USER]},
        {"messages": [USER], "tools": [TOOL]},
        {"messages": [USER], "tools": json.dumps([TOOL])[:-1] + "," + json.dumps(TOOL) + "]"},
        {"messages": [USER], "chat_template_kwargs": {"enable_thinking": False}},
    )
    plain, tooled, texts, options = load_prompts(config_of(path))
    assert (plain.tools, tooled.tools, texts.tools) == (None, (TOOL,), (TOOL, TOOL))
    assert options.template_options == {"enable_thinking": False}
    assert len({prompt.prompt_id for prompt in (plain, tooled, texts, options)}) == 4


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"tools": "calculator"}, "`tools` is 'calculator' .*list of objects"),
        ({"tools": {"name": "calc"}}, "`tools` is .*list of objects"),
        ({"chat_template_kwargs": ["x"]}, "`chat_template_kwargs` is .*must be an object"),
        ({"chat_template_kwargs": {"tokenize": False}}, "`chat_template_kwargs` cannot set tokenize"),
    ],
)
def test_tools_and_options_of_another_kind_are_refused(tmp_path, row, message):
    with pytest.raises(InputError, match=rf"p\.jsonl, row 1: {message}"):
        one_of(write_lines(tmp_path / "p.jsonl", {"prompt": "a", **row}))


def test_parts_of_type_text_are_joined_and_others_are_refused_by_name(tmp_path):
    parts = [{"type": "text", "text": "1+"}, {"type": "text", "text": "1"}]
    joined = one_of(write_lines(tmp_path / "p.jsonl", {"messages": [{"role": "user", "content": parts}]}))
    assert joined.messages == ({"role": "user", "content": "1+1"},)
    image = {"role": "user", "content": [*parts, {"type": "image_url", "image_url": {"url": "x"}}]}
    with pytest.raises(InputError, match=r"p\.jsonl, row 1: turn 1 of `messages` .*image_url.*text only"):
        one_of(write_lines(tmp_path / "p.jsonl", {"messages": [image]}))


SHAPES = {
    "TRL": ({"prompt": [USER]}, (USER,), None),
    "OpenAI": ({"messages": [USER, {"role": "assistant", "content": "2"}]}, (USER,), None),
    "JSON text": ({"messages": json.dumps([USER])}, (USER,), None),
    "ShareGPT": (
        {
            "system": "be brief",
            "conversations": [{"from": "human", "value": "1+1?"}, {"from": "gpt", "value": "2"}],
        },
        ({"role": "system", "content": "be brief"}, USER),
        None,
    ),
    "Alpaca": ({"instruction": "add", "input": "1 and 1", "output": "2"}, None, "add\n1 and 1"),
    "Alpaca without input": ({"instruction": "add", "input": "", "output": "2"}, None, "add"),
}


@pytest.mark.parametrize("name", SHAPES)
def test_known_shapes_become_prompts_without_the_last_answer(tmp_path, name):
    row, turns, text = SHAPES[name]
    prompt = one_of(write_lines(tmp_path / "p.jsonl", row))
    assert (prompt.messages, prompt.text) == (turns, text)


def test_verl_rows_bring_answer_and_domain(tmp_path):
    row = {
        "data_source": "gsm8k",
        "prompt": [USER],
        "reward_model": {"style": "rule", "ground_truth": "2"},
        "extra_info": {"index": 0},
    }
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "p.parquet")
    found = recognise_prompts(config_of(tmp_path / "p.parquet"))
    assert (found.prompts[0].answer, found.prompts[0].domain) == ("2", "gsm8k")
    assert found.sentence == (
        f"{tmp_path}/p.parquet read as Parquet: 1 row as turns in `prompt` (TRL, verl); answer from "
        "reward_model.ground_truth, domain from data_source; not read: extra_info"
    )


def test_a_map_names_columns_of_other_names_and_reaches_inside(tmp_path):
    row = {"question": "1+1?", "meta": {"solution": 2}, "prompt": "unused", "level": 3}
    found = recognise_prompts(
        config_of(
            write_lines(tmp_path / "p.jsonl", row), columns={"prompt": "question", "answer": "meta.solution"}
        )
    )
    assert (found.prompts[0].text, found.prompts[0].answer) == ("1+1?", "2")
    assert "answer from meta.solution, prompt from question" in found.sentence
    assert "not read: level, prompt" in found.sentence


def test_a_map_that_does_not_fit_is_refused(tmp_path):
    path = write_lines(tmp_path / "p.jsonl", {"question": "1+1?"})
    with pytest.raises(InputError, match=r"row 1 has no column 'task', .*it has question"):
        one_of(path, columns={"prompt": "task"})
    with pytest.raises(ValueError, match="'promt' is nothing that is read of a row"):
        config_of(path, columns={"promt": "question"})


def test_every_kind_of_file_gives_the_same_prompts(tmp_path):
    zstd = pa.Codec("zstd")
    rows = [
        {"id": "a", "prompt": 'one, "two"\nthree', "answer": "1"},
        {"id": "b", "prompt": "é", "answer": None},
    ]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    (tmp_path / "p.jsonl").write_bytes(lines)
    (tmp_path / "p.jsonl.gz").write_bytes(gzip.compress(lines[:20]) + gzip.compress(lines[20:]))
    with pa.output_stream(tmp_path / "p.jsonl.zst", compression=zstd.name) as stream:
        stream.write(lines)
    (tmp_path / "p.json").write_text("\ufeff\n" + json.dumps(rows, indent=1), encoding="utf-8")
    (tmp_path / "lines.json").write_bytes(lines)
    with (tmp_path / "p.csv").open("w", newline="", encoding="utf-8-sig") as file:
        table = csv.DictWriter(file, ["id", "prompt", "answer"])
        table.writeheader()
        table.writerows(rows)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "p.parquet")
    expected = load_prompts(config_of(tmp_path / "p.jsonl"))
    for name in ("p.jsonl.gz", "p.jsonl.zst", "p.json", "lines.json", "p.csv", "p.parquet"):
        assert load_prompts(config_of(tmp_path / name)) == expected, name


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.jsonl.gz", b"no gzip", r"p\.jsonl\.gz cannot be read as JSON lines"),
        ("p.jsonl.zst", b"no zstd", r"p\.jsonl\.zst cannot be read as JSON lines"),
        ("p.csv", b"prompt,answer\na,b,c\n", r"p\.csv, row 1 has 3 cells, the header has 2"),
        ("p.csv", b"prompt,answer\na\n", r"p\.csv, row 1 has 1 cells, the header has 2"),
        ("p.csv", b"prompt\n\xff\n", r"p\.csv, row 1 is not UTF-8 text"),
        ("p.json", b"[1]", r"p\.json, row 1 is a int; write one JSON object"),
        ("p.json", b"[{]", r"p\.json is not valid JSON"),
        ("p.jsonl", b"\xff\xfe{\x00}\x00\n\x00", r"p\.jsonl, row 1 is UTF-16 text; save the file as UTF-8"),
        ("p.jsonl", b"[" * 100_000 + b"\n", r"p\.jsonl, row 1 is nested too deep"),
    ],
)
def test_a_broken_file_is_one_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message) as refused:
        load_prompts(config_of(tmp_path / name))
    assert "\n" not in str(refused.value)


HOSTILE = {
    "surrogate": ('"a\\ud83d"', r"half a character \(surrogate U\+D83D at place 2\)"),
    "NUL": ('"a\\u0000b"', "holds a NUL character at place 2"),
    "huge": ("9" * 5000, "holds a number of 5000 digits; write it as text"),
    "large": ("9" * 900, "more than 400 digits"),
    "infinite": ("1e999", "holds inf, which is no number"),
    "deep": ("[" * 200 + "]" * 200, "nested more than 100 deep|must be text"),
}
PLACES = {
    "answer": '{{"prompt": "a", "answer": {}}}',
    "id": '{{"prompt": "a", "id": {}}}',
    "domain": '{{"prompt": "a", "domain": {}}}',
    "prompt": '{{"prompt": [{{"role": "user", "content": "a", "more": {}}}]}}',
    "messages": '{{"messages": [{{"role": "user", "content": "a", "more": [{}]}}]}}',
    "tools": '{{"prompt": "a", "tools": [{{"name": {}}}]}}',
    "chat_template_kwargs": '{{"prompt": "a", "chat_template_kwargs": {{"now": {}}}}}',
}


@pytest.mark.parametrize("value", HOSTILE)
@pytest.mark.parametrize("column", PLACES)
def test_what_no_stage_can_keep_is_refused_with_file_row_and_column(tmp_path, column, value):
    text, message = HOSTILE[value]
    (tmp_path / "p.jsonl").write_text('{"prompt": "fine"}\n' + PLACES[column].format(text) + "\n")
    with pytest.raises(InputError, match=rf"p\.jsonl, row 2: `{column}` .*({message})") as refused:
        load_prompts(config_of(tmp_path / "p.jsonl"))
    assert "\n" not in str(refused.value)
    assert str(refused.value).isprintable()


def test_an_empty_text_of_half_a_character_and_bytes_that_are_no_text_are_refused(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "broken \\ud83d emoji"}\n')
    with pytest.raises(InputError, match=r"p\.jsonl, row 1: `prompt` holds half a character"):
        load_prompts(config_of(tmp_path / "p.jsonl"))
    broken = pa.Array.from_buffers(
        pa.string(), 2, [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0"), pa.py_buffer(b"a\xff")]
    )
    pq.write_table(pa.table({"prompt": broken}), tmp_path / "p.parquet")
    with pytest.raises(InputError, match=r"p\.parquet, row 2: `prompt` is not UTF-8 text"):
        load_prompts(config_of(tmp_path / "p.parquet"))


def test_files_that_were_joined_may_have_byte_order_marks_between_them(tmp_path):
    (tmp_path / "p.jsonl").write_bytes('\ufeff{"prompt": "a"}\n\ufeff{"prompt": "b"}\n\ufeff\n'.encode())
    assert [prompt.text for prompt in load_prompts(config_of(tmp_path / "p.jsonl"))] == ["a", "b"]


def test_ids_of_a_table_with_gaps_are_whole_numbers(tmp_path):
    pq.write_table(pa.table({"prompt": ["a", "b"], "id": [1.0, None]}), tmp_path / "p.parquet")
    first, second = load_prompts(config_of(tmp_path / "p.parquet"))
    assert first.prompt_id == "1"
    assert len(second.prompt_id) == 32


def test_datasets_are_read_from_saved_folders_and_folders_of_files(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = [{"question": "a", "tools": None}, {"question": "b", "tools": [TOOL]}]
    one = datasets.Dataset.from_list(rows)
    one.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": one, "test": one.select([1])}).save_to_disk(tmp_path / "both")
    (tmp_path / "files").mkdir()
    one.to_parquet(tmp_path / "files" / "train-00000.parquet")
    columns = {"prompt": "question"}
    expected = load_prompts(config_of(write_lines(tmp_path / "p.jsonl", *rows), columns=columns))
    for name in ("one", "both", "files"):
        assert load_prompts(config_of(tmp_path / name, columns=columns)) == expected, name
    (test,) = load_prompts(config_of(tmp_path / "both", columns=columns, split="test"))
    assert test == expected[1]
    with pytest.raises(
        InputError, match=r"has no split 'validation'; set prompts.split to one of train, test"
    ):
        load_prompts(config_of(tmp_path / "both", columns=columns, split="validation"))


def test_settings_of_datasets_do_not_fit_a_file(tmp_path):
    with pytest.raises(InputError, match="which has no split"):
        one_of(write_lines(tmp_path / "p.jsonl", {"prompt": "a"}), split="train")


def test_a_hub_id_that_cannot_be_reached_is_one_line(monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        (InputError, ConfigError), match=r"openai.gsm8k cannot be read with datasets"
    ) as refused:
        load_prompts(config_of("openai/gsm8k"))
    assert "\n" not in str(refused.value)
