import json
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from tiny_models import save_model
from tokenizers import Tokenizer, models
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from lightopd.errors import InputError, LineageError, OutputError
from lightopd.lineage.architecture import architecture
from lightopd.lineage.fingerprint import (
    declared_teacher,
    fingerprint_model,
    fingerprint_tokenizer,
    model_folder,
    read_student_lineage,
    write_student_lineage,
)
from lightopd.schemas.configs import ModelConfig
from lightopd.schemas.manifest import ModelFingerprint, SftLineage, StudentLineage

# Spellings of transformers 4: rope settings at the top, `torch_dtype`, no `head_dim`, no `layer_types`.
OLD_LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 1,
    "eos_token_id": [2, 3],
    "hidden_act": "silu",
    "hidden_size": 16,
    "initializer_range": 0.02,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "pretraining_tp": 1,
    "attention_dropout": 0.0,
    "rms_norm_eps": 1e-5,
    "rope_scaling": {
        "factor": 8.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "transformers_version": "4.45.0",
    "use_cache": True,
    "vocab_size": 32,
}
OLD_QWEN3 = {
    **{key: value for key, value in OLD_LLAMA.items() if key not in ("mlp_bias", "pretraining_tp")},
    "architectures": ["Qwen3ForCausalLM"],
    "head_dim": 8,
    "max_window_layers": 28,
    "model_type": "qwen3",
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "use_sliding_window": False,
}


@pytest.fixture(autouse=True)
def _own_cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))


def make_model(folder: Path, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def identity(folder: Path) -> str:
    return fingerprint_model(ModelConfig(path=str(folder))).identity


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_renamed_and_moved_folder_is_the_same_model(tmp_path):
    folder = make_model(tmp_path / "model")
    before = fingerprint_model(ModelConfig(path=str(folder)))
    (tmp_path / "elsewhere").mkdir()
    moved = folder.rename(tmp_path / "elsewhere" / "other-name")
    after = fingerprint_model(ModelConfig(path=str(moved)))
    assert after.identity == before.identity
    assert after.source != before.source


def test_one_flipped_bit_of_one_weight_makes_another_model(tmp_path):
    folder = make_model(tmp_path / "model")
    before = fingerprint_model(ModelConfig(path=str(folder)))
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    after = fingerprint_model(ModelConfig(path=str(folder)))
    assert after.identity != before.identity
    assert after.config == before.config


def test_how_tensors_are_spread_over_files_does_not_matter(tmp_path):
    whole = make_model(tmp_path / "whole")
    sharded = tmp_path / "sharded"
    AutoModelForCausalLM.from_pretrained(whole).save_pretrained(sharded, max_shard_size="5KB")
    assert len(list(sharded.glob("model-*.safetensors"))) > 1
    assert identity(sharded) == identity(whole)


def test_files_that_transformers_does_not_load_do_not_count(tmp_path):
    folder = make_model(tmp_path / "model")
    before = identity(folder)
    save_file({"x": torch.zeros(1)}, folder / "consolidated.safetensors")
    assert identity(folder) == before


def test_the_name_of_a_tensor_belongs_to_the_identity(tmp_path):
    folder = make_model(tmp_path / "model")
    before = identity(folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["other.name"] = tensors.pop("model.norm.weight")
    save_file(tensors, folder / "model.safetensors")
    assert identity(folder) != before


def test_the_number_format_of_stored_weights_belongs_to_the_identity(tmp_path):
    folder = make_model(tmp_path / "model")
    half = tmp_path / "half"
    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16).save_pretrained(half)
    assert identity(half) != identity(folder)


@pytest.mark.parametrize("old", [OLD_LLAMA, OLD_QWEN3], ids=["llama", "qwen3"])
def test_saving_a_model_of_an_older_transformers_again_keeps_its_identity(tmp_path, old):
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    (first / "config.json").write_text(json.dumps(old))
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(first)).save_pretrained(second)
    (first / "model.safetensors").write_bytes((second / "model.safetensors").read_bytes())
    assert (first / "config.json").read_text() != (second / "config.json").read_text()
    assert identity(first) == identity(second)


@pytest.mark.parametrize(
    "change",
    [
        {"transformers_version": "9.9"},
        {"_name_or_path": "somewhere/else"},
        {"use_cache": False},
        {"dtype": "bfloat16"},
        {"eos_token_id": [2, 7]},
    ],
)
def test_a_config_key_that_no_computation_reads_does_not_matter(tmp_path, change):
    folder = make_model(tmp_path / "model")
    before = identity(folder)
    edit_config(folder, **change)
    assert identity(folder) == before


