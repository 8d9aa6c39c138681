import pickle

import pytest

from lightopd.errors import LineageError
from lightopd.lineage.checks import check_student, check_teacher, check_tokenizer, precision_note
from lightopd.schemas.manifest import (
    ModelFingerprint,
    Override,
    Precision,
    SftLineage,
    TokenizerFingerprint,
)


def model(source: str, weights: str = "w1", config: str = "c1") -> ModelFingerprint:
    return ModelFingerprint(identity=f"{weights}-{config}", weights=weights, config=config, source=source)


def tokenizer(**changes: object) -> TokenizerFingerprint:
    plain = {
        "vocabulary": "v1",
        "size": 5,
        "special_ids": {"bos": [0], "eos": [1, 3], "pad": [1], "unk": []},
        "template": "t1",
    }
    return TokenizerFingerprint.model_validate({**plain, **changes})


RECORDED = SftLineage(proof="recorded", teacher=model("runs/teacher"))


def test_the_sft_teacher_is_accepted_under_any_name():
    assert check_teacher(RECORDED, model("moved/elsewhere"), (), "precompute") == ()


@pytest.mark.parametrize("proof", ["recorded", "declared"])
def test_another_teacher_is_refused_with_both_names_the_reason_and_what_to_do(proof):
    sft = SftLineage(proof=proof, teacher=model("runs/teacher"))
    with pytest.raises(LineageError) as refused:
        check_teacher(sft, model("other", weights="w2"), (), "precompute")
    message = str(refused.value)
    for part in (
        "precompute refused",
        f"runs/teacher (w1-c1), {proof}",
        "other (w2-c1)",
        "arXiv 2604.13010, Theorems 3.8 and 3.9",
        "score with the SFT teacher, redo SFT",
        "--allow teacher-mismatch",
    ):
        assert part in message
    assert "\n" not in message
    assert str(pickle.loads(pickle.dumps(refused.value))) == message


def test_an_allowed_teacher_is_recorded_with_what_was_found():
    (override,) = check_teacher(RECORDED, model("other", weights="w2"), ("teacher-mismatch",), "precompute")
    assert override == Override(
        stage="precompute",
        allowed="teacher-mismatch",
        found="the SFT teacher is runs/teacher (w1-c1), recorded, other (w2-c1) scores",
    )


def test_allowing_something_else_does_not_allow_another_teacher():
    with pytest.raises(LineageError):
        check_teacher(RECORDED, model("other", weights="w2"), ("student-mismatch",), "precompute")


def test_an_override_that_is_not_needed_is_not_recorded():
    assert check_teacher(RECORDED, model("runs/teacher"), ("teacher-mismatch",), "precompute") == ()


def test_an_unknown_sft_teacher_is_refused_and_the_message_says_how_to_declare_it():
    unknown = SftLineage(proof="unknown")
    with pytest.raises(LineageError, match=r"SFT teacher is unknown.*--sft-teacher MODEL"):
        check_teacher(unknown, model("other"), (), "precompute")
    (override,) = check_teacher(unknown, model("other"), ("teacher-mismatch",), "precompute")
    assert "unknown" in override.found


def test_an_unknown_scorer_is_refused():
    with pytest.raises(LineageError, match="an unknown model scores"):
        check_teacher(RECORDED, None, (), "train")


def test_a_teacher_declared_by_name_is_compared_with_where_the_scorer_is_read_from():
    declared = SftLineage(proof="declared", name="maker/tiny")
    assert check_teacher(declared, model("maker/tiny"), (), "precompute") == ()
    with pytest.raises(LineageError, match="'maker/tiny' by name, declared"):
        check_teacher(declared, model("maker/large"), (), "precompute")


def test_equal_weights_under_another_config_are_named_as_such():
    with pytest.raises(LineageError, match=r"the weights are equal, the config\.json is not"):
        check_teacher(RECORDED, model("runs/teacher", config="c2"), (), "precompute")


def test_only_the_student_that_sampled_is_accepted():
    assert check_student(model("a"), model("b"), (), "train") == ()
    with pytest.raises(LineageError, match=r"sampled by a .*, this student is b .*--allow student-mismatch"):
        check_student(model("a"), model("b", weights="w2"), (), "train")
    (override,) = check_student(model("a"), model("b", weights="w2"), ("student-mismatch",), "train")
    assert (override.stage, override.allowed) == ("train", "student-mismatch")


def test_an_imported_cache_without_sampler_or_tokenizer_needs_overrides():
    with pytest.raises(LineageError, match="sampled by an unknown model"):
        check_student(None, model("b"), (), "train")
    with pytest.raises(LineageError, match="does not say which tokenizer"):
        check_tokenizer(None, tokenizer(), (), "train")
    assert check_tokenizer(None, tokenizer(), ("tokenizer-mismatch",), "train")[0].stage == "train"


