"""Configs from files, `--set` and flags, and the words of their errors."""

import os
import re
from pathlib import Path

import pytest
import yaml

from lightopd import config
from lightopd.config import (
    as_yaml,
    build,
    build_run,
    describe,
    load_run,
    load_stage,
    merged,
    parse_set,
    read_yaml,
)
from lightopd.errors import ConfigError
from lightopd.files import looks_like_url
from lightopd.pipelines import RECIPES
from lightopd.schemas.base import StrictModel
from lightopd.schemas.configs import PrecomputeConfig, TrainConfig
from lightopd.schemas.run import STAGES, RunConfig

TRAIN = {"cache": "c", "student": "s", "out": "o"}


def written(tmp_path, name, data):
    path = tmp_path / name
    path.write_text(yaml.safe_dump(data))
    return str(path)


def models_in(model, seen=None):
    from lightopd.config import _models_in

    seen = {} if seen is None else seen
    if model not in seen:
        seen[model] = True
        for field in model.model_fields.values():
            for nested in _models_in(field.annotation):
                models_in(nested, seen)
    return list(seen)


@pytest.mark.parametrize("stage", [*STAGES, "run"])
def test_every_field_of_every_config_has_a_sentence(stage):
    for model in models_in({**STAGES, "run": RunConfig}[stage]):
        for name, field in model.model_fields.items():
            assert field.description, f"{model.__name__}.{name}"
            assert field.description.endswith("."), f"{model.__name__}.{name}"


def test_later_files_then_sets_then_flags_win(tmp_path):
    first = written(
        tmp_path, "a.yaml", {**TRAIN, "steps": 1, "seed": 1, "optimizer": {"lr": 0.1, "eps": 0.5}}
    )
    second = written(tmp_path, "b.yaml", {"steps": 2, "seed": 2})
    config = load_stage(
        "train", [first, second], ["seed=3", "optimizer.lr=1e-3"], {"student": "other", "out": None}
    )
    assert (config.steps, config.seed, config.optimizer.lr, config.optimizer.eps) == (2, 3, 1e-3, 0.5)
    assert (config.student.path, str(config.out)) == ("other", "o")


def test_a_stage_takes_its_section_of_a_run_file(tmp_path):
    shared = {"out": "x", "teacher": "t", "student": "s", "prompts": "p.jsonl"}
    run = written(tmp_path, "run.yaml", {**shared, "train": {"steps": 7}, "precompute": {"top_k": 5}})
    assert load_stage("train", [run], [], {}).steps == 7
    precompute = load_stage("precompute", [run], ["top_k=6"], {})
    assert (precompute.top_k, precompute.teacher.path, str(precompute.cache)) == (6, "t", "x/cache")


def test_the_student_of_a_run_is_the_fine_tuned_one_where_there_is_an_sft_section(tmp_path):
    shared = {"out": "x", "teacher": "t", "student": "s", "prompts": "p.jsonl"}
    plain = load_run([written(tmp_path, "a.yaml", {**shared, "train": {}})], [], {})
    tuned = load_run([written(tmp_path, "b.yaml", {**shared, "sft": {"part": "both"}})], [], {})
    assert build(STAGES["rollout"], plain.settings("rollout")).student.path == "s"
    assert build(STAGES["rollout"], tuned.settings("rollout")).student.path == "x/sft/student"
    assert build(STAGES["train"], tuned.settings("train")).student.path == "x/sft/student"


def test_an_unknown_key_is_refused_with_the_name_that_was_meant():
    with pytest.raises(ConfigError, match=r"unknown key optimizer\.lrr \(did you mean lr\?\)"):
        build(TrainConfig, {**TRAIN, "optimizer": {"lrr": 1}})


def test_a_mistake_in_a_run_files_section_names_the_section(tmp_path):
    shared = {"out": "x", "teacher": "t", "student": "s", "prompts": "p.jsonl"}
    run = written(tmp_path, "run.yaml", {**shared, "train": {"stepz": 7}})
    with pytest.raises(ConfigError, match="section train: unknown key stepz"):
        load_run([run], [], {})


