"""The cosine of the distilled gradient with the one that most increases success (arXiv 2605.10889)."""

import json
import shutil

import numpy as np
import pyarrow as pa
import pytest
import torch
from text_columns import written

from lightopd.cache.contexts import create_text, text_folder
from lightopd.cache.reader import read_columns
from lightopd.cache.shards import write_shard
from lightopd.cache.store import open_cache
from lightopd.cache.tables import split_lists
from lightopd.config import load_stage
from lightopd.errors import CacheError
from lightopd.pipelines import precompute, rewrite
from lightopd.pipelines.caches.alignment import cosine, gradient, measure_alignment
from lightopd.schemas.configs import SamplingConfig
from lightopd.schemas.rewriting import BRANCHES, BranchConfig

UNIFORM = np.log(np.full(3, 1 / 3))


def test_the_cosine_of_a_uniform_student_is_the_correlation():
    assert cosine(UNIFORM, np.array([1.0, 0.0, 0.0]), np.array([0.0, 1.0, 0.0])) == pytest.approx(-0.5)
    random = np.random.default_rng(0)
    success, credit = random.random(3), random.normal(size=3)
    wanted = np.corrcoef(success, credit)[0, 1]
    assert cosine(UNIFORM, success, credit) == pytest.approx(wanted)


def test_credit_that_rises_with_success_has_cosine_one_and_its_scale_does_not_matter():
    student, success = np.log([0.5, 0.3, 0.15, 0.05]), np.array([0.25, 1.0, 0.5, 0.0])
    assert cosine(student, success, success) == pytest.approx(1.0)
    assert cosine(student, success, 7.0 * success - 3.0) == pytest.approx(1.0)
    assert cosine(student, success, -success) == pytest.approx(-1.0)
    assert cosine(student - 2.0, success, 0.1 * success) == pytest.approx(1.0)


def test_flat_success_or_credit_has_no_cosine():
    assert np.isnan(cosine(UNIFORM, np.ones(3), np.array([0.0, 1.0, 2.0])))
    assert np.isnan(cosine(UNIFORM, np.array([0.0, 1.0, 1.0]), np.full(3, -4.0)))


@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl"])
def test_the_gradients_are_those_of_success_and_of_minus_the_divergence(divergence):
    random = torch.Generator().manual_seed(3)
    logits, success, other = (torch.randn(5, generator=random, dtype=torch.float64) for _ in range(3))
    logits.requires_grad_()
    s, t = logits.log_softmax(0), other.log_softmax(0)
    (rise,) = torch.autograd.grad((s.exp() * success).sum(), logits, retain_graph=True)
    np.testing.assert_allclose(gradient(s.detach().numpy(), success.numpy()), rise, atol=1e-12)
    kl = (s.exp() * (s - t)).sum() if divergence == "reverse_kl" else (t.exp() * (t - s)).sum()
    (up,) = torch.autograd.grad(kl, logits)
    ratio = (t - s).detach()
    credit = ratio if divergence == "reverse_kl" else ratio.exp()
    np.testing.assert_allclose(gradient(s.detach().numpy(), credit.numpy()), -up, atol=1e-12)


@pytest.fixture
def cache(world, tmp_path):
    """The world's rollouts with the whole vocabulary of student and teacher as their top-k."""
    folder = shutil.copytree(world.cache, tmp_path / "cache")
    shutil.rmtree(folder / "signals")
    size = open_cache(folder, signals=()).manifest.vocabulary_size
    models = {"rollout_student": (world.sft / "student", "self"), "teacher": (world.teacher, "teacher")}
    for signal, (model, role) in models.items():
        asked = {"cache": folder, "teacher": model, "signal": signal, "role": role, "top_k": size}
        precompute.run(load_stage("precompute", [], ["topk_dtype=float32"], asked))
    return folder


def write_branches(path, score, name="branches"):
    """Two cuts of each rollout with the student's three likeliest tokens, each graded by `score(gap_J)`."""
    cache = open_cache(path)
    wanted = BranchConfig(places=2, force=3, score="reward")
    manifest = written(name, cache, branches=wanted, sampling=SamplingConfig())
    create_text(cache, manifest)
    for shard in cache.shards:
        rollouts = read_columns(cache, shard, ["rollout_id", "prompt_ids", "response_ids"]).to_pylist()
        known = {signal: tables(cache, shard, signal) for signal in ("rollout_student", "teacher")}
        rows = []
        for row, rollout in enumerate(rollouts):
            places = [0, 1] if len(rollout["response_ids"]) > 1 else [0]
            ids, scores = [], []
            for place in places:
                own, taught = (known[signal][row][place] for signal in ("rollout_student", "teacher"))
                put = list(own)[:3]
                ids += put
                scores += list(score(np.array([taught[token] - own[token] for token in put])))
            rows.append(
                {
                    "rollout_id": rollout["rollout_id"],
                    "prompt_ids": rollout["prompt_ids"],
                    "response_ids": [],
                    "places": [place for place in places for _ in range(3)],
                    "chunk_counts": [1] * len(ids),
                    "forced_ids": ids,
                    "drawn_counts": [0] * len(ids),
                    "scores": scores,
                }
            )
        table = pa.Table.from_pylist(rows, schema=BRANCHES)
        folder = text_folder(path, name)
        write_shard(folder, shard, table, kind=manifest.kind, fingerprint=manifest.fingerprint())


