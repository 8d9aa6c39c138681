"""Hidden states in a cache: what is stored gives the model's probabilities, and resumes to equal bytes."""

import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from cache_cases import table_to_rollouts
from fake_engine import FakeEngine
from scored_caches import roll, score_with

import lightopd as package
from lightopd.cache.formats.dataset import export_dataset
from lightopd.cache.index import query
from lightopd.cache.shards import write_shard
from lightopd.cache.signals.channels import channels_from_sums, hidden_columns, read_channels
from lightopd.cache.signals.hidden import (
    dequantise,
    head_of_signal,
    head_path,
    hidden_states,
    quantise,
    write_head,
)
from lightopd.cache.store import open_cache
from lightopd.cache.verify import verify
from lightopd.config import load_stage
from lightopd.errors import CacheError, ConfigError, OutputError
from lightopd.models.head import Head, last_hidden
from lightopd.models.load import load_model
from lightopd.objectives.base.batch import BatchTotals
from lightopd.pipelines.caches.rescore import rescore
from lightopd.schemas.configs import ModelConfig
from lightopd.training.data.batches import collate, collect_rows, response_index, show
from lightopd.training.data.shard_store import FirstReading, index_cache

FOLDER = "signals/teacher"


@pytest.fixture(scope="module")
def rolled(world, tmp_path_factory):
    """A cache with enough tokens for the statistics, and no signal yet."""
    return roll(world, tmp_path_factory.mktemp("rolled") / "cache")


def score(world, cache, *sets, load=None, **flags):
    return score_with(world, cache, *sets, load=load, **{"keep": "hidden", **flags})


@pytest.fixture(scope="module", params=["int8", "bfloat16"])
def kept(request, world, rolled, tmp_path_factory):
    """The same with a signal that keeps hidden states; read only."""
    path = tmp_path_factory.mktemp(request.param) / "cache"
    shutil.copytree(rolled, path)
    score(world, path, f"hidden_format={request.param}")
    return path


def copied(cache, tmp_path):
    shutil.copytree(cache, tmp_path / "cache")
    return tmp_path / "cache"


def contents(cache):
    files = [*(cache / FOLDER).glob("part-*"), *(cache / FOLDER).glob("*.safetensors")]
    files += [*(cache / "heads").iterdir(), cache / FOLDER / "signal.json"]
    return {file.name: file.read_bytes() for file in files if file.exists()}


def own_states(world, cache):
    """What the head reads at each response token, by transformers; and its log-probabilities."""
    model = load_model(ModelConfig(path=str(world.teacher)), "cpu")
    states, logprobs = [], []
    for file in sorted((cache / "rollouts").glob("*.parquet")):
        for row in table_to_rollouts(pq.read_table(file)):
            ids = torch.tensor(np.concatenate([row.prompt_ids, row.response_ids])[None], dtype=torch.long)
            places = slice(len(row.prompt_ids) - 1, -1)
            with torch.no_grad():
                states.append(last_hidden(model, input_ids=ids)[0, places].float())
                logprobs.append(model(input_ids=ids).logits[0, places].double().log_softmax(-1))
    return torch.cat(states), torch.cat(logprobs)


def stored_states(cache):
    opened = open_cache(cache)
    described = opened.signals["teacher"].manifest.hidden
    channels = read_channels(cache / FOLDER, described)
    files = sorted((cache / FOLDER).glob("*.parquet"))
    parts = [hidden_columns(pq.read_table(file), described, channels) for file in files]
    return torch.cat([hidden_states(part, torch.device("cpu")) for part in parts])


def test_the_stored_states_and_head_give_the_whole_vocabulary_of_the_model(world, kept):
    hidden_ND, logprobs_NV = own_states(world, kept)
    found_ND = stored_states(kept)
    rebuilt_NV = head_of_signal(open_cache(kept), "teacher").logits(found_ND).double().log_softmax(-1)
    kl_N = (logprobs_NV.exp() * (logprobs_NV - rebuilt_NV)).sum(1)
    assert float(kl_N.mean()) < 1e-3
    assert float((found_ND - hidden_ND).abs().max()) < 0.05 * float(hidden_ND.abs().max())


def test_each_token_takes_a_hidden_state_and_its_scale(kept):
    cache = open_cache(kept)
    described = cache.signals["teacher"].manifest.hidden
    table = pq.read_table(kept / FOLDER / "part-00000.parquet")
    tokens = cache.markers[0].tokens
    width = {"int8": 1, "bfloat16": 2}[described.format] * described.size
    assert sum(len(value.as_py()) for value in table.column("hidden")) == tokens * width
    assert ("hidden_scales" in table.column_names) == (described.format == "int8")
    assert cache.signals["teacher"].manifest.top_k == 0
    assert cache.signals["teacher"].manifest.keeps.kind == "hidden"


