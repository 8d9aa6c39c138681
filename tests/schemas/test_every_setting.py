"""Changed alone, a setting changes what a stage makes, the fingerprint of it, or raises; none is ignored.

A new field of a config fails here until it has a case in a table, or a test of its own that sets it.
"""

import re
from importlib.util import find_spec
from pathlib import Path

import pytest
from pydantic import BaseModel

from lightopd.cache.store import open_cache
from lightopd.config import _models_in, build_run, load_stage
from lightopd.engines.vllm.settings import engine_arguments
from lightopd.errors import LightopdError
from lightopd.models.limits import model_limits
from lightopd.objectives.requirements import needs
from lightopd.pipelines import rollout
from lightopd.schemas import configs, finetune, prompts
from lightopd.schemas.run import STAGES, RunConfig
from lightopd.training.checkpoints.run_identity import DECIDES_NOTHING, recipe_of

TESTS = Path(__file__).parents[1]

OTHER_CACHE = {
    configs.SamplingConfig: {
        "n": "2",
        "temperature": "0.5",
        "top_p": "0.9",
        "top_k": "5",
        "min_p": "0.1",
        "stop_ids": "[4]",
        "stop": "['1']",
        "max_tokens": "5",
        "seed": "3",
    },
    configs.ModelConfig: {"dtype": "bfloat16", "attention": "eager"},
    configs.RolloutConfig: {"shard_rollouts": "3", "keep_text": "false"},
    prompts.FilePrompts: {
        "limit": "3",
        "skip": "2",
        "template_options": '{"enable_thinking": false}',
        "render": "plain",
        "verifier": "last_number",
        "columns": '{"prompt": "answer"}',
    },
}
"""Settings of `rollout` under which another cache is made, by another name."""
REFUSED = {
    "sampling.repetition_penalty=1.1": "which engine hf does not have",
    "student.revision=main": "is a folder, which has none",
    "prompts.split=test": "is a file, which has no split",
    "prompts.subset=x": "is a file, which has no subset",
    "prompts.revision=x": "is a file, which has no revision",
    "sft_teacher=none": "--sft-teacher says none",
}
"""Settings of `rollout` that cannot act on a folder, a file or engine hf, or contradict what is recorded."""
OTHER_RUN = {
    finetune.FinetuneConfig: {
        "batch_sequences": 3,
        "ema_decay": 0.9,
        "precision": "bf16-mixed",
        "seed": 1,
        "shuffle_gib": 1.0,
        "held_out": 2,
        "adapter": {"rank": 2},
        "router_loss": 0.1,
        "privacy": {"clip": 1.0, "noise": 1.0},
        "optimizer": {"lr": 1.0},
    },
    finetune.OptimizerConfig: {
        "lr": 1e-3,
        "betas": (0.5, 0.5),
        "eps": 1e-3,
        "weight_decay": 0.5,
        "warmup_steps": 3,
        "schedule": "cosine",
        "clip_norm": 0.5,
        "steps_before": 2,
        "steps_in_all": 50,
    },
    finetune.AdapterConfig: {"kind": "dora", "rank": 3, "alpha": 3.0, "target_modules": ("q_proj",)},
}
"""Settings of training under which a run that was begun is refused as another."""
OTHER_ENGINE = {
    configs.VllmEngine: {
        "tensor_parallel_size": 2,
        "pipeline_parallel_size": 2,
        "quantization": "fp8",
        "gpu_memory_utilization": 0.5,
        "kv_cache_gib": 1.0,
        "batch_tokens": 4096,
        "eager": False,
        "seed": 3,
    },
}
"""Settings that vLLM is told."""
PREFIXES = {
    configs.SamplingConfig: "sampling.",
    configs.ModelConfig: "student.",
    configs.RolloutConfig: "",
    prompts.FilePrompts: "prompts.",
}


def planned(world, tmp_path, *sets):
    flags = {"student": world.sft / "student", "prompts": world.root / "prompts.jsonl"}
    flags["cache"] = tmp_path / "cache"
    allowed = {"allow": ["template-mismatch"]}
    return rollout.sampling_plan(load_stage("rollout", [], sets, flags | allowed)).manifest.fingerprint()


