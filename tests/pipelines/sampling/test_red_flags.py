"""What a report says about responses that should stop a person."""

import json

import pytest

from lightopd.config import load_stage
from lightopd.errors import InputError
from lightopd.pipelines import rollout


def notes(world, tmp_path, rows, *sets, dry_run=False, verifier="exact"):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = {"student": world.sft / "student", "prompts": path, "cache": tmp_path / "cache"}
    config = load_stage("rollout", [], [f"prompts.verifier={verifier}", *sets], flags)
    return [note for note in rollout.run(config, dry_run=dry_run).notes if note.startswith("red flag")]


SUMS = [{"prompt": f"{i}+{i}=", "answer": "-1"} for i in range(4)]


def test_wrong_and_repeated_responses_are_said(world, tmp_path):
    greedy = ("sampling.n=6", "sampling.max_tokens=1", "sampling.temperature=0")
    found = " ".join(notes(world, tmp_path, SUMS[:1], *greedy))
    assert "none of the answers were right (mean reward 0)" in found
    assert "one response is 6 of 6" in found


def test_responses_that_were_cut_are_said(world, tmp_path):
    found = notes(world, tmp_path, SUMS, "sampling.n=4", "sampling.max_tokens=1")
    assert any("were cut at sampling.max_tokens" in note for note in found)


def test_an_answer_that_no_response_can_match_is_said_before_sampling(world, tmp_path):
    rows = [{"prompt": "1+1=", "answer": "1+1=2 and so on"}, {"prompt": "2+2=", "answer": "4"}]
    (found,) = notes(world, tmp_path, rows, "sampling.max_tokens=3", dry_run=True)
    assert "verifier exact can never match 1 of 2 answers" in found
    assert "prompts.jsonl, row 1" in found


def test_an_answer_that_the_verifier_cannot_read_is_refused_before_sampling(world, tmp_path):
    with pytest.raises(InputError, match=r"prompts\.jsonl, row 1: .*an answer with a number"):
        notes(world, tmp_path, [{"prompt": "1+1=", "answer": "two"}], verifier="last_number")
    assert not (tmp_path / "cache").exists()


def test_healthy_responses_raise_no_flag(world, tmp_path):
    rows = [{"prompt": f"{i}+{i}="} for i in range(4)]
    assert notes(world, tmp_path, rows, "sampling.n=2", "sampling.max_tokens=40") == []
