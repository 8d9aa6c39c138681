import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lightopd.errors import InputError, OutputError
from lightopd.lineage.fingerprint import fingerprint_tokenizer
from lightopd.models.tokenizer import load_tokenizer
from lightopd.pipelines.demos.smollm2_weights import convert_gguf, find_smollm2, half_depth_student
from lightopd.prompts.tokens import prompt_text, render_prompt, stop_ids
from lightopd.schemas.configs import ModelConfig, PromptRendering
from lightopd.schemas.records import Prompt


def make_teacher(folder: Path, layers: int) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8, hidden_size=8, intermediate_size=16, num_hidden_layers=layers, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "<end>": 1, "a": 2}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<end>").save_pretrained(
        folder
    )
    return folder


@pytest.mark.parametrize(("layers", "kept"), [(4, [0, 2]), (5, [0, 2, 4])])
def test_a_half_depth_student_has_every_second_layer_and_all_the_rest(tmp_path, layers, kept):
    teacher = make_teacher(tmp_path / "teacher", layers)
    student = AutoModelForCausalLM.from_pretrained(half_depth_student(teacher, tmp_path / "student"))
    whole = AutoModelForCausalLM.from_pretrained(teacher)
    assert student.config.num_hidden_layers == len(student.model.layers) == len(kept)
    for number, source in enumerate(kept):
        expected = whole.model.layers[source].state_dict()
        found = student.model.layers[number].state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert torch.equal(student.lm_head.weight, whole.lm_head.weight)
    assert torch.equal(student.model.norm.weight, whole.model.norm.weight)
    tokenizers = [load_tokenizer(ModelConfig(path=str(folder))) for folder in (teacher, tmp_path / "student")]
    assert fingerprint_tokenizer(tokenizers[0], (1,)) == fingerprint_tokenizer(tokenizers[1], (1,))


def test_an_existing_folder_is_not_written_over(tmp_path):
    teacher = make_teacher(tmp_path / "teacher", 2)
    (tmp_path / "student").mkdir()
    with pytest.raises(OutputError, match="student exists"):
        half_depth_student(teacher, tmp_path / "student")


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "no GGUF file"), (b"GGUF", "not a whole GGUF"), (b"x" * 64, "not a whole GGUF")],
)
def test_a_file_that_is_no_gguf_is_one_line_and_leaves_nothing(tmp_path, content, message):
    pytest.importorskip("gguf")
    if content is not None:
        (tmp_path / "m.gguf").write_bytes(content)
    with pytest.raises(InputError, match=message):
        convert_gguf(tmp_path / "m.gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory) -> Path:
    return convert_gguf(find_smollm2(), tmp_path_factory.mktemp("smollm2") / "teacher")


@pytest.mark.slow
def test_smollm2_answers_a_question_and_ends_its_turn(smollm2):
    tokenizer = load_tokenizer(ModelConfig(path=str(smollm2)))
    prompt = Prompt("p", None, "What is the capital of France? Answer in one sentence.")
    ids = render_prompt(prompt, tokenizer, PromptRendering())
    model = AutoModelForCausalLM.from_pretrained(smollm2)
    assert model.dtype == torch.float32
    drawn = model.generate(torch.tensor([ids.tolist()]), max_new_tokens=24, do_sample=False)[0, len(ids) :]
    assert "Paris" in tokenizer.decode(drawn)
    assert drawn[-1] in stop_ids(tokenizer, ModelConfig(path=str(smollm2)))


@pytest.mark.slow
def test_smollm2_has_the_tokens_special_ids_and_template_of_its_gguf(smollm2):
    from gguf import GGUFReader

    fields = GGUFReader(find_smollm2()).fields
    model = ModelConfig(path=str(smollm2))
    tokenizer = load_tokenizer(model)
    tokens = fields["tokenizer.ggml.tokens"].contents()
    assert tokenizer.get_vocab() == {token: number for number, token in enumerate(tokens)}
    named = {
        role: fields[f"tokenizer.ggml.{key}_token_id"].contents()
        for role, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown"))
    }
    assert {role: [token] for role, token in named.items()} == fingerprint_tokenizer(
        tokenizer, stop_ids(tokenizer, model)
    ).special_ids
    assert tokenizer.convert_ids_to_tokens(named["eos"]) == "<|im_end|>"
    assert tokenizer.chat_template == fields["tokenizer.chat_template"].contents()
    assert json.loads((smollm2 / "config.json").read_text())["vocab_size"] == len(tokens) == 49152


@pytest.mark.slow
def test_smollm2_splits_numbers_into_digits_before_spaces_are_joined(smollm2):
    tokenizer = load_tokenizer(ModelConfig(path=str(smollm2)))
    assert tokenizer.tokenize("a  57") == ["a", "\u0120\u0120", "5", "7"]
    prompt = Prompt("p", None, "hi")
    rendered = prompt_text(render_prompt(prompt, tokenizer, PromptRendering()), tokenizer)
    assert rendered.endswith("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")