def test_a_wrong_type_says_what_was_found_and_a_missing_key_is_named():
    with pytest.raises(ConfigError, match=r"top_k: .*found 'many'"):
        build(PrecomputeConfig, {"cache": "c", "teacher": "t", "top_k": "many"})
    with pytest.raises(ConfigError, match="teacher is missing"):
        build(PrecomputeConfig, {"cache": "c"})


def test_contradictions_are_refused_at_load():
    with pytest.raises(ConfigError, match="leave rollouts out"):
        build(PrecomputeConfig, {"cache": "c", "rollouts": "c", "teacher": "t"})


@pytest.mark.parametrize("text", ["steps", "=3", "a..b=1", ".a=1"])
def test_a_set_that_is_no_assignment_is_refused(text):
    with pytest.raises(ConfigError, match="is not key=value"):
        parse_set(text)


@pytest.mark.parametrize(
    ("text", "value"),
    [("a=1e-5", 1e-5), ("a=3", 3), ("a=true", True), ("a=[1, 2]", [1, 2]), ("a=x=y", "x=y"), ("a=", None)],
)
def test_values_of_sets_are_read_as_yaml(text, value):
    assert parse_set(text) == {"a": value}
    assert type(parse_set(text)["a"]) is type(value)


def test_a_models_other_settings_stay_when_its_folder_is_a_flag():
    flags = {"student": "base", "prompts": "p.jsonl", "cache": "c"}
    student = load_stage("rollout", [], ["student.adapter=a", "student.dtype=float32"], flags).student
    assert (student.path, str(student.adapter), student.dtype) == ("base", "a", "float32")


def test_a_flag_for_a_prompt_file_keeps_what_is_set_beside_it():
    flags = {"student": "base", "cache": "c", "prompts": Path("p.jsonl")}
    prompts = load_stage("rollout", [], ["prompts.limit=2"], flags).prompts
    assert (prompts.path, prompts.limit) == (Path("p.jsonl"), 2)
    prompts = load_stage("rollout", [], ["prompts.kind=running_totals"], flags).prompts
    assert (prompts.path, prompts.kind) == (Path("p.jsonl"), "file")


def test_another_kind_replaces_a_union_instead_of_mixing_with_it():
    base = {"prompts": {"kind": "file", "path": "p"}}
    assert merged(base, {"prompts": {"kind": "running_totals", "count": 3}})["prompts"] == {
        "kind": "running_totals",
        "count": 3,
    }
    assert merged(base, {"prompts": {"limit": 3}})["prompts"] == {"kind": "file", "path": "p", "limit": 3}


@pytest.mark.parametrize(
    ("content", "message"),
    [("a: [1", "not valid YAML"), ("- 1", "holds a list"), (b"\xff\xfe", "cannot be read")],
)
def test_a_broken_file_is_one_line_that_names_it(tmp_path, content, message):
    path = tmp_path / "bad.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError, match=message) as caught:
        read_yaml(str(path))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_suggests_recipes_of_a_close_name(tmp_path):
    (tmp_path / "methods").mkdir()
    (tmp_path / "methods" / "lightning_opd.yaml").write_text("steps: 3")
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / "lightning_opt.yaml").write_text("title: an arm, which no stage takes")
    assert read_yaml("methods/lightning_opd", tmp_path) == {"steps": 3}
    with pytest.raises(ConfigError, match=r"did you mean the recipe methods/lightning_opd\?"):
        read_yaml("methods/lightening_opd", tmp_path)


def test_a_recipe_name_cannot_leave_the_recipe_folder(tmp_path):
    (tmp_path / "recipes").mkdir()
    (tmp_path / "secret.yaml").write_text("steps: 3")
    with pytest.raises(ConfigError, match="no config file"):
        read_yaml("../secret", tmp_path / "recipes")


def test_the_resolved_config_reads_back_as_itself(tmp_path):
    config = build(TrainConfig, {**TRAIN, "optimizer": {"lr": 3e-5}})
    path = tmp_path / "train.yaml"
    path.write_text(as_yaml(config))
    assert load_stage("train", [str(path)], [], {}) == config


