"""Caches are made once, opened whole, and refused with the reason."""

import json
import shutil
from dataclasses import replace

import pytest
from cache_cases import cache_manifest, make_cache, signal_manifest

from lightopd.cache.manifests import differences, differing
from lightopd.cache.store import content_id, create_cache, create_signal, open_cache
from lightopd.cache.verify import verify
from lightopd.errors import CacheError, OutputError
from lightopd.schemas.configs import SamplingConfig


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_making_a_cache_twice_under_the_same_settings_changes_nothing(tmp_path):
    cache, _, _ = make_cache(tmp_path / "cache")
    before = (tmp_path / "cache" / "lightopd.json").read_bytes()
    create_cache(cache.path, cache_manifest(lightopd_version="9.9"))
    create_signal(cache, signal_manifest("teacher", cache.manifest))
    assert (tmp_path / "cache" / "lightopd.json").read_bytes() == before


def test_a_cache_of_other_settings_is_refused_with_both_values_of_each_field(tmp_path):
    make_cache(tmp_path)
    wanted = cache_manifest(sampling=SamplingConfig(temperature=0.7), vocabulary_size=50)
    with pytest.raises(OutputError, match="belongs to another run") as caught:
        create_cache(tmp_path, wanted)
    assert "sampling.temperature: is 1.0, would be 0.7" in str(caught.value)
    assert "vocabulary_size: is 48, would be 50" in str(caught.value)
    assert "lightopd_version" not in str(caught.value)


def test_a_signal_of_other_settings_is_refused(tmp_path):
    cache, _, _ = make_cache(tmp_path)
    with pytest.raises(OutputError, match="top_k: is 4, would be 9"):
        create_signal(cache, signal_manifest("teacher", cache.manifest, top_k=9))


def test_a_signal_of_other_rollouts_is_refused(tmp_path):
    cache, _, _ = make_cache(tmp_path, signals={})
    with pytest.raises(CacheError, match="scored the rollouts"):
        create_signal(cache, signal_manifest("teacher", cache_manifest(prompts="others")))


def test_differences_leave_out_what_a_fingerprint_leaves_out():
    assert differences(cache_manifest(), cache_manifest(lightopd_version="2")) == []


def test_shards_without_a_manifest_are_not_taken_over(tmp_path):
    make_cache(tmp_path)
    (tmp_path / "lightopd.json").unlink()
    with pytest.raises(OutputError, match=r"has rollouts/ but no lightopd.json"):
        create_cache(tmp_path, cache_manifest())


def test_an_opened_cache_knows_its_size_and_its_signals(tmp_path):
    cache, _, _ = make_cache(tmp_path, signals={"teacher": {}, "other": {"role": "reference", "top_k": 0}})
    assert (cache.num_rollouts, cache.num_tokens) == (5, 30)
    assert cache.shards == (0, 1)
    assert cache.missing() == cache.missing("other") == ()
    assert sorted(cache.signals) == ["other", "teacher"]
    assert list(open_cache(tmp_path, signals=["other"]).signals) == ["other"]


def test_a_folder_that_is_not_a_cache_is_refused(tmp_path):
    with pytest.raises(CacheError, match="is not a cache"):
        open_cache(tmp_path)
    with pytest.raises(CacheError, match="is not a cache"):
        open_cache(tmp_path / "nowhere")


@pytest.mark.parametrize("file", ["lightopd.json", "signals/teacher/signal.json"])
def test_a_newer_schema_version_is_refused_before_anything_else_is_read(file, tmp_path):
    make_cache(tmp_path)
    edit(tmp_path / file, schema_version=9, field_of_the_future=1)
    with pytest.raises(CacheError, match=rf"{file} has schema version 9.* reads up to 3"):
        open_cache(tmp_path)


@pytest.mark.parametrize("file", ["lightopd.json", "signals/teacher/signal.json"])
def test_broken_json_is_refused_by_the_name_of_the_file(file, tmp_path):
    make_cache(tmp_path)
    (tmp_path / file).write_text('{"schema_version": 1,')
    with pytest.raises(CacheError, match=rf"{file} is not valid JSON"):
        open_cache(tmp_path)


