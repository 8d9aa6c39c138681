"""A cache whose sums are right and whose rows are not is refused at every door, with file and row."""

import hashlib
import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lightopd.cache.checks.seals import sealed, unsealed
from lightopd.cache.store import open_cache
from lightopd.pipelines.caches.rescore import _drawn, rescore

ROLLOUTS, TEACHER = "rollouts/part-00000.parquet", "signals/teacher/part-00000.parquet"


def change_list(name, row, place, value):
    def change(table):
        rows = table.column(name).to_pylist()
        rows[row][place] = value
        column = pa.array(rows, table.schema.field(name).type)
        return table.set_column(table.column_names.index(name), table.schema.field(name), column)

    return change


def change_cell(name, row, value):
    def change(table):
        rows = table.column(name).to_pylist()
        rows[row] = value
        column = pa.array(rows, table.schema.field(name).type)
        return table.set_column(table.column_names.index(name), table.schema.field(name), column)

    return change


def repeat(table):
    return table.take([0, 0, *range(2, table.num_rows)])


def seal(path, change):
    """Change a shard's rows, and its marker with them."""
    pq.write_table(change(pq.read_table(path)), path)
    table, marker = pq.read_table(path), path.with_suffix(".json")
    column = "response_ids" if "response_ids" in table.column_names else "logprobs"
    told = {
        "rows": table.num_rows,
        "tokens": len(table.column(column).combine_chunks().flatten()),
        "size_bytes": path.stat().st_size,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
    }
    marker.write_bytes(sealed(unsealed(json.loads(marker.read_text())) | told))


def commands(world, root):
    cache, student = root / "cache", world.sft / "student"
    scored = ["precompute", "--cache", cache, "--teacher", world.teacher]
    return {
        "verify": ["verify", cache],
        "train": ["train", "--cache", cache, "--student", student, "--out", root / "run", "--steps", 1],
        "precompute": [*scored, "--signal", "again", "--set", "top_k=4"],
        "join": ["join", root / "joined", cache, world.sft / "answers"],
        "export": ["export", cache, root / "exported"],
    }


DAMAGES = {
    "a row twice": (ROLLOUTS, repeat, "row 1: its rollout_id occurs in an earlier row"),
    "an id beyond the vocabulary": (
        ROLLOUTS,
        change_list("response_ids", 1, 0, 99_999),
        "row 1: response_ids has 99999 at place 0, which is outside the vocabulary",
    ),
    "an unknown finish reason": (
        ROLLOUTS,
        change_cell("finish_reason", 2, "tired"),
        "row 2: its finish_reason is none of stop, length",
    ),
    "an infinite reward": (
        ROLLOUTS,
        change_cell("reward", 0, np.inf),
        "row 0: its reward is not a finite number",
    ),
    "a positive log-probability": (
        TEACHER,
        change_list("logprobs", 1, 0, 0.5),
        "row 1: logprobs has 0.5 at place 0, which is not a log-probability",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_every_door_refuses_what_verify_finds(world, lightopd, tmp_path, damage):
    file, change, what = DAMAGES[damage]
    shutil.copytree(world.cache, tmp_path / "cache")
    seal(tmp_path / "cache" / file, change)
    reads_signals = ("verify", "train", "export")
    for door, command in commands(world, tmp_path).items():
        if file == TEACHER and door not in reads_signals:
            continue
        code, out, err = lightopd(*command)
        said = [line for line in (out + err).splitlines() if what in line]
        assert code != 0, door
        assert len(said) == 1, (door, out, err)
        assert file in said[0], door
        assert "Traceback" not in err, door


def test_two_equal_shards_are_not_trained_on_twice(world, lightopd, tmp_path):
    shutil.copytree(world.cache, tmp_path / "cache")
    for folder in ("rollouts", "signals/teacher"):
        for suffix in ("parquet", "json"):
            part = tmp_path / "cache" / folder / "part-00000"
            shutil.copy(part.with_suffix(f".{suffix}"), part.with_name(f"part-00001.{suffix}"))
    code, _, err = lightopd(*commands(world, tmp_path)["train"])
    assert code == 5
    assert "part-00001.parquet row 0: its rollout_id occurs in an earlier row" in err


def test_a_shard_with_too_few_rows_is_refused_by_the_number_of_prompts(world, lightopd, tmp_path):
    shutil.copytree(world.cache, tmp_path / "cache")
    seal(tmp_path / "cache" / ROLLOUTS, lambda table: table.slice(1))
    seal(tmp_path / "cache" / TEACHER, lambda table: table.slice(1))
    says = {
        "verify": "rollouts/part-00000.parquet: it has 5 rows, its prompts make 6",
        "train": "23 rollouts are there, 12 prompts with 2 each make 24",
    }
    for door, what in says.items():
        code, out, err = lightopd(*commands(world, tmp_path)[door])
        assert code != 0
        assert what in out + err


@pytest.mark.parametrize("column", ["topk_logprobs", "topk_ids", "tail_logprobs"])
def test_rescoring_compares_the_top_k_and_the_tail_too(world, tmp_path, column):
    """The sampled tokens are right, and the rest is not the teacher's."""
    shutil.copytree(world.cache, tmp_path / "cache")
    for shard in range(4):
        path = tmp_path / "cache/signals/teacher" / f"part-{shard:05d}.parquet"
        table = pq.read_table(path)
        wrong = [
            [(value + 1) % 24 if column == "topk_ids" else value - 0.5 for value in row]
            for row in table.column(column).to_pylist()
        ]
        seal(
            path,
            lambda table, wrong=wrong: table.set_column(
                table.column_names.index(column),
                table.schema.field(column),
                pa.array(wrong, table.schema.field(column).type),
            ),
        )
    report, agrees = rescore(tmp_path / "cache", "teacher", 3, seed=1)
    assert not agrees
    assert report.figures["max_difference_nats"] < 1e-4


def test_rows_that_are_scored_again_are_drawn_by_the_seed(world, lightopd):
    cache = open_cache(world.cache)
    drawn = [_drawn(cache, 6, seed) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert sum(map(len, drawn[0].values())) == 6
    assert any(rows != list(range(len(rows))) for rows in drawn[0].values())
    assert lightopd("verify", world.cache, "--rescore", "-1")[0] == 2
