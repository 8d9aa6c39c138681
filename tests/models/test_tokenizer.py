"""What is loaded reads and writes text as the files of the model say."""

import json

import pytest
import transformers as hf
from tiny_models import tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from lightopd.errors import InputError
from lightopd.models.tokenizer import PROBE_TEXTS, load_tokenizer
from lightopd.schemas.configs import ModelConfig

TEXT = "How are you doing? def f(x):\n    return x"


@pytest.fixture(scope="module")
def byte_level():
    """A byte-level tokenizer, as those of Llama 3, Qwen and GPT are."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|begin|>", "<|end|>"], initial_alphabet=alphabet
    )
    made.train_from_iterator([TEXT] * 3, trainer)
    return hf.PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<|begin|>", eos_token="<|end|>")


def save(folder, tokens, kind=None, model_type="llama"):
    tokens.save_pretrained(folder)
    if kind is not None:
        path = folder / "tokenizer_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "tokenizer_class": kind}))
    (folder / "config.json").write_text(json.dumps({"model_type": model_type, "vocab_size": 300}))
    return folder


def own_ids(folder, text):
    return Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "mistral", "gemma"])
@pytest.mark.parametrize(
    "kind", ["LlamaTokenizerFast", "LlamaTokenizer", "PreTrainedTokenizerFast", "GemmaTokenizerFast", None]
)
def test_a_folder_is_read_as_its_tokenizer_json_says(tmp_path, byte_level, kind, model_type):
    folder = save(tmp_path, byte_level, kind, model_type)
    loaded = load_tokenizer(ModelConfig(path=str(folder)))
    for text in (TEXT, *PROBE_TEXTS):
        ids = loaded.encode(text, add_special_tokens=False)
        assert ids == own_ids(folder, text)
        assert loaded.decode(ids) == text
    assert (loaded.bos_token, loaded.eos_token) == ("<|begin|>", "<|end|>")


def test_a_tokenizer_keeps_its_template_when_another_class_reads_it(tmp_path, byte_level):
    byte_level.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    folder = save(tmp_path, byte_level, "LlamaTokenizerFast")
    loaded = load_tokenizer(ModelConfig(path=str(folder)))
    asked = [{"role": "user", "content": TEXT}]
    assert loaded.apply_chat_template(asked, return_dict=False) == own_ids(folder, TEXT)


def hub_snapshot(root, name, folder):
    """A repository as huggingface_hub keeps it."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = root / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    for file in folder.iterdir():
        (snapshot / file.name).write_bytes(file.read_bytes())


@pytest.fixture
def hub(tmp_path, monkeypatch):
    import huggingface_hub.constants as constants

    root = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(root))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(root))
    return root


def test_a_hub_id_is_read_as_transformers_reads_that_id(tmp_path, byte_level, hub):
    name = "deepseek-ai/DeepSeek-R1-Distill-Llama-8B"
    (tmp_path / "made").mkdir()
    hub_snapshot(hub, name, save(tmp_path / "made", byte_level, "LlamaTokenizerFast"))
    loaded = load_tokenizer(ModelConfig(path=name))
    ids = hf.AutoTokenizer.from_pretrained(name).encode(TEXT, add_special_tokens=False)
    assert loaded.encode(TEXT, add_special_tokens=False) == ids == own_ids(tmp_path / "made", TEXT)


def test_a_hub_id_that_transformers_reads_otherwise_than_its_file_is_refused(tmp_path, byte_level, hub):
    (tmp_path / "made").mkdir()
    hub_snapshot(hub, "some/model", save(tmp_path / "made", byte_level, "LlamaTokenizerFast"))
    with pytest.raises(InputError, match=r"some/model is not the one in its tokenizer.json.*tokenizer_class"):
        load_tokenizer(ModelConfig(path="some/model"))


def test_a_damaged_tokenizer_is_refused_in_one_line(tmp_path):
    folder = save(tmp_path, tokenizer())
    for damage in ("{", "[]", '{"model": 3}', "\x00"):
        (folder / "tokenizer.json").write_text(damage)
        with pytest.raises(InputError, match=r"tokenizer .*; (copy|restore)") as found:
            load_tokenizer(ModelConfig(path=str(folder)))
        assert "\n" not in str(found.value)