@pytest.mark.parametrize(
    "url", ["s3://caches/run1", "hf://datasets/lab/rollouts@main/run1", "file:///caches/run1"]
)
def test_a_url_is_saved_whole_and_one_that_lost_a_slash_is_read(tmp_path, url):
    config = build(TrainConfig, {**TRAIN, "cache": url})
    assert yaml.safe_load(as_yaml(config))["cache"] == url
    for number, text in enumerate((as_yaml(config), as_yaml(config).replace("://", ":/"))):
        (tmp_path / f"{number}.yaml").write_text(text)
        read = load_stage("train", [str(tmp_path / f"{number}.yaml")], [], {})
        assert (read, looks_like_url(read.cache)) == (config, url)


def test_describe_names_every_key_with_default_and_sentence():
    class Inner(StrictModel):
        depth: int = 3
        """How deep."""

    class Outer(StrictModel):
        name: str
        """What it is called."""
        inner: Inner = Inner()
        """The inside."""

    assert describe(Outer).splitlines() == [
        "name  (required)",
        "    What it is called.",
        "inner  (default below)",
        "    The inside.",
        "inner.depth  (default 3)",
        "    How deep.",
    ]


def test_settings_of_a_model_or_a_prompt_file_join_the_plain_path_of_a_file():
    written = {"student": "STUDENT", "prompts": "p.jsonl", "out": "out"}
    over = {"student": {"dtype": "float32"}, "prompts": {"limit": 2}}
    assert merged(written, over) == {
        "student": {"path": "STUDENT", "dtype": "float32"},
        "prompts": {"path": "p.jsonl", "limit": 2},
        "out": "out",
    }
    replaced = {"student": {"path": "OTHER"}, "prompts": {"kind": "running_totals", "count": 4}}
    assert merged(written, replaced) == {**written, **replaced}


def test_every_setting_is_read_somewhere():
    """A field that no code outside its definition names is a knob that turns nothing."""
    root = Path(__file__).parents[2]
    folders = ("lightopd", "pipelines", "cli", "schemas")
    text = "\n".join(path.read_text() for folder in folders for path in sorted((root / folder).rglob("*.py")))
    unread = [
        f"{model.__name__}.{name}"
        for stage in {**STAGES, "run": RunConfig}.values()
        for model in models_in(stage)
        for name in model.model_fields
        if not re.search(rf"(?:\.{name}\b(?! *:))|(?:[\"']{name}[\"'])", text)
    ]
    assert sorted(set(unread)) == []


@pytest.mark.parametrize(
    "wrong",
    [{"lr": ".inf"}, {"lr": "1e39"}, {"weight_decay": ".inf"}, {"eps": ".nan"}, {"betas": "[1.5, 0.98]"}],
)
def test_an_optimiser_that_torch_would_refuse_is_refused_as_a_setting(wrong):
    [(name, value)] = wrong.items()
    with pytest.raises(ConfigError, match=rf"optimizer\.{name}"):
        load_stage("train", [], [f"optimizer.{name}={value}"], TRAIN)


@pytest.mark.parametrize(
    ("stage", "assignment", "hint"),
    [
        ("train", "learning_rate=1", "did you mean optimizer.lr?"),
        ("train", "lr=1", "did you mean optimizer.lr?"),
        ("train", "train.steps=1", "settings of train are written without `train.` here"),
        ("rollout", "sampling.max_new_tokens=1", "did you mean max_tokens?"),
        ("rollout", "temperature=1", "did you mean sampling.temperature?"),
    ],
)
def test_an_unknown_key_is_told_where_it_belongs(stage, assignment, hint):
    with pytest.raises(ConfigError, match=re.escape(f"({hint})")):
        load_stage(stage, [], [assignment], {})


def test_a_stages_setting_at_the_top_of_a_run_file_is_told_its_section():
    with pytest.raises(ConfigError, match=r"unknown key learning_rate \(did you mean .*train.optimizer.lr"):
        build_run({"out": "o", "teacher": "t", "student": "s", "prompts": "p", "learning_rate": 1})


def test_describe_lists_every_kind_of_a_union_and_every_value_of_an_enumeration():
    text = describe(TrainConfig)
    for kind in ("log_ratio", "reward", "mle", "estimator", "divergence", "preference", "custom"):
        assert re.search(rf"^objective.*target of kind {kind}: .", text, re.MULTILINE), kind
    assert "optimizer.schedule  (default constant; one of constant, " in text


