"""Ids as text: byte pieces, spaces, special tokens and characters that would hide others."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from lightopd.inspection.token_texts import TokenTexts, _texts
from lightopd.text_tables import visible


def byte_level() -> Tokenizer:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: place for place, letter in enumerate(letters)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|end|>"])
    return backend


def test_a_byte_level_tokenizers_pieces_are_bytes_and_together_the_text(tmp_path):
    backend = byte_level()
    texts = _texts(tmp_path, backend)
    ids = backend.encode("né €\n").ids
    assert texts.decode(ids) == "né €\n"
    assert [texts.token(token_id) for token_id in ids] == [
        *("n", "\\xC3", "\\xA9", " "),
        *("\\xE2", "\\x82", "\\xAC", "\n"),
    ]
    assert texts.token(backend.token_to_id("<|end|>")) == "<|end|>"


def test_a_sentence_piece_tokenizers_marks_are_spaces_and_its_bytes_bytes(tmp_path):
    backend = Tokenizer(
        models.BPE({"\u2581a": 0, "b": 1, "<0xE2>": 2, "<0x82>": 3, "<0xAC>": 4}, [], byte_fallback=True)
    )
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    texts = _texts(tmp_path, backend)
    assert texts.decode([0, 1, 2, 3, 4]) == " ab€"
    assert texts.token(2) == "\\xE2"


def test_an_id_without_a_token_is_its_number(tmp_path):
    assert _texts(tmp_path, byte_level()).token(9999) == "#9999"
    assert TokenTexts(None, "nowhere").decode([1, 2]) == "#1 #2"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a b", "a b"),
        ("\n\t", "\\n\\t"),
        ("\x1b[2J", "\\u001b[2J"),
        ("abc\u202ecba", "abc\\u202ecba"),
        ("a\u200bb", "a\\u200bb"),
        ("é€", "é€"),
    ],
)
def test_characters_that_hide_or_move_others_are_written_out(text, shown):
    assert visible(text) == shown
