"""A response ends with the token that completes a text: any tokenizer, any cut of the text into tokens."""

import numpy as np
import pytest
from pydantic import ValidationError
from tiny_models import CHARACTERS, save_model, tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lightopd.config import load_stage
from lightopd.engines.kinds import load_engine
from lightopd.engines.stop_strings import StopReader, readers_of
from lightopd.pipelines import evaluate
from lightopd.schemas.configs import HfEngine, ModelConfig, SamplingConfig

NOTHING = np.zeros(0, np.int32)


def bytes_tokenizer(*longer):
    """One token a byte, ids 0 to 255, and some longer ones behind."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: place for place, letter in enumerate([*letters, *longer])}
    backend = Tokenizer(models.BPE(vocabulary, []))
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend), vocabulary


def end_of(tokens, strings, ids, prompt_ids=NOTHING):
    """How many of the ids the response has; None where no string ends it."""
    reader = StopReader(tokens, strings, prompt_ids)
    return next((place + 1 for place, token in enumerate(ids) if reader.is_end(token)), None)


def ids_of(vocabulary, text):
    """One id a byte."""
    parts = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)
    return [vocabulary[letter] for shown, _ in parts for letter in shown]


@pytest.mark.parametrize("string", ["\n\n", "</answer>", "é", "日本", "<|end|>\n"])
@pytest.mark.parametrize("length", [0, 1, 7, 40])
def test_the_first_token_that_completes_a_string_is_the_last(string, length):
    tokens, vocabulary = bytes_tokenizer()
    before = ids_of(vocabulary, "ü月x " * length)
    ids = [*before, *ids_of(vocabulary, string)]
    assert end_of(tokens, ["never", string], [*ids, *before]) == len(ids)
    assert end_of(tokens, [string], ids[:-1]) is None


def test_a_token_that_goes_on_behind_the_string_is_kept_whole():
    tokens, vocabulary = bytes_tokenizer("ab##cd")
    assert end_of(tokens, ["b##"], [vocabulary["x"], vocabulary["ab##cd"], vocabulary["y"]]) == 2


def test_a_string_of_the_prompt_ends_nothing():
    tokens, vocabulary = bytes_tokenizer()
    prompt, ids = ids_of(vocabulary, "say ##"), ids_of(vocabulary, "#a##b")
    assert end_of(tokens, ["##"], ids, np.array(prompt)) == 4
    assert end_of(tokens, ["##"], ids_of(vocabulary, "#a"), np.array(prompt)) is None


def test_outputs_that_only_pad_the_model_do_not_hide_a_string():
    tokens, vocabulary = bytes_tokenizer()
    first, second = ids_of(vocabulary, "##")
    assert end_of(tokens, ["##"], [first, *[300] * 50, second]) == 52


def test_engine_hf_ends_responses_at_a_string_and_changes_nothing_before_it(tmp_path):
    """Beside the others, whose numbers stay as well."""
    engine = load_engine(HfEngine(device="cpu"), ModelConfig(path=str(save_model(tmp_path / "m", 3))))
    prompts = [np.array([3 + row, 13, 4], np.int32) for row in range(8)]
    keys = [str(row) for row in range(8)]
    plain = engine.generate(prompts, SamplingConfig(max_tokens=30), keys, [1])
    sampling = SamplingConfig(max_tokens=30, stop=("1", "+2"))
    found = engine.generate(prompts, sampling, keys, [1])
    ended = 0
    for before, after, prompt in zip(plain, found, prompts, strict=True):
        end = end_of(tokenizer(), sampling.stop, before.response_ids, prompt)
        ended += end is not None
        assert after.response_ids.tolist() == before.response_ids[:end].tolist()
        np.testing.assert_allclose(after.logprobs, before.logprobs[:end], atol=1e-5)
        assert len(after.entropies) == len(after.behavior_logprobs) == len(after.response_ids)
        assert after.finish_reason == (before.finish_reason if end is None else "stop")
    assert ended > 2


def test_an_answer_that_ends_at_a_string_is_not_truncated(world, tmp_path):
    flags = {"model": world.sft / "student", "out": tmp_path / "eval"}
    flags["prompts"] = world.root / "prompts.jsonl"
    every = list(CHARACTERS)
    sets = ["sampling.max_tokens=8", f"sampling.stop={every}"]
    report = evaluate.run(load_stage("eval", [], sets, flags))
    assert report.figures["mean_response_tokens"] <= 2
    assert report.figures["truncated_share"] == 0


def test_texts_that_cannot_be_found_are_refused_and_one_text_is_a_list_of_one():
    assert SamplingConfig(stop="###").stop == ("###",)
    for wrong in ("", "x" * 1001):
        with pytest.raises(ValidationError, match="1 to 1000 bytes"):
            SamplingConfig(stop=[wrong])
    assert readers_of(tokenizer(), SamplingConfig()) is None