def tables(cache, shard, signal):
    """Of each rollout and position, log-probability by id, likeliest first."""
    columns = ["topk_counts", "topk_ids", "topk_logprobs"]
    found = []
    for counts, ids, values in zip(
        *map(split_lists, read_columns(cache, shard, columns, signal).columns), strict=True
    ):
        ends = np.cumsum(counts)
        spans = [slice(end - count, end) for end, count in zip(ends, counts, strict=True)]
        found.append([dict(zip(ids[one].tolist(), values[one].tolist(), strict=True)) for one in spans])
    return found


def row_of(rows, **wanted):
    (found,) = [row for row in rows if wanted.items() <= row.items()]
    return found


def test_a_world_whose_success_follows_the_teacher_has_cosine_one_and_its_opposite_minus_one(cache):
    write_branches(cache, lambda gap_J: (gap_J - gap_J.min()) / np.ptp(gap_J))
    write_branches(cache, lambda gap_J: (gap_J.max() - gap_J) / np.ptp(gap_J), "opposite")
    write_branches(cache, lambda gap_J: np.ones(3), "flat")
    opened = open_cache(cache)
    found = measure_alignment(opened, "branches")
    assert (found.flat, found.left_out) == (0, {"teacher": 0})
    parts = [row_of(found.rows, divergence="reverse_kl", rollouts=one) for one in ("all", "right", "wrong")]
    assert parts[0]["cosine"] == pytest.approx(1.0, abs=1e-5)
    assert parts[0]["cuts"] == found.cuts == parts[1]["cuts"] + parts[2]["cuts"]
    assert row_of(found.rows, divergence="forward_kl", rollouts="all")["cosine"] > 0.5
    opposite = measure_alignment(opened, "opposite")
    assert row_of(opposite.rows, divergence="reverse_kl", rollouts="all")["cosine"] == pytest.approx(-1.0)
    flat = measure_alignment(opened, "flat")
    assert flat.flat == flat.cuts
    assert all(row["cosine"] is None for row in flat.rows)


def test_the_command_prints_a_table_and_a_document(lightopd, cache):
    write_branches(cache, lambda gap_J: (gap_J - gap_J.min()) / np.ptp(gap_J))
    code, out, _ = lightopd("methods", "diagnose", cache)
    assert code == 0
    assert out.splitlines()[0].split() == ["signal", "divergence", "rollouts", "cuts", "cosine", "error"]
    assert any(line.split()[:3] == ["teacher", "reverse_kl", "wrong"] for line in out.splitlines())
    code, out, _ = lightopd("methods", "diagnose", cache, "--json")
    assert code == 0
    assert {row["signal"] for row in json.loads(out)["rows"]} == {"teacher"}


def test_it_reads_what_the_stage_drew(world, cache):
    """Q by the verifier, as the page says it; tiny models are never right, so that no cut has a cosine."""
    asked = {"cache": cache, "model": world.sft / "student", "role": "self", "template": "continue"}
    asked |= {"gives": "branches", "name": "branches", "prompts": world.root / "prompts.jsonl"}
    sets = ["branches.force=3", "branches.score=reward", "sampling.n=2", "sampling.max_tokens=4"]
    report = rewrite.run(load_stage("rewrite", [], sets, asked))
    found = measure_alignment(open_cache(cache), "branches")
    assert 3 * found.cuts == report.figures["branches"]


def test_the_commands_of_the_page_diagnose_a_cache(lightopd, world, tmp_path):
    cache, student = shutil.copytree(world.cache, tmp_path / "page"), world.sft / "student"
    shutil.rmtree(cache / "signals")
    own = ["--cache", cache, "--top-k", 4]
    signal = ["--teacher", student, "--signal", "rollout_student", "--set", "role=self"]
    assert lightopd("precompute", *own, *signal)[0] == 0
    assert lightopd("precompute", *own, "--teacher", world.teacher, "--set", "support=both")[0] == 0
    sets = ["branches.places=2", "branches.force=4", "branches.score=reward", "sampling.n=2", "role=self"]
    asked = ["--model", student, "--prompts", world.root / "prompts.jsonl", "--cache", cache]
    asked += ["--gives", "branches", "--template", "continue", "--name", "branches", "--max-tokens", 4]
    code, out, err = lightopd("rewrite", *asked, *(word for one in sets for word in ("--set", one)))
    assert (code, "branches" in out) == (0, True), err
    code, out, _ = lightopd("methods", "diagnose", cache)
    assert code == 0
    assert "outside the top-k" not in out


def test_branches_without_grades_or_signals_are_refused_with_what_to_run(lightopd, world, cache):
    code, _, err = lightopd("methods", "diagnose", cache)
    assert code != 0
    assert "has no text 'branches'" in err
    asked = {"cache": cache, "model": world.teacher, "prompts": world.root / "prompts.jsonl"}
    asked |= {"template": "continue", "gives": "branches", "name": "branches"}
    rewrite.run(load_stage("rewrite", [], ["sampling.max_tokens=2"], asked))
    with pytest.raises(CacheError, match="has no graded tokens; make it with `lightopd rewrite"):
        measure_alignment(open_cache(cache), "branches")
    write_branches(cache, lambda gap_J: np.ones(3), "graded")
    with pytest.raises(
        CacheError, match=r"needs signal rollout_student and a teacher's, .*there: rollout_student\)"
    ):
        measure_alignment(open_cache(cache, signals=["rollout_student"]), "graded")