def test_an_unknown_field_in_a_manifest_is_named(tmp_path):
    make_cache(tmp_path)
    edit(tmp_path / "lightopd.json", surprise=1)
    with pytest.raises(CacheError, match="surprise"):
        open_cache(tmp_path)


def test_missing_rollouts_are_named_with_the_command_that_goes_on(tmp_path):
    make_cache(tmp_path)
    (tmp_path / "rollouts" / "part-00001.json").unlink()
    with pytest.raises(
        CacheError, match=r"1 of 2 shards are missing \(part-00001.parquet\).*lightopd rollout"
    ):
        open_cache(tmp_path)
    cache = open_cache(tmp_path, incomplete=True)
    assert (cache.shards, cache.missing()) == ((0,), (1,))


def test_a_missing_signal_shard_is_named_with_the_command_that_goes_on(tmp_path):
    make_cache(tmp_path, signals={"teacher": {}, "other": {}})
    (tmp_path / "signals" / "other" / "part-00000.json").unlink()
    with pytest.raises(CacheError, match=r"part-00000.parquet\).*lightopd precompute .*--signal other"):
        open_cache(tmp_path)
    assert open_cache(tmp_path, signals=["teacher"]).missing("teacher") == ()
    assert open_cache(tmp_path, incomplete=True).missing("other") == (0,)


def test_a_signal_that_is_not_there_is_refused_with_those_that_are(tmp_path):
    make_cache(tmp_path)
    with pytest.raises(CacheError, match=r"no signal 'other' \(there: teacher\)"):
        open_cache(tmp_path, signals=["other"])


def test_a_truncated_shard_is_refused_at_opening_even_when_missing_shards_are_allowed(tmp_path):
    make_cache(tmp_path)
    path = tmp_path / "rollouts" / "part-00000.parquet"
    path.write_bytes(path.read_bytes()[:-1])
    for incomplete in (False, True):
        with pytest.raises(CacheError, match=r"part-00000.parquet has \d+ bytes, its marker says \d+"):
            open_cache(tmp_path, incomplete=incomplete)


def test_a_shard_made_under_other_settings_is_refused_at_opening(tmp_path):
    make_cache(tmp_path)
    edit(tmp_path / "rollouts" / "part-00000.json", fingerprint="0" * 64)
    with pytest.raises(CacheError, match="made under other settings"):
        open_cache(tmp_path)


def test_a_signal_with_another_number_of_rows_is_refused_at_opening(tmp_path):
    make_cache(tmp_path)
    edit(tmp_path / "signals" / "teacher" / "part-00000.json", rows=2)
    with pytest.raises(CacheError, match=r"signals/teacher/part-00000.parquet has 2 rows .* have 3"):
        open_cache(tmp_path)


def test_a_cache_keeps_its_content_id_when_it_is_moved_and_loses_it_when_a_byte_changes(tmp_path):
    cache, _, _ = make_cache(tmp_path / "a", signals={"teacher": {}, "other": {}})
    before = content_id(cache, ["teacher", "other"])
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert content_id(open_cache(tmp_path / "b"), ["other", "teacher"]) == before
    assert content_id(cache, ["teacher"]) != before
    edit(tmp_path / "b" / "signals" / "other" / "part-00000.json", sha256="0" * 64)
    changed = open_cache(tmp_path / "b")
    assert content_id(changed, ["teacher", "other"]) != before
    assert content_id(changed, ["teacher"]) == content_id(cache, ["teacher"])


def test_shards_without_their_manifest_are_named_and_never_written_over(tmp_path):
    cache, *_ = make_cache(tmp_path)
    file = tmp_path / "signals" / "teacher" / "signal.json"
    before, honest = file.read_bytes(), cache.signals["teacher"].manifest
    file.unlink()
    assert [finding.file for finding in verify(tmp_path)] == ["signals/teacher/signal.json"]
    with pytest.raises(CacheError, match=r"teacher has shards but no signal.json; .*precompute.yaml"):
        open_cache(tmp_path, signals=["teacher"])
    bare = open_cache(tmp_path, signals=())
    with pytest.raises(OutputError, match=r"teacher has shards made under other settings, and no signal"):
        create_signal(bare, honest.model_copy(update={"top_k": 0}))
    create_signal(bare, honest)
    assert file.read_bytes() == before
    assert verify(tmp_path) == []


