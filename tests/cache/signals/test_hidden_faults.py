"""Hidden states that are damaged, or not those of the log-probabilities beside them, are found and named."""

import hashlib
import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file, save

from lightopd.cache.checks.seals import sealed, unsealed
from lightopd.cache.shards import shard_bytes
from lightopd.cache.signals.channels import CHANNELS
from lightopd.cache.signals.rebuilt import rebuilder_of
from lightopd.cache.store import open_cache
from lightopd.cache.verify import verify
from lightopd.config import load_stage
from lightopd.errors import EngineError
from lightopd.pipelines import precompute, rollout

FOLDER = "signals/teacher"
PART = f"{FOLDER}/part-00000"
HEAD = {"softcap": None, "temperature": 1.0}


@pytest.fixture(scope="module", params=["int8", "bfloat16"])
def kept(request, world, tmp_path_factory):
    """A cache whose signal keeps hidden states; read only."""
    path = tmp_path_factory.mktemp(request.param) / "cache"
    asked = {"student": world.sft / "student", "prompts": world.root / "prompts.jsonl", "cache": path}
    rollout.run(
        load_stage("rollout", [], ["sampling.max_tokens=14", "sampling.n=3", "shard_rollouts=12"], asked)
    )
    asked = {"cache": path, "teacher": world.teacher, "keep": "hidden"}
    precompute.run(load_stage("precompute", [], [f"hidden_format={request.param}"], asked))
    return path


@pytest.fixture
def cache(kept, tmp_path):
    shutil.copytree(kept, tmp_path / "cache")
    return tmp_path / "cache"


def described(cache):
    return open_cache(cache).signals["teacher"].manifest.hidden


def rewrite(cache, column, change):
    """Change a column of the first shard, and let its marker speak of the new bytes."""
    manifest = open_cache(cache).signals["teacher"].manifest
    table = pq.read_table(cache / f"{PART}.parquet")
    place = table.column_names.index(column)
    table = table.set_column(place, table.schema.field(column), change(table.column(column)))
    content = shard_bytes(table, kind=FOLDER, fingerprint=manifest.fingerprint())
    (cache / f"{PART}.parquet").write_bytes(content)
    marker = unsealed(json.loads((cache / f"{PART}.json").read_bytes()))
    marker |= {"sha256": hashlib.sha256(content).hexdigest(), "size_bytes": len(content)}
    (cache / f"{PART}.json").write_bytes(sealed(marker))


def with_bytes(row, change):
    def changed(column):
        values = column.to_pylist()
        content = np.frombuffer(values[row], np.uint8).copy()
        values[row] = change(content).tobytes()
        return pa.array(values, pa.large_binary())

    return changed


def with_scale(row, change):
    def changed(column):
        values = column.to_pylist()
        values[row][1] = change(values[row][1])
        return pa.array(values, column.type)

    return changed


def only(cache):
    (finding,) = verify(cache)
    return str(finding)


def test_a_sound_cache_has_no_findings(cache):
    assert verify(cache) == []


def test_a_flipped_byte_is_named_by_its_file(cache):
    content = bytearray((cache / f"{PART}.parquet").read_bytes())
    content[len(content) // 2] ^= 64
    (cache / f"{PART}.parquet").write_bytes(content)
    assert only(cache).startswith(f"{PART}.parquet: its SHA-256 is not the one in its marker")


def test_another_hidden_state_under_a_marker_of_its_own_is_named_by_its_row(cache):
    width = described(cache).size * (1 if described(cache).format == "int8" else 2)
    rewrite(cache, "hidden", with_bytes(2, lambda content: np.roll(content, width)))
    message = only(cache)
    assert message.startswith(f"{PART}.parquet row 2: at position 0 the hidden state gives the sampled token")
    assert "nats apart, rounding allows" in message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda scale: scale * 16,
            "row 2: at position 1 the hidden state gives the sampled token another",
        ),
        (lambda _: float("nan"), "row 2: hidden_scales is no finite number above 0 at position 1"),
        (lambda _: 0.0, "row 2: hidden_scales is no finite number above 0 at position 1"),
    ],
)
def test_a_changed_scale_is_named_by_its_row(cache, change, message):
    if described(cache).format == "bfloat16":
        pytest.skip("it has no scales")
    rewrite(cache, "hidden_scales", with_scale(2, change))
    assert only(cache).startswith(f"{PART}.parquet {message}")


