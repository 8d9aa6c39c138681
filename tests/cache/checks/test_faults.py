"""Every fault that a cache can have is found, named by file and kind, and told with exit code 5."""

import json
import random
import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from cache_cases import TEACHER, cache_manifest, make_rollout, make_scores, write_rollouts, write_signal

from lightopd.cache.checks.seals import is_changed, sealed
from lightopd.cache.index import build_index
from lightopd.cache.manifests import read_manifest
from lightopd.cache.shards import write_shard
from lightopd.cache.store import open_cache
from lightopd.cache.tables import rollout_id
from lightopd.cache.verify import verify
from lightopd.schemas.configs import SamplingConfig
from lightopd.schemas.manifest import CacheManifest, SignalManifest

ROLLOUTS = "rollouts/part-00000.parquet"
SCORES = "signals/teacher/part-00000.parquet"


def make(path, seed=0, temperature=1.0, **signal):
    """Two shards of two prompts with two rollouts each, a signal over them, and an index."""
    rng = np.random.default_rng(seed)
    shards = [[row for _ in range(2) for row in _group(rng)] for _ in range(2)]
    sampling = SamplingConfig(n=2, temperature=temperature)
    cache = write_rollouts(path, shards, sampling=sampling, num_prompts=4, shard_rollouts=4)
    scored = [
        [(row.rollout_id, make_scores(rng, row.response_ids, 4)) for row in rollouts] for rollouts in shards
    ]
    cache = write_signal(cache, "teacher", scored, topk_dtype="float32", **signal)
    for part in (cache.manifest, cache.signals["teacher"].manifest):  # as the stages write them
        for index in range(2):
            write(path, f"{part.kind}/part-{index:05d}.parquet", lambda table: table)
    build_index(open_cache(path))
    return path


