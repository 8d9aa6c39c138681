"""A cache in a dataset on the Hugging Face hub, which is a small one on loopback."""

import subprocess
import sys
import time
from pathlib import Path

import duckdb
import pytest
from bucket_cases import figures, files_of
from bucket_servers import Proxy
from cache_cases import make_cache
from hub_server import PAGE, HubServer

from lightopd.cache.buckets.mirroring import bring_up_to_date
from lightopd.cache.buckets.mirrors import mirrors_folder
from lightopd.cache.buckets.shard_cache import LIMIT
from lightopd.cache.buckets.stores.hub import COMMITS, Hub
from lightopd.cache.buckets.stores.object_reader import PIECE_BYTES
from lightopd.cache.index import make_views
from lightopd.cache.reader import read_shard_columns
from lightopd.cache.sql.fence import ReadOnlyFolder
from lightopd.cache.store import open_cache
from lightopd.errors import CacheError, InputError
from lightopd.schemas.stores.buckets import BucketConfig
from lightopd.training.measures.metrics_rows import read_metrics

URL = "hf://datasets/lab/rollouts/run1"


@pytest.fixture
def cache(tmp_path):
    return make_cache(tmp_path / "cache")[0].path


@pytest.fixture
def reach(monkeypatch, tmp_path):
    """Sends the commands of a test to an endpoint."""
    from huggingface_hub import close_session, constants

    def reach(endpoint):
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        form = f"{endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", form)
        monkeypatch.setenv("HF_ENDPOINT", endpoint)
        close_session()

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv(COMMITS, "{}")
    return reach


@pytest.fixture
def hub(reach, cache):
    """A hub that has the cache in a folder of a dataset."""
    hub = HubServer()
    reach(hub.endpoint)
    hub.commit("lab/rollouts", cache, "run1")
    yield hub
    hub.close()


def test_commands_read_the_url_as_they_read_the_folder(hub, lightopd, cache):
    asked = "select rollout_id, pos, signal, logprob_signal from tokens order by all"
    assert lightopd("sql", URL, asked, "--json")[1] == lightopd("sql", cache, asked, "--json")[1]
    assert lightopd("verify", URL)[:2] == (0, f"{URL} is whole\n")
    assert open_cache(Path(URL)).num_tokens == open_cache(cache).num_tokens


def test_a_cache_is_pulled_byte_for_byte_and_nothing_is_fetched_twice(hub, lightopd, cache, tmp_path):
    assert figures(lightopd("pull", URL, tmp_path / "again", "--json"))["shards_fetched"] == 4
    assert files_of(tmp_path / "again") == files_of(cache)
    assert figures(lightopd("pull", URL, tmp_path / "again", "--json"))["shards_fetched"] == 0
    hub.commit("lab/whole", cache)
    lightopd("pull", "hf://datasets/lab/whole@main", tmp_path / "third")
    assert {*files_of(tmp_path / "third")} == {*files_of(cache), "README.md"}


def test_what_is_not_of_the_cache_stays_there(hub, lightopd, cache, tmp_path):
    files = hub.commits["lab/rollouts", hub.branches["lab/rollouts", "main"]]
    for name in ("models/heads/x.safetensors", "signals/../signal.json", "../heads/x.safetensors"):
        files[f"run1/{name}"] = b"{}"
    assert lightopd("pull", URL, tmp_path / "again")[0] == 0
    assert files_of(tmp_path / "again") == files_of(cache)


@pytest.mark.slow
def test_training_gives_the_same_losses_to_the_last_bit(hub, world, lightopd, tmp_path, monkeypatch):
    """With room for one shard, by two loader processes."""
    largest = max(path.stat().st_size for path in world.cache.rglob("part-*.parquet"))
    monkeypatch.setenv(LIMIT, str(largest))
    commit = hub.commit("lab/world", world.cache)
    for cache, out in ((world.cache, "local"), ("hf://datasets/lab/world", "away")):
        asked = ("--cache", cache, "--student", world.sft / "student", "--out", tmp_path / out, "--steps", 3)
        sets = ("batch_sequences=6", "shuffle_gib=0.000001", f"loader_workers={2 if out == 'away' else 0}")
        code, _, err = lightopd("train", *asked, *(word for each in sets for word in ("--set", each)))
        assert code == 0, err
    losses = [
        [row["loss"] for row in read_metrics(tmp_path / out / "metrics.csv")] for out in ("local", "away")
    ]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 3
    assert f"cache: hf://datasets/lab/world@{commit}\n" in (tmp_path / "away/train.yaml").read_text()


