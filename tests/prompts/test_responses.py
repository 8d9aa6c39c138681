"""Conversations with tools as ids: what a ChatML template writes, and which of it the model wrote."""

import json

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lightopd.errors import InputError
from lightopd.prompts.responses import Writer, read_responses
from lightopd.schemas.configs import FilePrompts

WORDS = ["<unk>", "<start>", "<end>", "user", "assistant", "tool", "hi", "call", "seven", "done", "<br>"]
CHATML = (
    "{% for m in messages %}<start> {{ m.role }} {{ m.content if m.content }}"
    "{% if m.tool_calls %}call{% endif %} <end> <br> {% endfor %}"
    "{% if add_generation_prompt %}<start> assistant {% endif %}"
)
FORGETS = CHATML.replace(
    "{{ m.content if m.content }}", "{{ m.content if loop.last or m.role != 'assistant' }}"
)


def conversation(tmp_path, *turns, template=CHATML, **row):
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="<end>")
    tokenizer.chat_template = template
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps({"messages": turns, **row}))
    (found,) = read_responses(Writer(tokenizer, (2,), FilePrompts(path=path), None))
    return found


def spoken(ids):
    return " ".join(WORDS[i] for i in ids)


def said(role, content, **more):
    return {"role": role, "content": content, **more}


TURNS = (
    said("user", "hi"),
    said("assistant", None, tool_calls=[{"function": {"name": "call"}}]),
    said("tool", "seven"),
    said("assistant", "done"),
)


def test_tool_results_and_the_templates_own_words_are_masked(tmp_path):
    found = conversation(tmp_path, *TURNS)
    assert spoken(found.prompt_ids) == "<start> user hi <end> <br> <start> assistant"
    written = "call <end> <br> <start> tool seven <end> <br> <start> assistant done <end>"
    assert spoken(found.response_ids) == written
    assert spoken(found.response_ids[found.loss_mask]) == "call <end> done <end>"
    assert found.turns.tolist() == [0, 0, 0] + [1] * 9
    assert not found.is_truncated


def test_a_turn_of_weight_zero_is_not_trained_on(tmp_path):
    found = conversation(tmp_path, TURNS[0], {**TURNS[1], "weight": 0}, *TURNS[2:])
    assert [WORDS[i] for i in found.response_ids[found.loss_mask]] == ["done", "<end>"]


def test_a_template_that_rewrites_earlier_turns_is_refused_by_turn(tmp_path):
    turns = (said("user", "hi"), said("assistant", "seven"), said("user", "hi"), said("assistant", "done"))
    with pytest.raises(InputError, match=r"p\.jsonl, row 1: the chat template writes turn 2 in another way"):
        conversation(tmp_path, *turns, template=FORGETS)


def test_turns_after_the_last_answer_are_left_out(tmp_path):
    assert conversation(tmp_path, *TURNS, said("user", "hi")).response_ids[-1] == 2
