"""Signals whose model was shown another prompt than the student, over the same response ids."""

import json
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM

from lightopd.cache.contexts import CONTEXTS, read_contexts
from lightopd.cache.manifests import signal_folder
from lightopd.cache.shards import shard_path
from lightopd.cache.store import open_cache
from lightopd.cache.verify import verify
from lightopd.config import load_stage
from lightopd.errors import CacheError, ConfigError, InputError, LineageError, OutputError
from lightopd.models.tokenizer import load_tokenizer
from lightopd.pipelines import RECIPES, precompute, rollout, train
from lightopd.pipelines.caches.rescore import rescore
from lightopd.pipelines.shared.sequences import read_sequences
from lightopd.prompts.contexts import render_contexts
from lightopd.prompts.load import load_prompts
from lightopd.prompts.tokens import render_prompt
from lightopd.schemas.configs import ContextConfig, ModelConfig, PromptRendering


@pytest.fixture
def cache(world, tmp_path):
    shutil.copytree(world.cache, tmp_path / "cache")
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def solved(world):
    """The rollouts' prompts with a solution, a hint and a wrong hint beside each."""
    rows = [json.loads(line) for line in (world.root / "prompts.jsonl").read_text().splitlines()]
    path = world.root / "solved.jsonl"
    path.write_text(
        "\n".join(json.dumps({**row, "solution": f"{i}+{i}", "hint": "1+2"}) for i, row in enumerate(rows))
    )
    return path


SHORT = "{{ prompt }}{{ solution }},"


def score(cache, model, prompts, *sets, template=SHORT, signal="privileged", **flags):
    asked = {"cache": cache, "teacher": model, "signal": signal, "top_k": 4, **flags}
    asked["context"] = {"template": template, "prompts": str(prompts)}
    return precompute.run(load_stage("precompute", [], list(sets), asked))


def test_scores_are_those_of_a_forward_pass_under_the_rendered_prompt(world, cache, solved):
    score(cache, world.teacher, solved)
    signal = open_cache(cache).signals["privileged"].manifest
    contexts = read_contexts(signal_folder(cache, "privileged"), signal.context)
    tokenizer = load_tokenizer(ModelConfig(path=str(world.teacher)))
    assert any("=3+3," in tokenizer.decode(ids).replace(" ", "") for ids in contexts.values())
    model = AutoModelForCausalLM.from_pretrained(world.teacher, dtype=torch.float64)
    table = pq.read_table(shard_path(signal_folder(cache, "privileged"), 0))
    plain = read_sequences(open_cache(cache), 0)[1]
    shown = read_sequences(open_cache(cache), 0, contexts)[1]
    for row in range(4):
        assert not np.array_equal(shown[row].prompt_ids, plain[row].prompt_ids)
        response = plain[row].response_ids
        ids = torch.tensor(np.concatenate([shown[row].prompt_ids, response])).long()[None]
        with torch.no_grad():
            logprobs = model(ids).logits[0, len(shown[row].prompt_ids) - 1 : -1].log_softmax(-1)
        wanted = logprobs.gather(1, torch.tensor(response).long()[:, None])[:, 0]
        np.testing.assert_allclose(table.column("logprobs")[row].as_py(), wanted, atol=2e-5)


def test_a_template_that_only_repeats_the_prompt_gives_the_plain_scores(world, cache, solved):
    score(cache, world.teacher, solved, template="{{ prompt }}")
    same, plain = (
        pq.read_table(shard_path(signal_folder(cache, name), 0)).column("logprobs").to_pylist()
        for name in ("privileged", "teacher")
    )
    np.testing.assert_allclose(np.concatenate(same), np.concatenate(plain), atol=1e-6)


def test_a_system_turn_leaves_the_question_as_it_is(world, cache, solved):
    score(cache, world.teacher, solved, "context.turn=system", template="9+9+9{{ hint }}")
    manifest = open_cache(cache).signals["privileged"].manifest
    folder = signal_folder(cache, "privileged")
    text = pq.read_table(folder / CONTEXTS).column("prompt_text")[0].as_py().replace(" ", "")
    question = json.loads(solved.read_text().splitlines()[0])["prompt"]
    assert "9+9+91+2" in text
    assert question in text
    assert manifest.context["turn"] == "system"


def test_a_model_may_teach_itself_and_only_itself(world, cache, solved):
    student = world.sft / "student"
    with pytest.raises(LineageError, match="the SFT teacher is"):
        score(cache, student, solved)
    with pytest.raises(LineageError, match="sampled"):
        score(cache, world.teacher, solved, role="self")
    score(cache, student, solved, role="self")
    assert verify(cache) == []


