"""Two rounds of VPD by its commands: a student under feedback learns outcomes, and teaches the plain one."""

import pytest

from lightopd.cache.store import open_cache
from lightopd.lineage.fingerprint import fingerprint_model
from lightopd.schemas.configs import ModelConfig
from lightopd.schemas.manifest import StudentLineage

BOTH = "{{ prompt }}{{ response }}"
WITH_FEEDBACK = "{{ prompt }}{{ texts.feedback }}"


@pytest.fixture
def go(lightopd):
    """Call the command, which must succeed."""

    def call(*words):
        code, _, said = lightopd(*words)
        assert code == 0, said

    return call


def a_round(go, world, student, out):
    """Both models of a round: the one that was shown feedback, and the student that it taught."""
    prompts, cache = world.root / "prompts.jsonl", out / "cache"
    asked = ("--prompts", prompts, "--set", "prompts.verifier=tiny_models:checksum")
    small = ("--set", "sampling.max_tokens=6")
    go("rollout", "--student", student, "--cache", cache, *asked, *small, "--n", 4)
    of_self = ("--cache", cache, "--model", student, *asked, "--set", "role=self")
    go("rewrite", *of_self, *small, "--name", "feedback", "--template", BOTH)
    shown = ("--name", "feedback_shown", "--gives", "context", "--template", WITH_FEEDBACK)
    go("rewrite", *of_self, *shown, "--set", "texts=[feedback]")
    short = ("--set", "steps=2", "--set", "batch_sequences=24", "--set", "optimizer.lr=1e-3")
    trained = ("train", "--cache", cache, "--student", student, *short)
    go(*trained, "-c", "methods/vpd_teacher", "--out", out / "taught")
    teacher = ("--teacher", out / "taught" / "student", "--signal", "privileged", "--top-k", 4)
    go(
        "precompute", "--cache", cache, *teacher,
        "--set", "role=self", "--set", "context.text=feedback_shown",
    )  # fmt: skip
    go(*trained, "-c", "methods/vpd", "--out", out / "train")
    return out / "taught" / "student", out / "train" / "student"


@pytest.mark.slow
def test_two_rounds_train_two_models_each_and_no_refusal_is_overridden(world, go, tmp_path):
    student = world.sft / "student"
    for name in ("first", "second"):
        teacher, after = a_round(go, world, student, tmp_path / name)
        cache = open_cache(tmp_path / name / "cache", signals=["privileged"])
        began = fingerprint_model(ModelConfig(path=str(student)))
        signal = cache.signals["privileged"].manifest
        assert signal.role == "self"
        assert signal.model.is_same_as(fingerprint_model(ModelConfig(path=str(teacher))))
        assert not signal.model.is_same_as(began)
        assert cache.manifest.sampler.is_same_as(began)
        lineage = StudentLineage.model_validate_json((after / "lightopd_student.json").read_text())
        assert lineage.base.is_same_as(began)
        assert lineage.overrides == ()
        student = after


def test_a_model_that_was_not_trained_from_the_sampler_is_no_self(world, lightopd, tmp_path):
    code, _, said = lightopd(
        "precompute", "--cache", tmp_path / "cache", "--set", f"rollouts={world.cache}", "--teacher",
        world.teacher, "--signal", "privileged", "--set", "role=self", "--top-k", 4,
    )  # fmt: skip
    assert code != 0
    assert "student-mismatch" in said