@pytest.mark.parametrize(
    ("changes", "allowed", "told"),
    [
        ({"vocabulary": "v2"}, "tokenizer-mismatch", r"5 tokens in the cache \(v1\), 5 in this model \(v2\)"),
        (
            {"special_ids": {"bos": [0], "eos": [1], "pad": [1], "unk": []}},
            "special-ids-mismatch",
            r"eos ids are \[1, 3\] in the cache and \[1\] in this model",
        ),
        (
            {"special_ids": {"bos": [2], "eos": [1, 3], "pad": [1], "unk": []}},
            "special-ids-mismatch",
            r"bos ids are \[0\] in the cache and \[2\] in this model",
        ),
        (
            {"special_ids": {"bos": [0], "eos": [1, 3], "pad": [1], "unk": [4]}},
            "special-ids-mismatch",
            r"unk ids are \[\] in the cache and \[4\] in this model",
        ),
        ({"template": "t2"}, "template-mismatch", "template is t1 in the cache and t2 in this model"),
        ({"template": None}, "template-mismatch", "template is t1 in the cache and absent in this model"),
    ],
)
def test_each_part_of_a_tokenizer_is_refused_and_allowed_on_its_own(changes, allowed, told):
    found = tokenizer(**changes)
    with pytest.raises(LineageError, match=f"{told}.*--allow {allowed}"):
        check_tokenizer(tokenizer(), found, (), "train")
    others = {"tokenizer-mismatch", "special-ids-mismatch", "template-mismatch"} - {allowed}
    with pytest.raises(LineageError):
        check_tokenizer(tokenizer(), found, others, "train")
    (override,) = check_tokenizer(tokenizer(), found, (allowed,), "train")
    assert override.allowed == allowed


def test_a_cache_without_a_template_does_not_take_any():
    with pytest.raises(LineageError, match="template is absent in the cache and t1 in this model"):
        check_tokenizer(tokenizer(template=None), tokenizer(), (), "train")


def test_an_equal_tokenizer_with_another_pad_token_is_accepted():
    padded = tokenizer(special_ids={"bos": [0], "eos": [1, 3], "pad": [4], "unk": []})
    assert check_tokenizer(tokenizer(), padded, (), "train") == ()


def test_two_differing_parts_need_and_record_two_overrides():
    found = tokenizer(vocabulary="v2", template="t2")
    with pytest.raises(LineageError, match="--allow template-mismatch"):
        check_tokenizer(tokenizer(), found, ("tokenizer-mismatch",), "train")
    overrides = check_tokenizer(tokenizer(), found, ("tokenizer-mismatch", "template-mismatch"), "train")
    assert [override.allowed for override in overrides] == ["tokenizer-mismatch", "template-mismatch"]


def test_the_tokens_that_differ_are_named_where_both_maps_are_at_hand():
    cached, found = {"a": 0, "b": 1, "c": 2}, {"a": 0, "b": 2, "c": 1, "d": 3}
    with pytest.raises(
        LineageError, match="3 tokens differ, such as 'b' is 1 and 2, 'c' is 2 and 1, 'd' is None and 3"
    ):
        check_tokenizer(tokenizer(), tokenizer(vocabulary="v2"), (), "train", (cached, found))


def test_a_difference_in_precision_is_told_and_not_refused():
    note = precision_note(Precision(dtype="bfloat16"), Precision(dtype="float32", quantization="gptq"))
    assert note is not None
    assert "sampled in bfloat16, scored in float32 (gptq)" in note
    assert precision_note(Precision(dtype="float32"), Precision(dtype="float32")) is None
    assert precision_note(None, Precision(dtype="float32")) is None


def test_a_teacher_in_another_number_format_is_called_so(tmp_path):
    sources = {"float32": tmp_path / "whole", "bfloat16": tmp_path / "half"}
    for dtype, folder in sources.items():
        folder.mkdir()
        (folder / "config.json").write_text(f'{{"dtype": "{dtype}"}}')
    whole, half = (
        ModelFingerprint(identity=dtype, weights=dtype, config="c", source=str(folder))
        for dtype, folder in sources.items()
    )
    taught = SftLineage(proof="recorded", teacher=whole)
    with pytest.raises(LineageError, match="the one is stored in float32, the other in bfloat16"):
        check_teacher(taught, half, (), "precompute")
    moved = half.model_copy(update={"source": str(tmp_path / "gone")})
    with pytest.raises(LineageError) as refused:
        check_teacher(taught, moved, (), "precompute")
    assert "is stored in" not in str(refused.value)
