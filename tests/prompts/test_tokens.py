import json

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from lightopd.errors import ConfigError, InputError
from lightopd.models.tokenizer import load_tokenizer
from lightopd.prompts.tokens import prompt_text, render_prompt, response_text, stop_ids
from lightopd.schemas.configs import ModelConfig, PromptRendering
from lightopd.schemas.records import Prompt

TOKENS = ["<unk>", "<s>", "<end>", "<eot>", "user", "assistant", "system", "hi", "there", "big", ":"]
TEMPLATE = (
    "{% if system_prompt is defined %}system : {{ system_prompt }} {% endif %}"
    "{% for m in messages %}"
    "{% if m.role not in ['user', 'assistant'] %}{{ raise_exception('unknown role ' + m.role) }}{% endif %}"
    "{{ m.role }} : {% if m.content is string %}{{ m.content }}{% else %}{{ m.content[0].text }}{% endif %}"
    " <end> "
    "{% endfor %}"
    "{% if add_generation_prompt %}assistant :{% endif %}"
)


def make_tokenizer(*, template: str | None = TEMPLATE, starts: bool = False) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(TOKENS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if starts:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="<end>"
    )
    fast.chat_template = template
    return fast


def ids_of(text: str) -> list[int]:
    return [TOKENS.index(token) for token in text.split()]


def prompt_of(*turns: tuple[str, object], text: str | None = None) -> Prompt:
    messages = tuple({"role": role, "content": content} for role, content in turns)
    return Prompt("p1", messages or None, text)


def test_a_text_becomes_one_user_turn_and_the_opening_of_the_assistant():
    ids = render_prompt(prompt_of(text="hi there"), make_tokenizer(), PromptRendering())
    assert ids.dtype == np.int32
    assert ids.tolist() == ids_of("user : hi there <end> assistant :")


def test_any_number_of_turns_is_rendered():
    prompt = prompt_of(("user", "hi"), ("assistant", "there"), ("user", "big hi"))
    ids = render_prompt(prompt, make_tokenizer(), PromptRendering())
    assert ids.tolist() == ids_of("user : hi <end> assistant : there <end> user : big hi <end> assistant :")


def test_content_in_parts_reaches_the_template_as_it_is():
    prompt = prompt_of(("user", [{"type": "text", "text": "hi"}]))
    assert render_prompt(prompt, make_tokenizer(), PromptRendering()).tolist() == ids_of(
        "user : hi <end> assistant :"
    )


def test_the_template_does_not_add_a_second_start_token():
    ids = render_prompt(prompt_of(text="hi"), make_tokenizer(starts=True), PromptRendering())
    assert ids.tolist() == ids_of("user : hi <end> assistant :")


def test_template_options_reach_the_template():
    rendering = PromptRendering(template_options={"system_prompt": "big"})
    ids = render_prompt(prompt_of(text="hi"), make_tokenizer(), rendering)
    assert ids.tolist() == ids_of("system : big user : hi <end> assistant :")


def test_an_option_that_would_undo_the_rendering_is_refused_at_load():
    with pytest.raises(ValueError, match="add_generation_prompt"):
        PromptRendering(template_options={"add_generation_prompt": False})


def test_plain_text_is_encoded_as_the_tokenizer_does_it():
    plain = PromptRendering(render="plain")
    assert render_prompt(prompt_of(text="hi there"), make_tokenizer(), plain).tolist() == ids_of("hi there")
    started = render_prompt(prompt_of(text="hi"), make_tokenizer(starts=True), plain)
    assert started.tolist() == ids_of("<s> hi")


def test_messages_cannot_be_plain():
    with pytest.raises(InputError, match=r"p1 has messages.*render: chat"):
        render_prompt(prompt_of(("user", "hi")), make_tokenizer(), PromptRendering(render="plain"))


def test_chat_without_a_template_says_use_plain():
    with pytest.raises(ConfigError, match="no chat template; set render: plain"):
        render_prompt(prompt_of(text="hi"), make_tokenizer(template=None), PromptRendering())


def test_a_prompt_the_template_refuses_is_named():
    with pytest.raises(InputError, match="prompt p1 does not fit the chat template: unknown role tool"):
        render_prompt(prompt_of(("tool", "hi")), make_tokenizer(), PromptRendering())


def test_a_prompt_without_tokens_is_refused():
    with pytest.raises(InputError, match="p1 has no tokens"):
        render_prompt(prompt_of(text=" "), make_tokenizer(), PromptRendering(render="plain"))


def test_prompt_text_shows_special_tokens_and_response_text_does_not():
    ids = np.array(ids_of("hi there <end>"), dtype=np.int32)
    assert prompt_text(ids, make_tokenizer()) == "hi there <end>"
    assert response_text(ids, make_tokenizer()) == "hi there"


def folder_with(tmp_path, **files: object) -> ModelConfig:
    for name, content in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    return ModelConfig(path=str(tmp_path))


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"config": {}, "generation_config": {"eos_token_id": [3, 2]}}, (2, 3)),
        ({"config": {}, "generation_config": {"eos_token_id": 3}}, (2, 3)),
        ({"config": {"eos_token_id": 3}, "generation_config": {}}, (2,)),
        ({"config": {"eos_token_id": 3}}, (2, 3)),
        ({"config": {}}, (2,)),
    ],
)
def test_stop_ids_are_the_tokenizers_and_the_generation_configs(tmp_path, files, expected):
    assert stop_ids(make_tokenizer(), folder_with(tmp_path, **files)) == expected


def test_a_model_without_an_end_token_is_refused(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(InputError, match="names an end token"):
        stop_ids(tokenizer, folder_with(tmp_path, config={}))


def test_an_end_token_outside_the_tokenizer_is_refused(tmp_path):
    with pytest.raises(
        InputError, match=r"generation_config\.json names end token 11, the tokenizer has 11 tokens"
    ):
        stop_ids(make_tokenizer(), folder_with(tmp_path, config={}, generation_config={"eos_token_id": 11}))


def test_a_saved_tokenizer_is_loaded_with_its_template(tmp_path):
    make_tokenizer().save_pretrained(tmp_path)
    loaded = load_tokenizer(ModelConfig(path=str(tmp_path)))
    assert loaded.get_vocab() == make_tokenizer().get_vocab()
    ids = render_prompt(prompt_of(text="hi there"), loaded, PromptRendering())
    assert ids.tolist() == ids_of("user : hi there <end> assistant :")


def test_a_folder_without_a_tokenizer_is_one_line(tmp_path):
    with pytest.raises(InputError, match=r"has no tokenizer\.json"):
        load_tokenizer(folder_with(tmp_path, config={"model_type": "llama"}))


def test_a_broken_tokenizer_file_is_one_line(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(InputError, match="cannot be loaded") as refused:
        load_tokenizer(ModelConfig(path=str(tmp_path)))
    assert "\n" not in str(refused.value)
