"""Rollouts cut at the student's most uncertain tokens and continued by a model, each continuation scored."""

import shutil

import numpy as np
import pytest
import torch

from lightopd.cache.contexts import read_texts, scored_chunks
from lightopd.cache.index import query
from lightopd.cache.reader import read_columns
from lightopd.cache.store import open_cache
from lightopd.cache.verify import verify
from lightopd.config import load_stage
from lightopd.errors import CacheError, ConfigError, InputError
from lightopd.models.load import load_model
from lightopd.pipelines import RECIPES, precompute, rewrite, train
from lightopd.pipelines.sampling.branches import entropy_peaks, shared_runs
from lightopd.rewards.reward import reward_of
from lightopd.schemas.configs import ModelConfig


@pytest.fixture
def cache(world, tmp_path):
    """A copy of the world's rollouts."""
    folder = shutil.copytree(world.cache, tmp_path / "cache")
    shutil.rmtree(folder / "signals")
    return folder


def run(world, cache, *sets, name="continuations", **flags):
    asked = {"cache": cache, "model": world.teacher, "prompts": world.root / "prompts.jsonl", "name": name}
    asked |= {"template": "continue", "gives": "branches", **flags}
    return rewrite.run(load_stage("rewrite", [], ["sampling.max_tokens=3", *sets], asked))


def rows_of(path, name="continuations"):
    opened = open_cache(path, signals=())
    own = ["prompt_ids", "response_ids", "entropies", "prompt_id"]
    for shard in opened.shards:
        texts = read_texts(opened, name, shard).to_pylist()
        yield from zip(texts, read_columns(opened, shard, own).to_pylist(), strict=True)


def score_student(world, cache):
    student = world.sft / "student"
    asked = {"cache": cache, "teacher": student, "signal": "rollout_student", "role": "self", "top_k": 4}
    precompute.run(load_stage("precompute", [], [], asked))


def test_chunks_begin_at_the_highest_entropies_do_not_overlap_and_hold_trained_tokens_alone():
    entropies = np.array([0.1, 0.9, 0.8, 0.2, 0.5, 0.7, 0.3, 0.6], np.float32)
    mask = np.ones(8, bool)
    assert entropy_peaks(entropies, mask, 2, 3) == [(1, 3), (5, 3)]
    assert entropy_peaks(entropies, mask, 3, 1) == [(1, 1), (2, 1), (5, 1)]
    assert entropy_peaks(entropies, mask, 9, 3) == [(1, 3), (5, 3)]
    mask[[2, 5]] = False
    assert entropy_peaks(entropies, mask, 2, 3) == [(1, 1), (7, 1)]
    assert entropy_peaks(entropies, ~mask, 4, 3) == [(2, 1), (5, 1)]


def test_runs_that_are_shared_in_order_count():
    assert shared_runs(np.array([4, 5, 6]), np.array([4, 5, 6])) == 1.0
    assert shared_runs(np.array([4, 5]), np.array([7, 8])) == 0.0
    assert shared_runs(np.array([4, 5, 6]), np.array([5, 6, 9])) == pytest.approx(4 / 6)


def test_a_continuation_is_what_the_model_says_after_prompt_and_kept_ids(world, cache):
    report = run(world, cache, "branches.places=2", "sampling.temperature=0")
    model = load_model(ModelConfig(path=str(world.teacher)), "cpu")
    for text, rollout in rows_of(cache):
        assert text["prompt_ids"] == rollout["prompt_ids"]
        assert text["places"]
        begins = np.concatenate([[0], np.cumsum(text["drawn_counts"])])
        for branch, (place, count) in enumerate(zip(text["places"], text["chunk_counts"], strict=True)):
            drawn = text["response_ids"][begins[branch] : begins[branch + 1]]
            ids = [*rollout["prompt_ids"], *rollout["response_ids"][:place]]
            with torch.no_grad():
                said = model(input_ids=torch.tensor([[*ids, *drawn]])).logits[0].argmax(-1)
            assert drawn == said[len(ids) - 1 : -1].tolist()
            own = rollout["response_ids"][place : place + count]
            assert text["scores"][branch] == pytest.approx(shared_runs(np.array(drawn), np.array(own)))
        assert text["value"] == pytest.approx(np.mean(text["scores"]))
        peak = int(np.argmax(rollout["entropies"]))
        assert peak in text["places"]
    assert report.figures["branches"] == sum(len(text["places"]) for text, _ in rows_of(cache))
    assert verify(cache) == []