def _group(rng):
    first = make_rollout(rng, 5)
    name = rollout_id(first.prompt_ids, first.response_ids, "student", 1)
    yield first
    yield make_rollout(
        rng,
        5,
        prompt_id=first.prompt_id,
        prompt_ids=first.prompt_ids,
        response_ids=first.response_ids,
        sample_index=1,
        rollout_id=name,
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return make(tmp_path_factory.mktemp("whole") / "cache")


@pytest.fixture
def cache(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "cache")


def write(cache, file, change):
    """Write a shard again with another table, as a program that knows the format would."""
    path, kind = cache / file, str(Path(file).parent)
    manifest = (
        read_manifest(cache / "lightopd.json", CacheManifest)
        if kind == "rollouts"
        else read_manifest(cache / kind / "signal.json", SignalManifest)
    )
    table = change(pq.read_table(path))
    write_shard(
        path.parent,
        int(path.stem[5:]),
        table,
        kind=kind,
        fingerprint=manifest.fingerprint(),
        made_from=manifest,
    )


def rows(*indices):
    return lambda table: table.take(list(indices))


def with_column(name, change):
    def changed(table):
        place = table.schema.get_field_index(name)
        values = change(table.column(name).to_pylist())
        return table.set_column(
            place, table.schema.field(name), pa.array(values, table.schema.field(name).type)
        )

    return changed


def with_value(name, place, value):
    """The value at a place of the flat list of row 0."""

    def change(lists):
        lists[0][place] = value(lists[0]) if callable(value) else value
        return lists

    return with_column(name, change)


def double(name):
    def changed(table):
        field = pa.field(name, pa.list_(pa.float64()), nullable=table.schema.field(name).nullable)
        return table.set_column(
            table.schema.get_field_index(name), field, table.column(name).cast(pa.list_(pa.float64()))
        )

    return changed


def rewritten(file, change):
    return lambda cache: write(cache, file, change)


def moved(before, after, copy=False):
    """A shard and its marker under another number."""

    def change(cache):
        for end in (".parquet", ".json"):
            source, target = (cache / before).with_suffix(end), (cache / after).with_suffix(end)
            (shutil.copy if copy else shutil.move)(source, target)

    return change


def swapped(folder):
    def change(cache):
        for end in (".parquet", ".json"):
            one, other = (cache / folder / f"part-0000{index}{end}" for index in range(2))
            kept = one.read_bytes()
            one.write_bytes(other.read_bytes())
            other.write_bytes(kept)

    return change


def cut(cache):
    content = (cache / ROLLOUTS).read_bytes()
    (cache / ROLLOUTS).write_bytes(content[: len(content) // 2])


def gone(cache):
    (cache / SCORES).unlink()
    (cache / SCORES).with_suffix(".json").unlink()


def mixed_in(file, **settings):
    """The same shard of a cache that was made otherwise."""

    def change(cache):
        other = make(cache.parent / "other", **settings)
        for end in (".parquet", ".json"):
            shutil.copy((other / file).with_suffix(end), (cache / file).with_suffix(end))

    return change


def scored_again(**settings):
    """The whole signal of a cache that was made otherwise, with nothing that says that it may be."""

    def change(cache):
        other = make(cache.parent / "other", **settings)
        shutil.rmtree(cache / "signals" / "teacher")
        shutil.copytree(other / "signals" / "teacher", cache / "signals" / "teacher")

    return change


def edited(file, **changes):
    def change(cache):
        plain = json.loads((cache / file).read_text())
        (cache / file).write_text(json.dumps({**plain, **changes}, indent=2, sort_keys=True) + "\n")

    return change


def signal_after_the_index(cache):
    signal = read_manifest(cache / "signals/teacher/signal.json", SignalManifest)
    signal = signal.model_copy(update={"name": "other"})
    folder = cache / "signals" / "other"
    folder.mkdir()
    (folder / "signal.json").write_bytes(sealed(signal.model_dump(mode="json")))
    for index in range(2):
        table = pq.read_table(cache / f"signals/teacher/part-0000{index}.parquet")
        write_shard(folder, index, table, kind="signals/other", fingerprint=signal.fingerprint())


TOKENIZER = cache_manifest().tokenizer
OTHER_TEACHER = TEACHER.model_copy(update={"identity": "x", "weights": "x"})
OTHER_TEMPLATE = TOKENIZER.model_copy(update={"template": "f" * 64})
FLOAT16 = {"dtype": "float16", "quantization": None}

FAULTS = {
    "a truncated shard": (cut, ROLLOUTS, "bytes, its marker says"),
    "a missing shard": (gone, SCORES, "the shard is missing; run the stage"),
    "an extra shard": (
        moved(ROLLOUTS, "rollouts/part-00007.parquet", copy=True),
        "rollouts/part-00007.parquet",
        "not one of the cache's 2 shards",
    ),
    "a file that is no shard": (
        lambda cache: shutil.copy(cache / ROLLOUTS, cache / "rollouts/copy.parquet"),
        "rollouts/copy.parquet",
        "not one of the cache's 2 shards",
    ),
    "a duplicated shard": (
        moved(ROLLOUTS, "rollouts/part-00001.parquet", copy=True),
        "rollouts/part-00001.parquet",
        "a copy of shard 0, or that shard renamed",
    ),
    "a renamed shard": (
        moved(SCORES, "signals/teacher/part-00001.parquet"),
        "signals/teacher/part-00001.parquet",
        "a copy of shard 0, or that shard renamed",
    ),
    "two shards swapped": (swapped("rollouts"), ROLLOUTS, "a copy of shard 1, or that shard renamed"),
    "two caches mixed": (
        mixed_in(ROLLOUTS, seed=5, temperature=0.7),
        ROLLOUTS,
        r"other settings \(sampling.temperature: is 0.7, would be 1.0\)",
    ),
    "two caches of one setting mixed": (mixed_in(ROLLOUTS, seed=5), SCORES, "not that of the rollouts' row"),
    "a row missing": (rewritten(ROLLOUTS, rows(0, 1, 2)), ROLLOUTS, "it has 3 rows, its prompts make 4"),
    "a row of a signal missing": (
        rewritten(SCORES, rows(0, 1, 2)),
        SCORES,
        "has 3 rows, its rollouts have 4",
    ),
    "a row repeated": (rewritten(ROLLOUTS, rows(0, 1, 2, 2)), ROLLOUTS, "occurs in an earlier row"),
    "rows out of order": (
        rewritten(ROLLOUTS, rows(1, 0, 2, 3)),
        ROLLOUTS,
        "missing, repeated or out of order",
    ),
    "rows of a signal out of order": (
        rewritten(SCORES, rows(1, 0, 2, 3)),
        SCORES,
        "not that of the rollouts' row",
    ),
    "a wrong dtype": (
        rewritten(SCORES, double("logprobs")),
        SCORES,
        "logprobs is list<element: double>, not",
    ),
    "a log-probability above 0": (
        rewritten(ROLLOUTS, with_value("logprobs", 2, 0.5)),
        ROLLOUTS,
        "logprobs has 0.5 at place 2, which is not a log-probability",
    ),
    "probabilities above 1 in sum": (
        rewritten(SCORES, with_value("tail_logprobs", 0, -0.01)),
        SCORES,
        "which is the sum of top-k and tail probabilities, which must be 1",
    ),
    "unsorted ids": (
        rewritten(SCORES, with_value("topk_logprobs", 1, -1e-6)),
        SCORES,
        "its top-k is not sorted",
    ),
    "repeated ids": (
        rewritten(SCORES, with_value("topk_ids", 1, lambda ids: ids[0])),
        SCORES,
        "a token id occurs twice",
    ),
    "an id outside the vocabulary": (
        rewritten(SCORES, with_value("topk_ids", 1, 48)),
        SCORES,
        "outside the vocabulary of 48",
    ),
    "a response id outside the vocabulary": (
        rewritten(ROLLOUTS, with_value("response_ids", 1, 48)),
        ROLLOUTS,
        "outside the vocabulary of 48",
    ),
    "NaN in a rollout": (
        rewritten(ROLLOUTS, with_value("logprobs", 0, np.nan)),
        ROLLOUTS,
        "logprobs has nan",
    ),
    "NaN in a signal": (
        rewritten(SCORES, with_value("topk_logprobs", 0, np.nan)),
        SCORES,
        "topk_logprobs has nan",
    ),
    "a shard of another template": (
        mixed_in(SCORES, tokenizer=OTHER_TEMPLATE),
        SCORES,
        r"other settings \(tokenizer.template: is 'ffff.*, would be None",
    ),
    "a shard of another dtype": (
        mixed_in(SCORES, precision=FLOAT16),
        SCORES,
        r"other settings \(.*precision.dtype: is 'float16'",
    ),
    "a shard of another teacher": (
        mixed_in(SCORES, model=OTHER_TEACHER),
        SCORES,
        r"other settings \(model.identity: is 'x', would be 'teacher'",
    ),
    "a signal of another template": (
        scored_again(tokenizer=OTHER_TEMPLATE),
        "signals/teacher/signal.json",
        "the chat template is absent in the cache and ffffffffffff in this model, and no override says so",
    ),
    "a signal of another teacher": (
        scored_again(model=OTHER_TEACHER),
        "signals/teacher/signal.json",
        r"the SFT teacher is .*teacher.*, and no override says so; score the rollouts again",
    ),
    "a signal of rollouts at another temperature": (
        scored_again(temperature=0.7),
        "signals/teacher/signal.json",
        "it scored rollouts [0-9a-f]{12}, the cache is",
    ),
    "a stale index": (
        signal_after_the_index,
        "index.duckdb",
        "it is stale: shards, signals in it and in the cache differ",
    ),
    "a broken index": (
        lambda cache: (cache / "index.duckdb").write_bytes(b"x" * 4096),
        "index.duckdb",
        "cannot be read .*lightopd index",
    ),
    "a setting in a manifest edited": (
        edited("lightopd.json", vocabulary_size=50),
        "lightopd.json",
        "the manifest was changed; copy it again, or move it away and run `lightopd verify .* --restore`",
    ),
    "a setting in a signal's manifest edited": (
        edited("signals/teacher/signal.json", top_k=5),
        "signals/teacher/signal.json",
        "the manifest was changed; copy it again, or move it away and run `lightopd verify .* --restore`",
    ),
    "a remark in a manifest edited": (
        edited("signals/teacher/signal.json", noise={"mean_nats": 0.0, "max_nats": 0.0, "tokens": 9}),
        "signals/teacher/signal.json",
        "changed after it was written: its checksum does not hold",
    ),
    "a marker edited": (
        edited("rollouts/part-00000.json", dropped={"too long": 0}),
        ROLLOUTS,
        "its marker was changed after it was written",
    ),
}


def test_the_cache_of_these_cases_is_whole(cache):
    assert verify(cache) == []


@pytest.mark.parametrize("fault", FAULTS)
def test_it_is_found_and_named(fault, cache):
    damage, file, told = FAULTS[fault]
    damage(cache)
    found = [str(finding) for finding in verify(cache)]
    assert any(line.startswith(file) and re.search(told, line) for line in found), found


@pytest.mark.parametrize(
    "file", [ROLLOUTS, SCORES, "rollouts/part-00001.json", "lightopd.json", "signals/teacher/signal.json"]
)
def test_any_flipped_byte_is_found(file, cache):
    path = cache / file
    content, draw = path.read_bytes(), random.Random(file)
    for place in range(draw.randrange(7), len(content), max(7, len(content) // 40)):
        flipped = content[place] ^ draw.randrange(1, 256)
        path.write_bytes(content[:place] + bytes([flipped]) + content[place + 1 :])
        found = verify(cache)
        assert any(Path(finding.file).stem == path.stem for finding in found), (place, flipped)


@pytest.mark.parametrize("file", ["rollouts/part-00000.json", "lightopd.json"])
def test_a_checksum_holds_against_every_single_flip(file, cache):
    content, path = (cache / file).read_bytes(), cache / "flipped.json"
    path.write_bytes(content)
    assert not is_changed(path)
    for place, byte in enumerate(content):
        path.write_bytes(content[:place] + bytes([byte ^ 1 << place % 8]) + content[place + 1 :])
        try:
            plain = json.loads(path.read_bytes())
        except ValueError:
            continue
        assert is_changed(path) or "checksum" not in plain, place