@pytest.mark.parametrize("recipe", ["opsd", "opsd_sampled", "mgsd", "v_zero"])
def test_recipes_of_privileged_teachers_train_on_made_signals(world, cache, solved, tmp_path, recipe):
    student = world.sft / "student"
    score(cache, student, solved, role="self")
    score(cache, student, solved, role="self", signal="negative", template="{{ hint }},{{ prompt }}")
    asked = {"cache": cache, "student": student, "out": tmp_path / "out", "steps": 1, "batch_sequences": 4}
    report = train.run(load_stage("train", [f"methods/{recipe}"], [], asked, RECIPES))
    assert report.figures["loss"] != 0


def test_resuming_under_another_template_or_with_other_columns_is_refused(world, cache, solved, tmp_path):
    score(cache, world.teacher, solved)
    with pytest.raises(OutputError, match=r"context\.template"):
        score(cache, world.teacher, solved, template="hint")
    other = tmp_path / "other.jsonl"
    other.write_text(solved.read_text().replace('"solution": "1+1"', '"solution": "1+2"'))
    with pytest.raises(OutputError, match=r"context\.prompts"):
        score(cache, world.teacher, other)


def test_rescoring_shows_the_model_the_same_contexts(world, cache, solved):
    score(cache, world.teacher, solved)
    assert rescore(cache, "privileged", 6)[1]


def test_verify_finds_contexts_that_are_gone_or_changed(world, cache, solved):
    score(cache, world.teacher, solved)
    path = signal_folder(cache, "privileged") / CONTEXTS
    table = pq.read_table(path)
    pq.write_table(table.slice(1), path)
    assert any("other prompts" in str(finding) for finding in verify(cache))
    path.unlink()
    assert any("cannot be read" in str(finding) for finding in verify(cache))
    with pytest.raises(CacheError, match="copy the signal"):
        rescore(cache, "privileged", 6)


def test_a_missing_column_a_missing_prompt_and_another_text_are_named(world, cache, solved, tmp_path):
    with pytest.raises(InputError, match=r"row 1 \(id p0\).*'solution' is undefined.*add the column"):
        score(cache, world.teacher, (world.root / "prompts.jsonl"))
    lines = solved.read_text().splitlines()
    fewer = tmp_path / "fewer.jsonl"
    fewer.write_text("\n".join(lines[1:]))
    with pytest.raises(InputError, match="has no prompt"):
        score(cache, world.teacher, fewer)
    ids = pq.read_table(shard_path(cache / "rollouts", 0)).column("prompt_id").to_pylist()
    changed = tmp_path / "changed.jsonl"
    changed.write_text(json.dumps({"id": ids[0], "prompt": "another question", "solution": "s"}))
    with pytest.raises(InputError, match=r"row 1 \(id p0\) is another text"):
        score(cache, world.teacher, changed)


def test_a_context_that_leaves_no_room_is_refused_before_a_model_is_loaded(world, cache, solved):
    with pytest.raises(InputError, match="its context has"):
        score(cache, world.teacher, solved, template="{{ prompt * 200 }}")


def test_templates_are_checked_when_the_config_is_read(world, cache, solved):
    with pytest.raises(ConfigError, match="no template 'privlege'"):
        score(cache, world.teacher, solved, template="privlege")
    with pytest.raises(ConfigError, match="not valid Jinja"):
        score(cache, world.teacher, solved, template="{{ prompt }")


def test_a_template_cannot_reach_into_python(world, cache, solved):
    with pytest.raises(InputError, match="cannot fill"):
        score(cache, world.teacher, solved, template="{{ prompt.__class__.__mro__ }}")


def test_a_template_that_cannot_be_computed_is_no_traceback(world, cache, solved):
    with pytest.raises(InputError, match="cannot fill"):
        score(cache, world.teacher, solved, template="{{ prompt / 2 }}")


def test_plain_prompts_have_no_system_turn(world, solved, tmp_path):
    asked = {"student": world.sft / "student", "cache": tmp_path / "plain"}
    prompts = {"kind": "file", "path": str(solved), "render": "plain"}
    sets = ["sampling.max_tokens=4"]
    rollout.run(
        load_stage("rollout", [], sets, {**asked, "prompts": prompts, "allow": ["template-mismatch"]})
    )
    with pytest.raises(ConfigError, match="no system turn"):
        score(tmp_path / "plain", world.teacher, solved, "context.turn=system")
    score(tmp_path / "plain", world.teacher, solved)


def test_a_turn_without_text_is_refused_by_name(world, tmp_path):
    tokenizer = load_tokenizer(ModelConfig(path=str(world.teacher)))
    path = tmp_path / "calls.jsonl"
    turns = [{"role": "user", "content": None, "tool_calls": []}]
    path.write_text(json.dumps({"id": "p", "messages": turns}))
    config = ContextConfig(template=SHORT, prompts=str(path))
    own = render_prompt(load_prompts(config.prompts)[0], tokenizer, PromptRendering())
    with pytest.raises(InputError, match=r"calls\.jsonl, row 1 .* is no text"):
        render_contexts(config, tokenizer, {}, {"p": own})