@pytest.mark.parametrize("file", ["lightopd.json", "signals/teacher/signal.json"])
def test_a_changed_manifest_is_blamed_and_not_its_shards(tmp_path, file):
    make_cache(tmp_path)
    changes = {"prompts": "others"} if file == "lightopd.json" else {"min_probability": 0.5}
    edit(tmp_path / file, **changes)
    with pytest.raises(CacheError, match=r"all its markers speak of settings .*the manifest was changed"):
        open_cache(tmp_path)
    assert [one.file for one in verify(tmp_path) if "the manifest was changed" in one.what] == [file]


def test_hashes_are_shown_as_far_as_it_takes_to_tell_them_apart():
    assert differing("a" * 64, "a" * 20 + "b" * 44) == ("a" * 21, "a" * 20 + "b")
    assert differing("c" * 64, "d" * 64) == ("c" * 12, "d" * 12)


def test_the_content_id_does_not_depend_on_the_order_of_signals(tmp_path):
    cache, *_ = make_cache(tmp_path, signals={"b": {}, "a": {}})
    assert content_id(cache, ["a", "b"]) == content_id(cache, ["b", "a"])
    turned = replace(cache, signals=dict(reversed(cache.signals.items())))
    assert content_id(turned, ["b", "a"]) == content_id(cache, ["a", "b"])
    assert content_id(cache, ["a"]) != content_id(cache, ["b"])


def lost(world, tmp_path, file):
    cache = tmp_path / "cache"
    shutil.copytree(world.cache, cache)
    before = json.loads((cache / file).read_text())
    (cache / file).unlink()
    return cache, before


@pytest.mark.parametrize("file", ["lightopd.json", "signals/teacher/signal.json"])
def test_a_manifest_that_is_gone_is_made_again_from_the_shards(lightopd, world, tmp_path, file):
    cache, before = lost(world, tmp_path, file)
    with pytest.raises(CacheError, match=rf"lightopd verify {cache} --restore"):
        open_cache(cache, signals=["teacher"])
    code, out, err = lightopd("verify", cache)
    assert code == 5
    assert f"lightopd verify {cache} --restore" in out + err
    code, out, err = lightopd("verify", cache, "--restore")
    assert (code, out) == (0, f"{cache} is whole\n")
    assert "made again from its shards" in err
    again = json.loads((cache / file).read_text())
    unlike = {"noise": 0, "checksum": 0}  # the noise was measured, and is in the manifest alone
    assert {**again, **unlike} == {**before, **unlike}


def test_train_refuses_scores_without_their_manifest_and_says_how_it_comes_back(lightopd, world, tmp_path):
    cache, _ = lost(world, tmp_path, "signals/teacher/signal.json")
    asked = ["train", "--cache", cache, "--student", world.sft / "student", "--out", tmp_path / "run"]
    code, _, err = lightopd(*asked)
    assert code == 5
    assert f"lightopd verify {cache} --restore" in err
    code, _, err = lightopd("precompute", "--cache", cache, "--teacher", world.teacher, "--top-k", "0")
    assert code == 7
    assert f"lightopd verify {cache} --restore" in err


def test_markers_that_do_not_agree_restore_nothing(lightopd, world, tmp_path):
    cache, _ = lost(world, tmp_path, "signals/teacher/signal.json")
    marker = cache / "signals/teacher/part-00001.json"
    plain = json.loads(marker.read_text())
    for made_from, told in (
        ({**plain["made_from"], "top_k": 9}, "speak of several manifests"),
        ({"name": "x"}, "speak of several manifests"),
    ):
        marker.write_text(json.dumps({**plain, "made_from": made_from}))
        code, _, err = lightopd("verify", cache, "--restore")
        assert code == 5
        assert told in err
        assert not (cache / "signals/teacher/signal.json").exists()