def test_rollouts_there_are_scored_into_a_folder_and_into_a_bucket(hub, world, lightopd, tmp_path):
    commit = f"hf://datasets/lab/world@{hub.commit('lab/world', world.cache)}"
    for cache, folder in ((tmp_path / "made", "made"), (f"file://{tmp_path}/bucket", "bucket")):
        asked = ("--rollouts", "hf://datasets/lab/world", "--cache", cache, "--teacher", world.teacher)
        code, _, err = lightopd("precompute", *asked, "--top-k", 4)
        assert code == 0, err
        assert f"rollouts: {commit}\n" in (tmp_path / folder / "signals/teacher/precompute.yaml").read_text()
        for part in ("rollouts", "signals/teacher"):
            for path in (world.cache / part).glob("part-*"):
                assert (tmp_path / folder / part / path.name).read_bytes() == path.read_bytes()


def test_a_branch_that_moves_changes_nothing_for_who_reads_it(hub, cache, tmp_path, monkeypatch):
    opened, before = open_cache(Path(URL)), hub.branches["lab/rollouts", "main"]
    wanted = read_shard_columns(open_cache(cache), 1).rollout_ids
    other = make_cache(tmp_path / "other", {"second": {}}, lengths=((4, 4), (2, 6)))[0].path
    hub.commit("lab/rollouts", other, "run1")
    assert list(open_cache(Path(URL)).signals) == ["teacher"]
    assert read_shard_columns(opened, 1).rollout_ids == wanted
    monkeypatch.setenv(COMMITS, "{}")  # as another command begins
    assert list(open_cache(Path(URL)).signals) == ["second"]
    named = URL.replace("/run1", f"@{before}/run1")
    assert read_shard_columns(open_cache(Path(named)), 1).rollout_ids == wanted


def test_a_process_reads_the_commit_of_the_one_that_started_it(hub, cache):
    seen = Hub(URL).url
    assert hub.commit("lab/rollouts", cache, "run1") not in seen
    asked = f"from lightopd.cache.buckets.stores.hub import Hub; print(Hub({URL!r}).url)"
    done = subprocess.run([sys.executable, "-P", "-c", asked], capture_output=True, text=True)
    assert done.stdout.strip() == seen, done.stderr


def test_a_revision_is_a_branch_a_tag_or_a_reference(hub, cache):
    commit = hub.commit("lab/rollouts", cache, "run 2", branch="refs/pr/1")
    hub.branches["lab/rollouts", "some/branch"] = commit
    for revision in ("refs/pr/1", "some%2Fbranch", commit):
        assert Hub(f"hf://datasets/lab/rollouts@{revision}/run 2").read("lightopd.json")
    with pytest.raises(InputError, match="no such revision; name a branch, a tag or a commit after the @"):
        Hub("hf://datasets/lab/rollouts@v7/run1")


def test_of_large_shards_ranges_are_read(hub, cache):
    opened = open_cache(Path(URL))
    asked, found = "select sum(list_sum(logprobs)) from raw_signals", []
    for folder, one in ((ReadOnlyFolder(opened.path, whole_bytes=0), opened), (None, open_cache(cache))):
        with duckdb.connect() as connection:
            if folder is not None:
                connection.register_filesystem(folder)
            make_views(connection, one, "cache://" if folder else f"{cache}/")
            found.append(connection.sql(asked).fetchall())
    assert found[0] == found[1]
    assert not list(mirrors_folder().rglob("part-*.parquet"))


