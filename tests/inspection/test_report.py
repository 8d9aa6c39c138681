"""The report as a file: what it says, what it never holds, and what it needs."""

import base64
import gzip
import hashlib
import json
import re
import shutil
import sys

import pytest
from hostile_caches import SCRIPT, hostile_cache, write_run

import lightopd
from lightopd.errors import ConfigError
from lightopd.inspection.report.charts import bars, safe_svg
from lightopd.inspection.report.rollouts import UNITS_PER_NAT, UNKNOWN


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("hostile")
    cache = hostile_cache(root)
    for name, accuracy in (("eval_before", 0.25), ("eval_after", 0.5), ("eval_teacher", 0.75)):
        (root / name).mkdir()
        figures = {"avg_at_k": accuracy, "standard_error": 0.01, "rollouts": 100}
        (root / name / "eval.report.json").write_text(json.dumps({"figures": figures, "seconds": 2.0}))
    write_run(root / "train", cache=cache.path)
    write_run(root / "other", is_finished=False, cache=cache.path)
    return root


@pytest.fixture(scope="module")
def page(root):
    cache = lightopd.open_cache(root / "cache", runs=[root / "train", root / "other"])
    return cache.report(root / "report.html").read_text(encoding="utf-8")


def packed(page):
    """What the viewer's script reads."""
    (text,) = re.findall(r'id="data">([A-Za-z0-9+/=]*)</script>', page)
    return json.loads(gzip.decompress(base64.b64decode(text)))


def test_the_page_has_every_section_and_its_charts(page):
    for anchor in (
        "summary",
        "evaluation",
        "distributions",
        "positions",
        "training",
        "cost",
        "runs",
        "rollouts",
    ):
        assert f'<section id="{anchor}">' in page
    for title in (
        *("Response lengths", "Gap", "Entropy of the student", "Mass outside the top-k", "Rewards"),
        *("Overlap of two top-k", "Gap by position", "Effective sample size", "Seconds by stage"),
        "Held-out accuracy",
    ):
        assert f"<figcaption>{title}" in page, title
    assert "limit 0.2" in page
    assert "0.250 \u2192 0.500" in page
    assert "step 21" in page


def test_the_verdict_on_the_teacher_is_in_words(page, root):
    assert "teacher: teachers/big is the very model that wrote the student&#39;s fine-tuning data" in page
    assert "rollout_student: not the student that sampled" in page
    assert f"{root.name}: the cache went stale at step 21" in page


def test_no_text_of_a_rollout_is_part_of_the_page(page):
    assert "owned" not in re.sub(r"&lt;.*?&gt;", "", page)
    assert SCRIPT not in page
    assert page.count("<script") == 2


def test_only_the_pages_own_script_may_run_and_nothing_may_be_loaded(page):
    (script,) = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page)[1].replace(
        "&#39;", "'"
    )
    assert f"script-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy
    assert "connect-src 'none'" in policy
    found = re.findall(
        r"""(?:src|href)=["']([^"'#][^"']*)""", re.sub(r"<script.*?</script>", "", page, flags=re.S)
    )
    assert found == ["data:,"]


def test_the_viewer_holds_the_very_numbers_of_the_cache(page, root):
    data = packed(page)
    cache = lightopd.open_cache(root / "cache")
    assert len(data["rollouts"]) == 12
    first = data["rollouts"][0]
    view = cache.rollout(first["id"])

    def numbers(text):
        content = base64.b64decode(text)
        return [int.from_bytes(content[i : i + 2], "little", signed=True) for i in range(0, len(content), 2)]

    assert [value / UNITS_PER_NAT for value in numbers(first["student"])] == pytest.approx(
        view.logprobs.tolist(), abs=0.0011
    )
    assert UNKNOWN not in numbers(first["student"])
    teacher = first["signals"]["teacher"]
    assert numbers(teacher["counts"]) == [6] * len(view.tokens)
    assert [data["texts"][str(token_id)] for token_id in view.token_ids] == list(view.tokens)