def test_a_stopped_run_resumes_with_the_same_bytes_and_draws_differ(world, cache):
    run(world, cache, "sampling.n=4")
    folder = cache / "texts" / "continuations"
    whole = {path.name: path.read_bytes() for path in folder.glob("part-*")}
    (folder / "part-00001.parquet").unlink()
    run(world, cache, "sampling.n=4")
    assert {path.name: path.read_bytes() for path in folder.glob("part-*")} == whole
    chunks = scored_chunks(open_cache(cache, signals=()), "continuations", 0)
    for (text, _), found in zip(rows_of(cache), chunks, strict=False):
        assert len(text["scores"]) == 4 * len(text["places"])
        for place, count, scores, chunk in zip(
            text["places"], text["chunk_counts"], np.reshape(text["scores"], (-1, 4)), found, strict=False
        ):
            np.testing.assert_allclose(chunk, [place, place + count, scores.sum(), 4], atol=1e-6)


def test_tokens_that_are_put_are_the_likeliest_and_the_whole_response_is_graded(world, cache):
    from lightopd.models.tokenizer import load_tokenizer
    from lightopd.prompts.load import load_prompts
    from lightopd.prompts.tokens import response_text

    score_student(world, cache)
    student = {"model": world.sft / "student", "role": "self", "name": "branches"}
    sets = ("branches.places=1", "branches.force=4", "branches.score=reward", "sampling.n=2")
    run(world, cache, *sets, **student)
    tokenizer = load_tokenizer(ModelConfig(path=str(world.teacher)))
    config = load_stage(
        "rewrite", [], [], {"prompts": world.root / "prompts.jsonl", "cache": cache, **student}
    )
    prompts = {one.prompt_id: one for one in load_prompts(config.prompts)}
    model, ended = load_model(ModelConfig(path=str(world.sft / "student")), "cpu"), 0
    for text, rollout in rows_of(cache, "branches"):
        (place,) = set(text["places"])
        ids = torch.tensor([[*rollout["prompt_ids"], *rollout["response_ids"][:place]]])
        with torch.no_grad():
            likeliest = model(input_ids=ids).logits[0, -1].topk(4).indices.tolist()
        assert sorted(text["forced_ids"]) == sorted(likeliest)
        begins = np.concatenate([[0], np.cumsum(text["drawn_counts"])])
        for draw, score in enumerate(text["scores"]):
            put = text["forced_ids"][draw // 2]
            drawn = text["response_ids"][begins[draw] : begins[draw + 1]]
            ended += put == 1
            assert (not drawn) == (put == 1)
            said = response_text([*rollout["response_ids"][:place], put, *drawn], tokenizer)
            assert score == pytest.approx(reward_of(prompts[rollout["prompt_id"]], said))
    assert ended


@pytest.mark.parametrize(
    ("sets", "flags", "error", "told"),
    [
        (["branches.force=2"], {}, CacheError, "no signal rollout_student"),
        (["branches.score=no.such:thing"], {}, ConfigError, "cannot be imported"),
        (["branches.score=likeness"], {}, ConfigError, "branches.score"),
        (["branches.places=3"], {"gives": "text"}, ConfigError, "which cuts nothing"),
        ([r"value=(\d+)"], {}, ConfigError, "no text is written to find a number in"),
        ([], {"template": "{{ prompt * 30 }}"}, InputError, r"makes a prompt of \d+ tokens"),
    ],
)
def test_branches_that_cannot_be_made_are_refused_before_a_model_is_loaded(
    world, cache, sets, flags, error, told
):
    with pytest.raises(error, match=told):
        run(world, cache, *sets, **flags)
    assert not (cache / "texts").exists()


def test_prompts_without_a_verifier_cannot_grade(world, cache, tmp_path):
    plain = tmp_path / "prompts.jsonl"
    lines = (world.root / "prompts.jsonl").read_text().replace('"answer"', '"solution"')
    plain.write_text(lines)
    with pytest.raises(InputError, match="score: reward grades by the prompts' verifier"):
        run(world, cache, "branches.score=reward", prompts=plain)


def test_sql_shows_texts_and_every_continuation_with_its_ids_and_score(world, cache):
    run(world, cache, "sampling.n=2", "branches.places=2")
    run(world, cache, name="plain", gives="text")
    shown = query(cache, "SELECT * FROM texts WHERE name = 'plain' ORDER BY shard, row_in_shard").to_pylist()
    assert [row["text"] for row in shown] == [text["text"] for text, _ in rows_of(cache, "plain")]
    assert [row["written_ids"] for row in shown] == [t["response_ids"] for t, _ in rows_of(cache, "plain")]
    found = query(cache, "SELECT * FROM branches ORDER BY rollout_id, branch, draw").to_pylist()
    wanted = []
    for text, _ in sorted(rows_of(cache), key=lambda pair: pair[0]["rollout_id"]):
        ends = np.cumsum(text["drawn_counts"])
        for entry, (score, end, count) in enumerate(
            zip(text["scores"], ends, text["drawn_counts"], strict=True)
        ):
            wanted.append(
                {
                    "rollout_id": text["rollout_id"],
                    "name": "continuations",
                    "branch": entry // 2,
                    "pos": text["places"][entry // 2],
                    "chunk_tokens": text["chunk_counts"][entry // 2],
                    "forced_id": None,
                    "draw": entry % 2,
                    "score": score,
                    "drawn_ids": text["response_ids"][end - count : end],
                }
            )
    assert found == wanted
    lineage = query(cache, "SELECT value FROM lineage WHERE file LIKE 'texts/plain/%' AND key = 'role'")
    assert lineage.column("value").to_pylist() == ["teacher"]


def test_a_text_that_is_no_branch_is_refused_where_chunks_are_read(world, cache):
    run(world, cache, gives="text")
    with pytest.raises(CacheError, match="no continuations of the rollouts' own tokens"):
        scored_chunks(open_cache(cache, signals=()), "continuations", 0)


def test_a_similarity_of_ones_own_is_asked_for_two_texts(world, cache, monkeypatch):
    monkeypatch.syspath_prepend(str(cache.parent))
    (cache.parent / "own_likeness.py").write_text("def likeness(a, b):\n    return 0.25 if a != b else 1.0\n")
    run(world, cache, "branches.score=own_likeness:likeness")
    assert {score for text, _ in rows_of(cache) for score in text["scores"]} <= {0.25, 1.0}


def test_a_student_trains_on_a_teachers_continuations(world, cache, tmp_path):
    """OmniOPD (arXiv 2606.01476), as its page says it."""
    run(world, cache, "branches.places=2", "sampling.n=2")
    asked = {"cache": cache, "teacher": world.base, "signal": "reference", "role": "reference", "top_k": 4}
    precompute.run(load_stage("precompute", [], [], asked))
    asked = {"cache": cache, "student": world.sft / "student", "out": tmp_path / "run", "steps": 2}
    recipe = str(RECIPES / "methods" / "omniopd.yaml")
    report = train.run(load_stage("train", [recipe], ["batch_sequences=6"], asked))
    assert report.figures["steps"] == 2
