"""Responses that exist already become a cache that the teacher scores and the student trains on."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from cache_cases import table_to_rollouts

from lightopd.cache.store import open_cache
from lightopd.cache.verify import verify
from lightopd.config import build, load_stage
from lightopd.errors import InputError
from lightopd.models.tokenizer import load_tokenizer
from lightopd.pipelines import precompute, train
from lightopd.pipelines.caches.import_responses import import_responses
from lightopd.schemas.configs import ImportConfig, ModelConfig


def imported(world, tmp_path, *rows, **settings):
    """The rollouts that some rows become."""
    path = tmp_path / "responses.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    cache = tmp_path / "cache"
    data = {
        "responses": {"path": path, **settings},
        "student": str(world.sft / "student"),
        "cache": cache,
        "shard_rollouts": 2,
    }
    import_responses(build(ImportConfig, data))
    parts = sorted((cache / "rollouts").glob("*.parquet"))
    return [row for part in parts for row in table_to_rollouts(pq.read_table(part))]


def tokens(world):
    return load_tokenizer(ModelConfig(path=str(world.sft / "student")))


def test_text_becomes_ids_with_the_end_token_and_several_responses_share_a_prompt(world, tmp_path):
    tokenizer = tokens(world)
    one, two, three = imported(
        world,
        tmp_path,
        {
            "id": "a",
            "prompt": "1+2=",
            "answer": "3",
            "responses": ["3", "4"],
            "finish_reason": ["stop", "length"],
        },
        {"id": "b", "prompt": "2+2=", "response": "4", "reward": 0.5},
    )
    three_ids = tokenizer.encode("3", add_special_tokens=False)
    assert one.response_ids[:-1].tolist() == three_ids
    assert (one.finish_reason, one.truncated, one.reward) == ("stop", False, 1.0)
    assert two.response_ids.tolist() == tokenizer.encode("4", add_special_tokens=False)
    assert (two.finish_reason, two.truncated, two.sample_index) == ("length", True, 1)
    assert (three.prompt_id, three.reward) == ("b", 0.5)
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": "1+2="}], add_generation_prompt=True, return_dict=False
    )
    assert one.prompt_ids.tolist() == two.prompt_ids.tolist() == asked


def test_ids_are_stored_as_they_are_with_their_masks(world, tmp_path):
    rows = imported(
        world,
        tmp_path,
        {"prompt_ids": [5, 6], "response_ids": [7, 8, 9, 10], "loss_mask": [1, 0, 0, 1]},
        {"prompt_ids": [5, 7], "response_ids": [[7], [8, 9]]},
    )
    assert [row.response_ids.tolist() for row in rows] == [[7, 8, 9, 10], [7], [8, 9]]
    assert rows[0].prompt_ids.tolist() == [5, 6]
    assert rows[0].loss_mask.tolist() == [True, False, False, True]
    assert rows[0].turns.tolist() == [0, 0, 0, 1]
    assert rows[1].prompt_id == rows[2].prompt_id != rows[0].prompt_id


def test_a_trajectory_trains_on_the_assistants_tokens_alone(world, tmp_path):
    turns = [
        {"role": "user", "content": "1+2="},
        {"role": "assistant", "content": "3"},
        {"role": "user", "content": "4+5="},
        {"role": "assistant", "content": "9"},
    ]
    (row,) = imported(world, tmp_path, {"messages": turns})
    tokenizer = tokens(world)
    whole = tokenizer.apply_chat_template(turns, return_dict=False)
    length = len(row.prompt_ids) + len(row.response_ids)
    assert [*row.prompt_ids, *row.response_ids[:-1]] == whole[: length - 1]
    assert int(row.response_ids[-1]) == tokenizer.eos_token_id
    trained = tokenizer.decode(row.response_ids[row.loss_mask], skip_special_tokens=True)
    assert trained == "39"
    assert sorted(set(row.turns[row.loss_mask].tolist())) == [0, 1]
    (skipped,) = (
        imported(world, tmp_path / "second", {"messages": [turns[0], {**turns[1], "weight": 0}, *turns[2:]]})
        if (tmp_path / "second").mkdir() is None
        else ()
    )
    assert tokenizer.decode(skipped.response_ids[skipped.loss_mask], skip_special_tokens=True) == "9"


def test_the_students_logprobs_are_stored_and_the_pipeline_continues(world, tmp_path):
    rows = [{"prompt": f"{i}+2=", "response": str(i + 2), "answer": str(i + 2)} for i in range(4)]
    made = imported(world, tmp_path, *rows)
    assert all(np.isfinite(row.logprobs).all() and (row.logprobs <= 0).all() for row in made)
    cache = tmp_path / "cache"
    assert list(verify(cache)) == []
    flags = {"cache": cache, "teacher": world.teacher, "top_k": 2}
    precompute.run(load_stage("precompute", [], [], flags))
    assert list(verify(cache)) == []
    flags = {"cache": cache, "student": world.sft / "student", "out": tmp_path / "train", "steps": 1}
    train.run(load_stage("train", [], ["batch_sequences=2"], flags))
    assert open_cache(cache).manifest.origin == "imported"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "1+2="}, "has no response; give `response`"),
        ({"prompt": "1+2=", "responses": ["3", 4]}, r"response 2 is 4 \(int\)"),
        ({"prompt": "1+2=", "response": "\ud83d"}, "response 1 holds half a character"),
        ({"prompt": "1+2=", "response_ids": [3, -1]}, "`response_ids` is .*list of token ids"),
        ({"prompt": "1+2=", "response_ids": []}, "`response_ids` is .*not empty"),
        ({"prompt": "1+2=", "response_ids": [10**6]}, "has token 1000000, the student's tokenizer has"),
        (
            {"prompt": "1+2=", "response_ids": [3, 4], "loss_mask": [1]},
            "has 2 response ids and 1 of",
        ),
        (
            {"prompt": "1+2=", "response_ids": [3, 4], "loss_mask": [0, 0]},
            "has a response without a token",
        ),
        ({"prompt": "1+2=", "responses": ["3", "4"], "reward": [1]}, "has 2 responses and 1 of `reward`"),
        ({"prompt": "1+2=", "response": "3", "reward": "good"}, "`reward` is 'good'"),
        ({"prompt": "1+2=", "response": "3" * 500}, r"has \d+ tokens, the context of"),
        ({"messages": [{"role": "assistant", "content": "3"}]}, "begins with the assistant's turn"),
    ],
)
def test_a_row_that_cannot_be_taken_is_named_before_a_model_is_loaded(world, tmp_path, row, message):
    with pytest.raises(InputError, match=rf"responses\.jsonl, row 2:? {message}"):
        imported(world, tmp_path, {"prompt": "5+5=", "response": "1"}, row)
    assert not (tmp_path / "cache").exists()


def test_the_command_maps_columns_and_says_what_it_made(world, tmp_path, lightopd):
    path = tmp_path / "solved.csv"
    path.write_text("question,solution\n1+2=,3\n2+3=,5\n")
    code, out, err = lightopd(
        *("import", path, "--format", "responses", "--student", world.sft / "student"),
        *("--cache", tmp_path / "cache", "--map", "prompt=question,response=solution"),
    )
    assert (code, err.count("Traceback")) == (0, 0), err
    assert "rollouts              2" in out + err