def test_the_same_cache_gives_the_same_bytes(root, page):
    again = lightopd.open_cache(root / "cache", runs=[root / "train", root / "other"]).report(
        root / "again.html"
    )
    assert packed(again.read_text(encoding="utf-8")) == packed(page)


def test_of_a_large_cache_the_viewer_holds_the_worst_and_some_by_chance(root, tmp_path):
    cache = lightopd.open_cache(root / "cache")
    text = cache.report(tmp_path / "small.html", rollouts=4, check=False).read_text(encoding="utf-8")
    assert "4 of 12 rollouts: the 2 with the largest mean gap, and 2 by chance." in text
    assert "Not checked" in text
    worst = cache.sql(
        "SELECT rollout_id FROM tokens WHERE loss_mask GROUP BY ALL ORDER BY avg(gap) DESC LIMIT 1"
    ).rows()
    assert len(packed(text)["rollouts"]) == 4
    assert packed(text)["rollouts"][0]["id"] == worst[0]["rollout_id"]


def test_findings_of_verify_are_listed(root, tmp_path):
    shutil.copytree(root / "cache", tmp_path / "cache")
    (tmp_path / "cache" / "rollouts" / "part-00009.parquet").write_bytes(b"")
    text = lightopd.open_cache(tmp_path / "cache").report(tmp_path / "x.html").read_text(encoding="utf-8")
    assert "<li>rollouts/part-00009.parquet" in text
    assert re.search(r"\d findings:", text)


def test_a_damaged_shard_ends_it_with_one_line_that_names_the_file(lightopd, root, tmp_path):
    shutil.copytree(root / "cache", tmp_path / "cache")
    shard = tmp_path / "cache/signals/teacher/part-00000.parquet"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    code, _, err = lightopd("report", tmp_path / "cache")
    assert code == 5
    assert "signals/teacher/part-00000.parquet" in err
    assert not (tmp_path / "report.html").exists()


def test_an_unfinished_cache_without_signals_or_rewards_has_a_report(world, tmp_path):
    shutil.copytree(world.cache, tmp_path / "cache")
    shutil.rmtree(tmp_path / "cache" / "signals")
    for path in (tmp_path / "cache" / "rollouts").glob("part-00001.*"):
        path.unlink()
    text = lightopd.open_cache(tmp_path / "cache").report(tmp_path / "x.html").read_text(encoding="utf-8")
    assert "No signal has been precomputed yet" in text
    assert "1 shards of rollouts are not there yet." in text


def test_the_command_takes_a_run_and_finds_its_cache(lightopd, root, tmp_path):
    code, out, _ = lightopd("report", root / "train", "--out", tmp_path / "r.html", "--no-check", "--json")
    assert code == 0
    assert json.loads(out)["size_bytes"] == (tmp_path / "r.html").stat().st_size
    code, _, err = lightopd("report", tmp_path)
    assert code == 3
    assert "neither a cache nor a run" in err
    assert lightopd("report", tmp_path / "nowhere")[0] == 5


def test_without_the_charts_packages_it_says_what_to_install(root, monkeypatch):
    monkeypatch.setitem(sys.modules, "altair", None)
    with pytest.raises(ConfigError, match=r"pip install 'lightopd\[report\]'"):
        lightopd.open_cache(root / "cache").report(root / "never.html")
    assert not (root / "never.html").exists()


def test_an_unknown_setting_is_refused_by_name(root):
    with pytest.raises(ConfigError, match="no setting 'rolouts'"):
        lightopd.open_cache(root / "cache").report(rolouts=3)


@pytest.mark.parametrize(
    "inner", ["<script>1</script>", '<g onload="x()"/>', '<a href="http://x"/>', "<foreignObject/>"]
)
def test_a_drawing_that_could_run_or_load_something_is_refused(inner):
    with pytest.raises(ValueError, match="a chart holds"):
        safe_svg(f'<svg xmlns="http://www.w3.org/2000/svg">{inner}</svg>')


def test_names_in_charts_are_text():
    chart = bars("t", [{"stage": SCRIPT, "seconds": 1.0}], "stage", "seconds", "s")
    assert "<script" not in chart.svg