def test_a_private_dataset_asks_for_a_token_which_no_other_host_sees(hub, lightopd, tmp_path, monkeypatch):
    hub.tokens["lab/rollouts"] = "hf_secret"
    code, _, err = lightopd("pull", URL, tmp_path / "again")
    assert (code, "the hub shows no such dataset" in err, "set HF_TOKEN" in err) == (3, True, True)
    monkeypatch.setenv("HF_TOKEN", "\u201chf_secret\u201d")
    code, _, err = lightopd("pull", URL, tmp_path / "again")
    assert (code, "letters that no token has" in err, "hf_secret" in err) == (3, True, False)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert lightopd("pull", URL, tmp_path / "again")[0] == 0
    shards = {token for path, token in hub.asked if path.startswith("/cdn/")}
    assert shards == {""}


@pytest.mark.parametrize(
    ("url", "code", "message"),
    [
        ("hf://datasets/lab/nothing", 3, "the hub shows no such dataset; look at its name"),
        ("hf://datasets/lab/rollouts/run7", 5, "there is nothing; name a URL that `hf upload` wrote"),
        ("hf://datasets/lab/rollouts", 5, "no lightopd.json; name a URL that `hf upload` wrote"),
        ("hf://lab/rollouts", 2, "write it as hf://datasets/OWNER/NAME/FOLDER"),
        ("hf://buckets/lab/rollouts", 2, "write it as hf://datasets/OWNER/NAME/FOLDER"),
        ("hf://datasets/lab", 2, "write it as hf://datasets/OWNER/NAME/FOLDER"),
        ("hf://datasets/lab/rollouts/../other", 2, "write it as hf://datasets/OWNER/NAME/FOLDER"),
    ],
)
def test_a_url_with_no_cache_is_told_in_one_line(hub, lightopd, tmp_path, url, code, message):
    for command in (("pull", url, tmp_path / "c"), ("sql", url, "from rollouts")):
        found, out, err = lightopd(*command)
        assert (found, out, len(err.strip().splitlines())) == (code, "", 1), err
        assert message in err


def test_nothing_is_written_to_the_hub(hub, world, lightopd, cache):
    for command in (
        ("push", cache, URL),
        ("precompute", "--cache", URL, "--teacher", world.teacher),
        ("rollout", "--cache", URL, "--student", world.base, "--prompts", world.root / "prompts.jsonl"),
    ):
        code, _, err = lightopd(*command)
        assert (code, "send it with `hf upload OWNER/NAME CACHE FOLDER" in err) == (2, True), err
    code, _, err = lightopd("index", URL)
    assert (code, "then `hf upload` it there" in err) == (7, True)


def test_what_a_broken_off_look_fetched_is_not_fetched_again(hub, tmp_path):
    reader, mirror = Hub(URL, BucketConfig(retry_s=0)), tmp_path / "mirror"
    num_before = len(hub.asked) + len(reader.listed()) // PAGE + 1
    hub.is_busy, hub.asked = (lambda number: number > num_before), []
    with pytest.raises(InputError, match="the hub answers 503"):
        bring_up_to_date(reader, mirror)
    there = {*files_of(mirror)}
    hub.is_busy, hub.asked = (lambda number: False), []
    bring_up_to_date(reader, mirror)
    again = {path.rpartition("/run1/")[2] for path, _ in hub.asked if "/resolve/" in path}
    assert there
    assert again == {*files_of(mirror)} - there


def test_a_list_that_goes_on_elsewhere_is_not_followed_with_the_token(hub, lightopd, tmp_path, monkeypatch):
    hub.tokens["lab/rollouts"] = "hf_secret"
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    hub.lists_at = f"http://localhost:{hub.port}"
    code, _, err = lightopd("pull", URL, tmp_path / "again")
    assert (code, len(err.strip().splitlines())) == (3, 1), err
    assert "names http://localhost for the rest of the list, which the token is not for" in err
    assert not [path for path, _ in hub.asked if "cursor=" in path]


def test_large_files_beside_the_shards_come_in_pieces(hub, lightopd, cache, tmp_path):
    files = hub.commits["lab/rollouts", hub.branches["lab/rollouts", "main"]]
    large = bytes(PIECE_BYTES) + b"end"
    files["run1/model.bin"] = files["run1/signals/teacher/contexts.parquet"] = large
    assert lightopd("pull", URL, tmp_path / "again")[0] == 0
    assert (tmp_path / "again/model.bin").read_bytes() == large
    bring_up_to_date(Hub(URL), mirror := tmp_path / "mirror")
    assert (mirror / "signals/teacher/contexts.parquet").read_bytes() == large
    assert not (mirror / "model.bin").exists()
    assert hub.largest_bytes == PIECE_BYTES