def test_entries_can_lie_beside_the_hidden_states(world, rolled, tmp_path):
    cache = copied(rolled, tmp_path)
    score(world, cache, top_k=4)
    found = open_cache(cache).signals["teacher"].manifest
    assert found.top_k == 4
    assert found.tail_shape is not None
    assert found.keeps.serves == {"sampled", "support", "shaped", "whole"}
    assert verify(cache) == []


@pytest.mark.slow
def test_two_signals_of_one_model_share_a_head(world, kept, tmp_path):
    cache = copied(kept, tmp_path)
    score(world, cache, signal="again")
    assert len(list((cache / "heads").iterdir())) == 1


@pytest.mark.parametrize("gone", ["part-00001*", "part-*"])
def test_a_scoring_that_was_killed_is_resumed_to_the_same_bytes(world, kept, tmp_path, gone):
    """After its first shard, and before its manifest and first shard."""
    cache = copied(kept, tmp_path)
    files = list((cache / FOLDER).glob(gone))
    for file in [*files, *([cache / FOLDER / "signal.json"] if gone == "part-*" else [])]:
        file.unlink()
    described = open_cache(kept).signals["teacher"].manifest.hidden
    score(world, cache, f"hidden_format={described.format}")
    assert contents(cache) == contents(kept)


@pytest.mark.parametrize(
    ("sets", "flags"),
    [(["hidden_tokens=256"], {}), (["hidden_format=bfloat16"], {}), ([], {"keep": "topk", "top_k": 0})],
)
def test_another_way_to_keep_them_in_the_same_signal_is_refused_by_name(world, rolled, tmp_path, sets, flags):
    cache = copied(rolled, tmp_path)
    score(world, cache)
    with pytest.raises(OutputError, match="hidden"):
        score(world, cache, *sets, **flags)


def test_too_small_a_sample_is_refused_before_anything_is_written(world, tmp_path):
    cache = copied(world.cache, tmp_path)
    with pytest.raises(
        ConfigError, match=r"has \d+ response tokens, the statistics of int8 need 256 or more"
    ):
        score(world, cache, signal="other")
    assert not (cache / "signals" / "other" / "signal.json").exists()
    score(world, cache, "hidden_format=bfloat16", signal="other")
    assert verify(cache) == []


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (
            ['engine={"kind": "vllm"}'],
            "keep: hidden needs the hidden states that the head reads, which engine",
        ),
        (["support=student"], "keep: hidden has every id, support: student adds none"),
        (["hidden_tokens=100"], "hidden_tokens"),
        (["hidden_format=fp8"], "hidden_format"),
    ],
)
def test_what_cannot_be_kept_is_refused_at_load(sets, message):
    with pytest.raises(ConfigError, match=message):
        load_stage("precompute", [], sets, {"cache": "cache", "teacher": "teacher", "keep": "hidden"})


def test_an_engine_without_hidden_states_is_refused(world, rolled, tmp_path):
    cache = copied(rolled, tmp_path)
    width = open_cache(cache).manifest.vocabulary_size
    with pytest.raises(ConfigError, match="keep: hidden needs engine hf; FakeEngine gives no hidden states"):
        score(world, cache, load=lambda *_: FakeEngine(vocabulary_size=width, context_length=512))


@pytest.mark.parametrize("spread", [1e-9, 1.0, 1e5])
def test_rounding_moves_a_value_by_half_a_step_at_most(spread):
    random = torch.Generator().manual_seed(0)
    hidden_ND = spread * torch.randn(64, 24, generator=random) * torch.arange(1, 25) + 3 * spread
    sums_D, squares_D = hidden_ND.double().sum(0).numpy(), hidden_ND.double().square().sum(0).numpy()
    channels = channels_from_sums(sums_D, squares_D, 64)
    mean_D, std_D = torch.from_numpy(channels.mean_D), torch.from_numpy(channels.std_D)
    codes_ND, scales_N = quantise(hidden_ND, mean_D, std_D)
    assert torch.equal(scales_N, scales_N.half().float())
    assert codes_ND.abs().amax(1).min() >= 126
    error_ND = (dequantise(codes_ND, scales_N, mean_D, std_D) - hidden_ND).abs()
    assert bool((error_ND <= 0.51 * scales_N[:, None] * std_D + 1e-6 * spread).all())


def test_a_value_that_is_no_number_gives_no_scale():
    hidden_ND = torch.ones(3, 4)
    hidden_ND[1, 2] = torch.inf
    _, scales_N = quantise(hidden_ND, torch.zeros(4), torch.ones(4))
    assert scales_N.isnan().tolist() == [False, True, False]


def test_a_head_has_one_file_whatever_process_writes_it(tmp_path):
    head = Head(torch.arange(12.0).view(4, 3).to(torch.bfloat16), torch.ones(4), 30.0, 0.5)
    found = {write_head(tmp_path / name, head) for name in "ab"}
    assert len(found) == 1
    assert head_path(tmp_path / "a", *found).read_bytes() == head_path(tmp_path / "b", *found).read_bytes()