@pytest.mark.parametrize(
    "change",
    [
        {"rms_norm_eps": 1e-3},
        {"num_key_value_heads": 1},
        {"rope_parameters": {"rope_theta": 20000.0, "rope_type": "default"}},
        {"hidden_act": "gelu"},
        {"attention_bias": True},
    ],
)
def test_a_config_key_that_changes_the_computation_makes_another_model(tmp_path, change):
    folder = make_model(tmp_path / "model")
    before = fingerprint_model(ModelConfig(path=str(folder)))
    edit_config(folder, **change)
    after = fingerprint_model(ModelConfig(path=str(folder)))
    assert after.identity != before.identity
    assert after.weights == before.weights


def test_two_scaled_rotary_embeddings_are_told_apart():
    scaled = architecture({"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 2.0}})
    assert scaled == {"rope_parameters": {"rope_theta": 10000, "factor": 2, "rope_type": "linear"}}
    assert architecture({"rope_theta": 1e4}) != scaled


def make_adapter(folder: Path, scale: float, **config: object) -> Path:
    folder.mkdir()
    save_file({"lora_A": torch.full((2, 2), scale)}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"r": 2, "target_modules": ["q", "v"], **config}))
    return folder


def test_an_adapter_belongs_to_the_identity_and_where_its_base_lay_does_not(tmp_path):
    base = make_model(tmp_path / "base")
    one = make_adapter(tmp_path / "one", 1.0, base_model_name_or_path="a", inference_mode=True)
    moved = make_adapter(tmp_path / "moved", 1.0, base_model_name_or_path="b", target_modules=["v", "q"])
    other = make_adapter(tmp_path / "other", 2.0)
    found = [
        fingerprint_model(ModelConfig(path=str(base), adapter=adapter)).identity
        for adapter in (None, one, moved, other)
    ]
    assert found[1] == found[2]
    assert len(set(found)) == 3


def test_an_adapter_folder_is_not_taken_for_a_model(tmp_path):
    folder = make_adapter(tmp_path / "adapter", 1.0)
    with pytest.raises(
        ValidationError, match="does not name its base model; give the base model as the path"
    ):
        identity(folder)
    with pytest.raises(InputError, match="is an adapter"):
        fingerprint_model(ModelConfig(path=str(folder), adapter=folder))


@pytest.mark.parametrize("path", ["./no-such-folder", "/no/such/folder", "a/b/c"])
def test_a_missing_folder_is_one_line(path):
    with pytest.raises(InputError, match="no model folder"):
        fingerprint_model(ModelConfig(path=path))


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def test_a_hub_model_in_the_local_cache_has_its_commit_and_the_identity_of_its_files(tmp_path, hub_cache):
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = hub_cache / "models--maker--tiny"
    make_model(repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    found = fingerprint_model(ModelConfig(path="maker/tiny"))
    assert (found.source, found.commit) == ("maker/tiny", commit)
    assert found.identity == identity(make_model(tmp_path / "folder"))


def test_a_hub_model_that_cannot_be_reached_says_what_to_do(hub_cache):
    with pytest.raises(InputError, match=r"maker/tiny is no folder here.*copy it here"):
        model_folder(ModelConfig(path="maker/tiny"))


def make_tokenizer(*, vocabulary: str = "abc", template: str | None = None) -> PreTrainedTokenizerFast:
    tokens = ["<unk>", "<end>", *vocabulary]
    model = models.WordLevel({token: number for number, token in enumerate(tokens)}, unk_token="<unk>")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(model), unk_token="<unk>", eos_token="<end>"
    )
    tokenizer.chat_template = template
    return tokenizer


def test_a_tokenizer_fingerprint_names_its_parts():
    found = fingerprint_tokenizer(make_tokenizer(), (3, 1))
    assert found.size == 5
    assert found.special_ids == {"bos": [], "eos": [1, 3], "pad": [], "unk": [0]}
    assert found.template is None


def test_tokenizers_of_equal_size_with_two_ids_swapped_differ():
    one, other = make_tokenizer(vocabulary="abc"), make_tokenizer(vocabulary="acb")
    assert fingerprint_tokenizer(one, (1,)).vocabulary != fingerprint_tokenizer(other, (1,)).vocabulary
    assert fingerprint_tokenizer(one, (1,)).size == fingerprint_tokenizer(other, (1,)).size


