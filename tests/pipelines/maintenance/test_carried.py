"""Texts, contexts and hidden states go with their rollouts into merged caches and parts of a split one."""

import pyarrow.parquet as pq
import pytest
from scored_caches import score_with

from lightopd.cache.contexts import read_contexts, read_texts
from lightopd.cache.manifests import head_path, signal_folder
from lightopd.cache.store import open_cache
from lightopd.cache.verify import verify
from lightopd.config import load_stage
from lightopd.pipelines import rewrite, rollout
from lightopd.pipelines.maintenance.merge import merge
from lightopd.pipelines.maintenance.split import split

SIGNALS = ("states", "told", "written")


@pytest.fixture(scope="module")
def made(world, tmp_path_factory):
    """Caches `a` and `b` of other prompts with a text, contexts and hidden states; read only."""
    root = tmp_path_factory.mktemp("caches")
    lines = (world.root / "prompts.jsonl").read_text().splitlines()
    for name, own in (("a", lines[:6]), ("b", lines[6:10])):
        prompts = root / f"{name}.jsonl"
        prompts.write_text("\n".join(own))
        cache = root / name
        asked = {"student": world.sft / "student", "prompts": prompts, "cache": cache}
        sets = ["sampling.max_tokens=6", "sampling.n=2", "shard_rollouts=6"]
        rollout.run(load_stage("rollout", [], sets, asked))
        asked = {"cache": cache, "model": world.teacher, "prompts": prompts, "name": "shown"}
        told = {"template": "{{ prompt }}{{ response }}", "gives": "context"}
        rewrite.run(load_stage("rewrite", [], [], asked | told))
        score_with(world, cache, "hidden_format=bfloat16", signal="states", keep="hidden")
        context = {"template": "{{ prompt }}{{ prompt }}", "prompts": str(prompts)}
        score_with(world, cache, signal="told", top_k=4, context=context)
        score_with(world, cache, "context.text=shown", signal="written", top_k=4)
    return root


def by_rollout(caches, part):
    """Rows of a part of caches, by the prompt and sample that they speak of."""
    found = {}
    for cache in caches:
        for file in sorted((cache / part).glob("part-*.parquet")):
            rollouts = pq.read_table(cache / "rollouts" / file.name)
            rows = pq.read_table(file).replace_schema_metadata().to_pylist()
            for of, row in zip(rollouts.to_pylist(), rows, strict=True):
                assert row["rollout_id"] == of["rollout_id"]
                found[of["prompt_id"], of["sample_index"]] = row
    return found


def contexts_of(caches, name):
    """What a signal's model was shown, by the key of its contexts."""
    found = {}
    for cache in caches:
        manifest = open_cache(cache, signals=[name]).signals[name].manifest
        contexts = read_contexts(signal_folder(cache, name), manifest.context)
        found |= {key: ids.tolist() for key, ids in contexts.items()}
    return found


def check_carried(made_of, caches):
    for cache in caches:
        assert verify(cache) == []
        opened = open_cache(cache, signals=SIGNALS)
        assert {name: opened.signals[name].manifest.context["kind"] for name in SIGNALS} == {
            "states": "plain",
            "told": "template",
            "written": "written",
        }
        head = head_path(cache, opened.signals["states"].manifest.hidden.head)
        assert head.read_bytes() == (made_of[0] / head.relative_to(cache)).read_bytes()
        assert (
            sum(read_texts(opened, "shown", shard).num_rows for shard in opened.shards) == opened.num_rollouts
        )
    for part in ("texts/shown", *(f"signals/{name}" for name in SIGNALS)):
        before, after = by_rollout(made_of, part), by_rollout(caches, part)
        assert after == before
        assert len(before) == len(by_rollout(made_of, "rollouts"))
    for name in ("told", "written"):
        assert contexts_of(caches, name) == contexts_of(made_of, name)


def test_a_merged_cache_has_the_texts_contexts_and_hidden_states_of_its_sources(made, tmp_path):
    merge(tmp_path / "both", [made / "a", made / "b"])
    check_carried([made / "a", made / "b"], [tmp_path / "both"])


def test_the_parts_of_a_split_cache_have_its_texts_contexts_and_hidden_states(made, tmp_path):
    split(tmp_path / "parts", made / "a", [0.5, 0.5])
    check_carried([made / "a"], [tmp_path / "parts" / name for name in ("part-1", "part-2")])


def test_what_was_carried_is_what_the_stages_find_done(world, made, tmp_path, caplog):
    merge(tmp_path / "both", [made / "a", made / "b"])
    cache = tmp_path / "both"
    before = {path: path.read_bytes() for path in cache.rglob("part-*")}
    caplog.set_level("INFO")
    score_with(world, cache, "context.text=shown", signal="written", top_k=4)
    score_with(world, cache, "hidden_format=bfloat16", signal="states", keep="hidden")
    assert caplog.text.count("precompute: nothing to do") == 2
    assert {path: path.read_bytes() for path in cache.rglob("part-*")} == before
