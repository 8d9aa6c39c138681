"""The student that training hands over is the model that it got: every tensor, its papers, and a card."""

import json
import shutil
import stat
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from tiny_models import save_model, tokenizer, write_prompts
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
)
from transformers.core_model_loading import revert_weight_conversion

from lightopd import __version__
from lightopd.config import load_stage
from lightopd.errors import InputError
from lightopd.lineage.fingerprint import fingerprint_model
from lightopd.models.load import load_model, outline
from lightopd.pipelines import precompute, rollout, train
from lightopd.schemas.configs import ModelConfig
from lightopd.training.checkpoints.untouched import carry_untouched, check_names
from lightopd.training.weight_files.names import keep_stored_names

CARD = """---
license: apache-2.0
language: [en]
base_model: somebody/else
---
# What the base says of itself
"""


def save_with_vision(folder, seed):
    """A language model within one that sees, and a head that predicts several tokens."""
    torch.manual_seed(seed)
    text = {
        "vocab_size": 24,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 64,
        "initializer_range": 0.25,
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_value_heads": 2,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "eos_token_id": 1,
    }
    sees = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "patch_size": 8}
    sees["out_hidden_size"] = text["hidden_size"]
    model = Qwen3_5ForConditionalGeneration(Qwen3_5Config(text_config=text, vision_config=sees))
    model.generation_config = GenerationConfig(eos_token_id=1, pad_token_id=0, top_k=7, do_sample=True)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def distil(student, teacher, prompts, root):
    asked = {"student": student, "prompts": prompts, "cache": root / "cache", "sft_teacher": teacher}
    rollout.run(load_stage("rollout", [], ["sampling.max_tokens=6"], {k: str(v) for k, v in asked.items()}))
    precompute.run(
        load_stage("precompute", [], [], {"cache": root / "cache", "teacher": teacher, "top_k": 4})
    )
    asked = {"cache": root / "cache", "student": student, "out": root / "out", "steps": 2}
    train.run(load_stage("train", [], ["batch_sequences=4", "optimizer.lr=1e-2"], asked))
    return root / "out" / "student"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A student with a vision tower and papers of its own, and what training made of it."""
    root = tmp_path_factory.mktemp("sees")
    prompts = write_prompts(root / "prompts.jsonl", 4)
    base, teacher = save_with_vision(root / "base", 1), save_model(root / "teacher", 2)
    (base / "LICENSE").write_text("as is")
    (base / "README.md").write_text(CARD)
    (base / "provenance.json").write_text("{}")
    return SimpleNamespace(base=base, teacher=teacher, out=distil(base, teacher, prompts, root))


def test_a_tower_that_training_did_not_touch_is_exported_with_the_rest(made):
    before, after = load_file(made.base / "model.safetensors"), load_file(made.out / "model.safetensors")
    assert before.keys() == after.keys()
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert {name for name in before if "visual" in name} <= same
    assert not {name for name in same if "language_model" in name}


def test_the_exported_folder_is_the_larger_model_again(made):
    model, info = Qwen3_5ForConditionalGeneration.from_pretrained(made.out, output_loading_info=True)
    assert not any(info.values())
    assert type(model).__name__ in json.loads((made.out / "config.json").read_text())["architectures"]
    one, other = (fingerprint_model(ModelConfig(path=str(folder))) for folder in (made.base, made.out))
    assert one.config == other.config
    assert one.weights != other.weights


def test_weights_put_together_from_shares_keep_the_names_of_the_larger_model(made):
    stored = load_file(made.base / "model.safetensors")
    model = outline(made.base, trust_remote_code=False)
    keep_stored_names(model, stored)
    assert revert_weight_conversion(model, model.state_dict()).keys() <= stored.keys()


def test_papers_are_carried_and_what_speaks_of_the_base_is_not(made):
    assert (made.out / "LICENSE").read_text() == "as is"
    assert (made.out / "chat_template.jinja").read_text() == (made.base / "chat_template.jinja").read_text()
    assert json.loads((made.out / "generation_config.json").read_text())["top_k"] == 7
    assert not (made.out / "provenance.json").exists()


def test_every_file_can_be_read_by_whom_a_new_file_can(made, tmp_path):
    (tmp_path / "new").touch()
    modes = {stat.S_IMODE(file.stat().st_mode) for file in made.out.iterdir()}
    assert modes == {stat.S_IMODE((tmp_path / "new").stat().st_mode)}


def test_the_card_says_how_the_student_was_made(made):
    _, header, card = (made.out / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(header)["license"] == "apache-2.0"
    assert yaml.safe_load(header)["language"] == ["en"]
    assert "base_model" not in yaml.safe_load(header)  # a folder is no repository
    assert "somebody" not in header + card
    teacher = fingerprint_model(ModelConfig(path=str(made.teacher))).identity[:12]
    for words in (
        f"`lightopd train` {__version__}",
        f"| fine-tuning teacher | teacher (`{teacher}`) (declared) |",
        f"| scored by | teacher (`{teacher}`) as `teacher` |",
        "| rollouts | 4 of 4 prompts |",
        "| cache | content `",
        "lr: 0.01",
        "objective:",
    ):
        assert words in card
    assert str(made.out.parent) not in card


def test_a_student_that_could_not_be_put_back_is_refused_and_the_remedy_named_works(made, tmp_path):
    student = ModelConfig(path=str(made.base))
    model = load_model(student, "cpu")
    check_names(model, student)
    strange = shutil.copytree(made.base, tmp_path / "strange")
    tensors = load_file(strange / "model.safetensors")
    renamed = {name.replace("language_model", "words"): tensor for name, tensor in tensors.items()}
    save_file(renamed, strange / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"within a larger one, and \d+ of its tensors .* load"):
        check_names(model, ModelConfig(path=str(strange)))
    alone = tmp_path / "alone"
    AutoModelForCausalLM.from_pretrained(made.base).save_pretrained(alone)
    check_names(model, ModelConfig(path=str(alone)))
    before = (alone / "model.safetensors").read_bytes()
    carry_untouched(alone, ModelConfig(path=str(alone)))
    assert (alone / "model.safetensors").read_bytes() == before