def test_a_saved_and_loaded_tokenizer_has_the_same_fingerprint(tmp_path):
    tokenizer = make_tokenizer(template="{{ messages[0]['content'] }}")
    tokenizer.save_pretrained(tmp_path)
    again = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert fingerprint_tokenizer(again, (1,)) == fingerprint_tokenizer(tokenizer, (1,))


def test_one_character_of_the_template_changes_its_hash_only():
    one = fingerprint_tokenizer(make_tokenizer(template="a"), (1,))
    other = fingerprint_tokenizer(make_tokenizer(template="b"), (1,))
    assert one.template != other.template
    assert one.vocabulary == other.vocabulary


def lineage_of(student: ModelFingerprint) -> StudentLineage:
    return StudentLineage(
        student=student, base=None, sft=SftLineage(proof="recorded", teacher=student), made_by="sft"
    )


def test_a_student_lineage_is_read_as_it_was_written(tmp_path):
    model = ModelConfig(path=str(make_model(tmp_path / "student")))
    fingerprint = fingerprint_model(model)
    write_student_lineage(tmp_path / "student", lineage_of(fingerprint))
    assert read_student_lineage(model, fingerprint) == lineage_of(fingerprint)


def test_a_model_without_a_lineage_file_has_no_lineage(tmp_path):
    model = ModelConfig(path=str(make_model(tmp_path / "student")))
    assert read_student_lineage(model, fingerprint_model(model)) is None


def test_a_lineage_file_beside_other_weights_is_refused(tmp_path):
    one = ModelConfig(path=str(make_model(tmp_path / "one", seed=0)))
    other = ModelConfig(path=str(make_model(tmp_path / "other", seed=1)))
    write_student_lineage(tmp_path / "other", lineage_of(fingerprint_model(one)))
    with pytest.raises(LineageError, match="about other weights"):
        read_student_lineage(other, fingerprint_model(other))


def test_the_lineage_of_an_adapter_lies_beside_the_adapter(tmp_path):
    base = make_model(tmp_path / "base")
    write_student_lineage(base, lineage_of(fingerprint_model(ModelConfig(path=str(base)))))
    model = ModelConfig(path=str(base), adapter=make_adapter(tmp_path / "adapter", 1.0))
    fingerprint = fingerprint_model(model)
    assert read_student_lineage(model, fingerprint) is None
    write_student_lineage(tmp_path / "adapter", lineage_of(fingerprint))
    assert read_student_lineage(model, fingerprint) == lineage_of(fingerprint)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not valid JSON"),
        ("[1]", "holds a list"),
        ('{"schema_version": 99}', "schema version 99.*newer lightopd"),
        ('{"schema_version": 1, "made_by": "sft"}', "is broken at student"),
    ],
)
def test_a_broken_or_newer_lineage_file_is_named(tmp_path, content, message):
    model = ModelConfig(path=str(make_model(tmp_path / "student")))
    (tmp_path / "student" / "lightopd_student.json").write_text(content)
    with pytest.raises(InputError, match=f"lightopd_student.json.*{message}"):
        read_student_lineage(model, fingerprint_model(model))


def test_a_folder_that_cannot_be_written_is_an_output_error(tmp_path):
    fingerprint = fingerprint_model(ModelConfig(path=str(make_model(tmp_path / "student"))))
    with pytest.raises(OutputError, match="cannot write"):
        write_student_lineage(tmp_path / "student" / "config.json", lineage_of(fingerprint))


def test_a_declared_folder_is_fingerprinted_and_a_declared_name_is_kept(tmp_path):
    folder = make_model(tmp_path / "teacher")
    by_folder, by_name = declared_teacher(str(folder)), declared_teacher("maker/tiny")
    assert (by_folder.proof, by_folder.name) == ("declared", None)
    assert by_folder.teacher.identity == identity(folder)
    assert by_name == SftLineage(proof="declared", name="maker/tiny")


def test_a_declared_path_without_a_folder_is_not_taken_for_a_name():
    with pytest.raises(InputError, match="no model folder"):
        declared_teacher("./no/such/teacher")


def test_half_a_character_in_a_config_is_refused_in_a_line(tmp_path):
    folder = save_model(tmp_path / "model", 0)
    plain = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**plain, "note": "\ud800"}))
    with pytest.raises(InputError, match=r"config\.json is not valid JSON .*surrogates"):
        fingerprint_model(ModelConfig(path=str(folder)))
    (folder / "config.json").write_text(json.dumps({**plain, "note": "\U0001f600"}))
    assert fingerprint_model(ModelConfig(path=str(folder))).identity