def test_a_value_that_is_no_number_is_named_by_its_row(cache):
    if described(cache).format == "int8":
        pytest.skip("every byte is a number")

    def with_nan(content):
        content.view("<u2")[described(cache).size + 3] = 0x7FC0
        return content

    rewrite(cache, "hidden", with_bytes(2, with_nan))
    assert only(cache).startswith(f"{PART}.parquet row 2: hidden is NaN or infinite at position 1")


def test_hidden_states_of_another_size_are_named_by_their_row(cache):
    rewrite(cache, "hidden", with_bytes(2, lambda content: content[:-1]))
    message = only(cache)
    assert message.startswith(f"{PART}.parquet row 2: hidden has ")
    assert "tokens of 32 values" in message


def test_a_head_that_is_gone_or_another_one_is_named_by_its_file(cache):
    (file,) = (cache / "heads").iterdir()
    tensors = load_file(file)
    file.write_bytes(save({**tensors, "weight": tensors["weight"][::-1].copy()}, {"head": "{}"}))
    assert only(cache).startswith(f"heads/{file.name}: is not the head that signal.json names; copy it again")
    file.unlink()
    assert only(cache).startswith(f"heads/{file.name}: is missing, the head of hidden states in this cache")


def test_a_head_that_was_exchanged_with_its_name_is_found_by_what_it_rebuilds(cache):
    """Its hash is changed wherever it stands, so that only the numbers tell."""
    found = open_cache(cache).signals["teacher"].manifest
    (file,) = (cache / "heads").iterdir()
    other = save({"weight": load_file(file)["weight"][::-1].copy()}, {"head": json.dumps(HEAD)})
    sha256 = hashlib.sha256(other).hexdigest()
    (cache / "heads" / f"{sha256}.safetensors").write_bytes(other)
    hidden = found.hidden.model_copy(update={"head": sha256})
    rebuilder = rebuilder_of(
        cache, found.model_copy(update={"hidden": hidden}), open_cache(cache).manifest.vocabulary_size
    )
    rollouts = pq.read_table(cache / "rollouts" / "part-00000.parquet")
    (fault,) = rebuilder.faults(pq.read_table(cache / f"{PART}.parquet"), rollouts)
    assert fault.check == "rebuilt"
    assert fault.count > 20


def test_statistics_that_are_gone_or_changed_are_named_by_their_file(cache):
    if described(cache).format == "bfloat16":
        pytest.skip("it has none")
    file = cache / FOLDER / CHANNELS
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert only(cache).startswith(f"{FOLDER}/{CHANNELS}: is not the file that signal.json names; copy")
    file.unlink()
    assert only(cache).startswith(f"{FOLDER}/{CHANNELS}: cannot be read (No such file or directory); copy")


def test_scores_whose_hidden_states_are_not_theirs_are_never_written(cache):
    found = open_cache(cache).signals["teacher"].manifest
    rebuilder = rebuilder_of(cache, found, open_cache(cache).manifest.vocabulary_size)
    table = pq.read_table(cache / f"{PART}.parquet")
    rollouts = pq.read_table(cache / "rollouts" / "part-00000.parquet")
    rebuilder.refuse(table, rollouts, 0)
    with pytest.raises(EngineError, match="the output layer is not read as it is run: keep a top-k"):
        rebuilder.refuse(shifted(table), rollouts, 0)


def shifted(table):
    """Every log-probability half a nat lower."""
    column = table.column("logprobs")
    values = pa.array([[value - 0.5 for value in row] for row in column.to_pylist()], column.type)
    return table.set_column(table.column_names.index("logprobs"), table.schema.field("logprobs"), values)