def test_a_tilde_is_the_home_folder_wherever_a_path_is_set(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "c.yaml").write_text("cache: ~/c\nprompts: {path: ~/p.jsonl, template_options: {a: ~/b}}\n")
    found = load_stage("rollout", [str(tmp_path / "c.yaml")], ["student.path=~/s"], {"sft_teacher": "~/t"})
    assert found.cache == tmp_path / "c"
    assert found.prompts.path == tmp_path / "p.jsonl"
    assert (found.student.path, found.sft_teacher) == (f"{tmp_path}/s", f"{tmp_path}/t")
    assert found.prompts.template_options == {"a": "~/b"}


@pytest.mark.parametrize("files", [["qwen3_8b"], ["qwen3_8b", "qwen3_8b_8gpu"], ["demo"], ["smollm2"]])
def test_every_shipped_run_file_is_right_and_its_refusals_have_been_heard(files):
    sets = ["out=o", "teacher=t", "student=s"] if files[0] in ("demo", "smollm2") else []
    config = load_run(files, sets, {}, RECIPES)
    stages = {name: build(STAGES[stage], settings) for name, stage, settings in config.pipeline()}
    if files[-1] == "qwen3_8b_8gpu":
        assert (stages["train"].devices, stages["train"].adapter) == (8, None)
        assert stages["sft"].finetune.batch_sequences % 8 == 0


LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n"
    for before, name in zip("abcdefghi", "bcdefghij", strict=True)
)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (LAUGHS, "stands for more than 100,000 values"),
        ("a: &a [*a]", "stands for more than 100,000 values"),
        ("? [a]\n: b", "a key is no text or number"),
        ("a: " + "[" * 3000, "nested too deeply|not valid YAML"),
    ],
)
def test_a_small_file_that_stands_for_much_is_refused_in_a_line(tmp_path, text, told):
    path = tmp_path / "small.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=told) as caught:
        read_yaml(str(path))
    assert "\n" not in str(caught.value)
    if text != LAUGHS:
        with pytest.raises(ConfigError, match="the value is not YAML"):
            parse_set(f"a={text}")


def test_a_merge_key_is_read_as_yaml_has_it(tmp_path):
    path = tmp_path / "merge.yaml"
    path.write_text("common: &common {lr: 1}\ntrain: {<<: *common, steps: 2}\n")
    assert read_yaml(str(path))["train"] == {"lr": 1, "steps": 2}


def test_a_file_of_settings_is_not_large(tmp_path, monkeypatch):
    monkeypatch.setattr(config, "MAX_YAML_BYTES", 10)
    with pytest.raises(ConfigError, match="name a file of settings"):
        read_yaml(written(tmp_path, "large.yaml", {"steps": 100_000}))


def test_a_fifo_is_no_config(tmp_path):
    os.mkfifo(tmp_path / "c.yaml")
    with pytest.raises(ConfigError, match=r"c\.yaml is a FIFO, not a file"):
        read_yaml(str(tmp_path / "c.yaml"))


@pytest.mark.parametrize("stage", ["rollout", "run"])
def test_a_key_typed_where_its_variables_name_belongs_is_not_repeated(stage):
    key = "sk-proj-0123456789abcdef"
    settings = {"out": "o", "student": "s", "teacher": "t", "prompts": "p.jsonl", "cache": "c"}
    engine = {"kind": "server", "urls": "http://a", "api_key_env": key}
    if stage == "run":
        settings = {**{k: v for k, v in settings.items() if k != "cache"}, "rollout": {"engine": engine}}
        with pytest.raises(ConfigError, match="give the name of an environment variable") as caught:
            build_run(settings)
    else:
        kept = {k: settings[k] for k in ("student", "prompts", "cache")}
        with pytest.raises(ConfigError, match="give the name of an environment variable") as caught:
            build(STAGES[stage], {**kept, "engine": engine})
    assert key not in str(caught.value)


@pytest.mark.parametrize("n", [2_000_000, 10**30])
def test_a_config_claims_no_more_responses_than_can_be(n):
    with pytest.raises(ConfigError, match=r"sampling\.n: .*less than or equal to 1000000"):
        build(STAGES["rollout"], {"student": "s", "prompts": "p.jsonl", "cache": "c", "sampling": {"n": n}})