@pytest.mark.parametrize("model", OTHER_CACHE, ids=lambda model: model.__name__)
def test_each_setting_of_sampling_makes_another_cache(world, tmp_path, model):
    plain = planned(world, tmp_path)
    ignored = [
        name
        for name, value in OTHER_CACHE[model].items()
        if planned(world, tmp_path, f"{PREFIXES[model]}{name}={value}") == plain
    ]
    assert not ignored


@pytest.mark.parametrize(("setting", "words"), REFUSED.items(), ids=REFUSED)
def test_a_setting_that_could_not_act_is_refused(world, tmp_path, setting, words):
    with pytest.raises(LightopdError, match=words):
        planned(world, tmp_path, setting)


@pytest.mark.parametrize("model", OTHER_RUN, ids=lambda model: model.__name__)
def test_each_setting_of_training_makes_another_run(world, model):
    cache = open_cache(world.cache)

    def recipe(name=None, value=None):
        tuning = {}
        if model is finetune.FinetuneConfig:
            tuning = {} if name is None else {name: value}
        elif model is finetune.OptimizerConfig:
            tuning = {"optimizer": {} if name is None else {name: value}}
        else:
            tuning = {"adapter": {} if name is None else {name: value}}
        flags = {"cache": world.cache, "student": world.sft / "student", "out": "out", **tuning}
        config = load_stage("train", [], [], flags)
        return recipe_of(cache, config.student, config, config.objective, needs(config.objective))

    plain = recipe()
    assert not [name for name, value in OTHER_RUN[model].items() if recipe(name, value) == plain]


@pytest.mark.skipif(find_spec("vllm") is None, reason="vllm is not installed")
def test_each_setting_of_vllm_reaches_it(world):
    model = configs.ModelConfig(path=str(world.teacher))

    def arguments(**changed):
        return engine_arguments(configs.VllmEngine(kind="vllm", **changed), model, model_limits(model))

    plain, changes = arguments(), OTHER_ENGINE[configs.VllmEngine]
    assert not [name for name, value in changes.items() if arguments(**{name: value}) == plain]


def test_a_run_file_measures_divergence_only_where_it_is_asked_for():
    plain = {"out": "o", "teacher": "t", "student": "s", "prompts": "p", "eval_prompts": "e"}
    assert "teacher" not in build_run(plain).settings("eval_before")
    asked = build_run({**plain, "eval_divergence": True})
    assert asked.settings("eval_before")["teacher"] == asked.teacher


def settings() -> list[tuple[type[BaseModel], str]]:
    """Every field of every config but the objective's, whose whole content is in the recipe of a run."""
    seen: dict[type[BaseModel], None] = {}

    def walk(model):
        if model not in seen:
            seen[model] = None
            for field in model.model_fields.values():
                for nested in _models_in(field.annotation):
                    walk(nested)

    for stage in [*STAGES.values(), RunConfig]:
        walk(stage)
    plain = [model for model in seen if ".objectives." not in model.__module__]
    return [(model, name) for model in plain for name in model.model_fields]


def test_every_setting_has_a_case_here_or_is_set_by_a_test_of_its_own():
    tables = {
        (model, name)
        for table in (OTHER_CACHE, OTHER_RUN, OTHER_ENGINE)
        for model in table
        for name in table[model]
    } | {(RunConfig, "eval_divergence")}
    named = {setting.partition("=")[0].rpartition(".")[2] for setting in REFUSED}
    texts = [path.read_text() for path in TESTS.rglob("*.py") if path.name != Path(__file__).name]

    def is_set(name):
        flag = name.replace("_", "-")
        as_key, as_path = rf"[\"']{name}[\"']\s*:", rf"[\"'][\w.]*\b{name}[\"=]"
        pattern = re.compile("|".join((rf"\b{name}=", as_key, as_path, rf"--{flag}\b", rf"{name} \d")))
        return any(pattern.search(text) for text in texts)

    left = [(model, name) for model, name in settings() if (model, name) not in tables and name not in named]
    assert not [f"{model.__name__}.{name}" for model, name in left if not is_set(name)]


def test_what_decides_the_weights_is_what_the_recipe_of_a_run_has():
    """A setting of training is in the recipe of a run, or in the list of those that decide nothing."""
    covered = {*OTHER_RUN[finetune.FinetuneConfig]} | {*DECIDES_NOTHING}
    assert {*finetune.FinetuneConfig.model_fields} <= covered
