"""Caches of the tiny world that are rolled out and scored by the stages themselves."""

from lightopd.config import load_stage
from lightopd.pipelines import precompute, rollout


def roll(world, path):
    """A cache with some hundred response tokens, enough for statistics, and no signal yet."""
    asked = {"student": world.sft / "student", "prompts": world.root / "prompts.jsonl", "cache": path}
    sets = ["sampling.max_tokens=14", "sampling.n=4", "shard_rollouts=16"]
    rollout.run(load_stage("rollout", [], sets, asked))
    return path


def score_with(world, cache, *sets, load=None, **flags):
    """The report of the world's teacher on a cache; `load` stands in for the loading of its engine."""
    config = load_stage("precompute", [], sets, {"cache": cache, "teacher": world.teacher, **flags})
    return precompute.run(config) if load is None else precompute.run(config, load=load)