def test_an_option_of_other_stores_is_refused(hub, lightopd, tmp_path):
    code, _, err = lightopd("pull", URL, tmp_path / "c", "--set", "store.region=eu")
    assert (code, "takes no --set store.region; the hub's own settings are" in err) == (2, True)


def test_busy_slow_and_cut_answers_are_lived_through(hub, reach, lightopd, cache, tmp_path):
    proxy = Proxy(hub.port, delay_s=0.01, is_cut=lambda number: number % 3 == 0)
    hub.is_busy = lambda number: number % 4 == 0
    try:
        reach(proxy.endpoint)
        assert figures(lightopd("pull", URL, tmp_path / "again", "--json"))["shards_fetched"] == 4
    finally:
        proxy.close()
    assert proxy.connections > 3
    assert files_of(tmp_path / "again") == files_of(cache)


def test_a_hub_that_never_answers_or_byte_by_byte_or_is_busy_ends_the_command_in_time(
    hub, reach, lightopd, tmp_path, cache
):
    limits = ("--set", "timeout_s=0.5", "--set", "retry_s=1")
    proxy, started_s = Proxy(hub.port, delay_s=60), time.monotonic()
    reach(proxy.endpoint)
    code, _, err = lightopd("pull", URL, tmp_path / "c", *limits)
    proxy.close()
    assert (code, "does not answer (tried again for 1 s); look at HF_ENDPOINT" in err) == (3, True)
    reach("http://127.0.0.1:9")
    assert lightopd("pull", URL, tmp_path / "c", *limits)[0] == 3
    reach(hub.endpoint)
    hub.drip_s = 0.1
    assert lightopd("pull", URL, tmp_path / "c", *limits)[0] == 3
    hub.drip_s, hub.is_busy = 0.0, lambda number: True
    code, _, err = lightopd("pull", URL, tmp_path / "c", *limits)
    assert (code, "the hub answers 503" in err) == (3, True)
    assert time.monotonic() - started_s < 20


@pytest.mark.parametrize(
    ("endpoint", "message"),
    [
        ("hub.example", "its address is none that begins with https:// or http://; look at HF_ENDPOINT"),
        ("http://hub.example:port", "its address is none; look at HF_ENDPOINT"),
        ("", "it sends from one address to another without end; look at HF_ENDPOINT"),
    ],
)
def test_what_no_second_try_changes_is_not_tried_again(hub, reach, lightopd, tmp_path, endpoint, message):
    hub.is_circular, started_s = not endpoint, time.monotonic()
    reach(endpoint or hub.endpoint)
    code, _, err = lightopd("pull", URL, tmp_path / "c", "--set", "retry_s=20")
    assert (code, len(err.strip().splitlines()), message in err) == (3, 1, True), err
    assert time.monotonic() - started_s < 10


def test_a_flipped_byte_is_refused(hub, lightopd, cache, tmp_path):
    files = hub.commits["lab/rollouts", hub.branches["lab/rollouts", "main"]]
    name = "run1/rollouts/part-00001.parquet"
    files[name] = files[name][:-1] + b"?"
    code, _, err = lightopd("pull", URL, tmp_path / "again", "--jobs", 1)
    assert (code, "has SHA-256" in err, "again with `hf upload`" in err) == (5, True, True)
    assert not (tmp_path / "again/lightopd.json").exists()
    with pytest.raises(CacheError, match=r"part-00001.parquet has SHA-256"):
        read_shard_columns(open_cache(Path(URL)), 1)


def test_what_is_no_hub_is_told_as_such(hub, reach, monkeypatch):
    import hub_server

    monkeypatch.setattr(hub_server.json, "dumps", lambda value: "<html>")
    with pytest.raises(InputError, match="does not answer as the hub does; look at HF_ENDPOINT"):
        Hub(URL, BucketConfig(retry_s=0))


def test_offline_the_command_says_so(hub, lightopd, tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    code, _, err = lightopd("pull", URL, tmp_path / "c")
    assert (code, "HF_HUB_OFFLINE is set; unset it" in err) == (3, True)