def test_a_signal_without_hidden_states_has_no_head(world):
    with pytest.raises(
        CacheError, match=r"signal teacher of .* keeps no hidden states; score it under another"
    ):
        head_of_signal(open_cache(world.cache), "teacher")


def test_batches_hold_the_hidden_states_of_their_tokens(kept):
    found = [batch.rollouts.signals["teacher"] for batch in package.open_cache(kept).batches(5)]
    assert torch.equal(torch.cat([each.hidden_ND for each in found]), stored_states(kept))
    assert found[0].topk_ids_NK.shape[1] == 0


def test_training_reads_hidden_states_only_where_they_are_requested(kept):
    cache = open_cache(kept)
    names = ("teacher",)
    sizes = []
    for hidden in ((), names):
        reading = FirstReading(cache, names, (), 2**30, hidden=hidden)
        parts = list(reading)
        assert [part.signals["teacher"].hidden is not None for part in parts] == [bool(hidden)] * len(parts)
        index = index_cache(cache, names, (), parts=reading.parts, hidden=hidden)
        store = reading.store(index)
        rows = collect_rows(store, index, np.arange(3), BatchTotals(0, 0))
        seen = show(rows, response_index(rows) < 2)
        hidden_ND = collate(seen, torch.device("cpu")).rollouts.signals["teacher"].hidden_ND
        if hidden:
            whole_ND = collate(rows, torch.device("cpu")).rollouts.signals["teacher"].hidden_ND
            assert torch.equal(hidden_ND, whole_ND[torch.from_numpy(response_index(rows) < 2)])
        else:
            assert hidden_ND is None
        sizes.append(int(index.bytes_S.sum()))
    assert sizes[0] < sizes[1]


def test_a_hidden_state_that_is_no_number_stops_the_first_reading(kept, tmp_path):
    cache = copied(kept, tmp_path)
    described = open_cache(cache).signals["teacher"].manifest.hidden
    if described.format == "int8":
        pytest.skip("every byte is a number")
    table = pq.read_table(cache / FOLDER / "part-00000.parquet")
    values = [np.frombuffer(value, "<u2").copy() for value in table.column("hidden").to_pylist()]
    values[1][7] = 0x7F80
    column = pa.array([value.tobytes() for value in values], pa.large_binary())
    table = table.set_column(table.column_names.index("hidden"), table.schema.field("hidden"), column)
    manifest = open_cache(cache).signals["teacher"].manifest
    fingerprint = manifest.fingerprint()
    write_shard(cache / FOLDER, 0, table, kind=FOLDER, fingerprint=fingerprint, made_from=manifest)
    with pytest.raises(
        CacheError, match=r"part-00000.parquet row 1: hidden is NaN or infinite at position 0"
    ):
        list(FirstReading(open_cache(cache), ("teacher",), (), 2**30, hidden=("teacher",)))


@pytest.mark.slow
def test_views_and_plain_files_of_a_cache_hold_its_signals_of_every_kind(world, kept, tmp_path):
    cache = copied(kept, tmp_path)
    score(world, cache, keep="topk", top_k=2, signal="alike")
    found = query(cache, "SELECT name, keeps, hidden_size FROM signals ORDER BY name").to_pylist()
    states = {"name": "teacher", "keeps": "hidden", "hidden_size": 32}
    assert found == [{"name": "alike", "keeps": "topk", "hidden_size": None}, states]
    apart = "SELECT max(abs(a.logprob_signal - b.logprob_signal)) AS apart, count(*) AS tokens FROM tokens a"
    apart += " JOIN tokens b USING (rollout_id, pos) WHERE a.signal = 'alike' AND b.signal = 'teacher'"
    (row,) = query(cache, apart).to_pylist()
    assert row["apart"] < 1e-5
    assert row["tokens"] == open_cache(cache).num_tokens
    entries = query(cache, "SELECT count(*) AS n FROM topk WHERE signal = 'teacher'")
    assert entries.to_pylist() == [{"n": 0}]
    export_dataset(open_cache(cache), tmp_path / "plain")
    assert "its hidden states are left out" in (tmp_path / "plain" / "README.md").read_text()
    assert pq.read_table(tmp_path / "plain" / "data")["teacher_logprobs"].null_count == 0


@pytest.mark.slow
def test_a_cache_with_hidden_states_is_held_against_its_teacher_again(kept):
    report, agrees = rescore(kept, "teacher", 4)
    assert agrees
    assert report.figures["rollouts"] == 4


@pytest.mark.slow
def test_the_command_keeps_hidden_states_and_verifies_them(world, rolled, tmp_path, lightopd):
    cache = copied(rolled, tmp_path)
    code, _, err = lightopd("precompute", "--cache", cache, "--teacher", world.teacher, "--keep", "hidden")
    assert code == 0, err
    assert lightopd("verify", cache)[0] == 0
    code, _, err = lightopd("precompute", "--cache", cache, "--teacher", world.teacher, "--keep", "logits")
    assert code != 0
    assert "keep: input should be 'topk' or 'hidden', found 'logits'" in err
