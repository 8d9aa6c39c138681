"""A cache in Python: results in every form, rollouts, batches, runs, limits, and what is refused."""

import json
import re
import shutil

import pyarrow as pa
import pytest
import torch
from cache_cases import make_cache

import lightopd
from lightopd.errors import CacheError, ConfigError, InputError, LineageError
from lightopd.inspection.session import Limits
from lightopd.objectives.plain_tensors import loss_from_logits, student_tokens


def test_a_query_gives_arrow_polars_pandas_rows_and_batches(world):
    result = lightopd.open_cache(world.cache).sql("SELECT * FROM rollouts ORDER BY rollout_id")
    assert result.arrow().num_rows == len(result.rows()) == result.pl().height == len(result.df()) == 24
    assert sum(batch.num_rows for batch in result.batches()) == 24


def test_parameters_are_values_and_never_part_of_the_sql(world):
    cache = lightopd.open_cache(world.cache)
    hostile = "'; DROP VIEW rollouts; --"
    assert cache.sql("SELECT $text AS text", text=hostile).rows() == [{"text": hostile}]


def test_text_of_ids_comes_from_the_samplers_tokenizer(world):
    cache = lightopd.open_cache(world.cache)
    rows = cache.sql("SELECT decode(prompt_ids) AS text, prompt_text FROM rollouts").rows()
    assert all(row["text"] == row["prompt_text"] for row in rows)
    assert cache.sql("SELECT token(1) AS token, token(NULL) AS none").rows() == [
        {"token": "<eos>", "none": None}
    ]


def test_a_tokenizer_that_is_gone_shows_ids_and_one_of_another_model_is_refused(tmp_path, world):
    make_cache(tmp_path / "cache")
    cache = lightopd.open_cache(tmp_path / "cache")
    assert cache.sql("SELECT token(5) AS t, decode([5, 6]) AS d").rows() == [{"t": "#5", "d": "#5 #6"}]
    assert "no tokenizer of this cache was found" in cache.texts.missing
    with pytest.raises(LineageError, match="another token-to-id map"):
        lightopd.open_cache(tmp_path / "cache", tokenizer=world.teacher).texts.token(1)
    with pytest.raises(InputError, match=r"has no tokenizer\.json"):
        lightopd.open_cache(tmp_path / "cache", tokenizer=tmp_path).texts.token(1)


def test_a_rollout_has_tokens_signals_and_a_picture_that_no_text_can_break(world):
    cache = lightopd.open_cache(world.cache)
    rollout_id = cache.sql("SELECT min(rollout_id) AS id FROM rollouts").rows()[0]["id"]
    rollout = cache.rollout(rollout_id[:12])
    assert rollout.rollout_id == rollout_id
    with_text = [token for token in rollout.tokens if not re.fullmatch(r"#\d+", token)]  # ids without text
    assert "".join(with_text) == rollout.response
    assert len(rollout.topk["teacher"]) == len(rollout.tokens)
    assert "<eos>" not in rollout._repr_html_()
    assert rollout.gap().shape == (len(rollout.tokens),)
    with pytest.raises(ConfigError, match="is no rollout"):
        cache.rollout("zzz")
    with pytest.raises(ConfigError, match="several"):
        cache.rollout("")


def test_batches_are_the_tensors_of_training_and_the_objectives_take_them(world):
    batches = list(lightopd.open_cache(world.cache).batches(rollouts=10))
    assert sum(len(batch.rollouts.rollout_ids) for batch in batches) == 24
    batch = batches[0].rollouts
    logits_NV = torch.randn(len(batch.ids_N), 24, requires_grad=True)
    for objective in (
        {"target": "log_ratio"},
        {"target": {"kind": "divergence", "divergence": "reverse_kl"}},
    ):
        loss = loss_from_logits(objective, batch, logits_NV)
        (gradient_NV,) = torch.autograd.grad(loss.value, logits_NV)
        assert gradient_NV.isfinite().all()
        assert gradient_NV.abs().max() > 0


def test_plain_tensors_and_the_kernel_say_the_same_of_a_student(world):
    from lightopd.kernels.selected_logprobs import selected_logprobs  # noqa: F401

    batch = next(iter(lightopd.open_cache(world.cache).batches(rollouts=4))).rollouts
    logits_NV = torch.randn(len(batch.ids_N), 24)
    student = student_tokens(batch, logits_NV)
    whole = (
        student.topk_logprobs_NK["teacher"].exp().where(batch.signals["teacher"].topk_ids_NK >= 0, 0).sum(-1)
        + student.tail_logprobs_N["teacher"].exp()
    )
    torch.testing.assert_close(whole, torch.ones_like(whole))
    with pytest.raises(ConfigError, match="one row for each of the"):
        student_tokens(batch, logits_NV[1:])


def test_metrics_of_a_run_are_a_table_also_while_its_last_row_is_half_written(world, tmp_path):
    (tmp_path / "metrics.csv").write_text("step,loss,ess\n1,0.5,1.0\n2,0.4,nan\n3,0.3")
    cache = lightopd.open_cache(world.cache, runs=[tmp_path])
    rows = cache.sql("FROM metrics ORDER BY step, name").rows()
    assert [(row["step"], row["name"], row["value"]) for row in rows] == [
        (1, "ess", 1.0),
        (1, "loss", 0.5),
        (2, "loss", 0.4),
    ]
    assert [row["step"] for row in cache.query("drift").rows()] == [1, 2]
    with pytest.raises(InputError, match="holds no run"):
        lightopd.open_cache(world.cache, runs=[world.cache]).sql("FROM metrics").rows()


def test_a_query_ends_at_its_memory_limit(world):
    opened = lightopd.open_cache(world.cache, limits=Limits(memory="20MB"))
    with pytest.raises(ConfigError, match=r"needs more memory than 20MB.* raise --memory"):
        opened.sql("SELECT count(DISTINCT hash(i) || repeat('x', 99)) FROM range(3000000) t(i)").rows()


def test_a_query_ends_at_its_time_limit_and_memory_must_be_a_size(world):
    cache = lightopd.open_cache(world.cache, limits=Limits(seconds=0.5))
    endless = "SELECT count(*) FROM range(100000000000) a, range(1000000) b"
    with pytest.raises(ConfigError, match=r"ran longer than 0\.5 s and was stopped"):
        cache.sql(endless).rows()
    with pytest.raises(ConfigError, match="--memory lots is not a size"):
        lightopd.open_cache(world.cache, limits=Limits(memory="lots")).sql("SELECT 1").rows()


def test_nothing_is_read_outside_the_cache_and_nothing_is_written(world):
    cache = lightopd.open_cache(world.cache)
    for sql in ("SELECT * FROM read_csv('/etc/passwd')", "DROP VIEW rollouts", "SELECT 1; SELECT 2", ""):
        with pytest.raises(ConfigError):
            cache.sql(sql).rows()


def test_a_folder_that_is_no_cache_is_refused_at_once(tmp_path):
    with pytest.raises(CacheError, match="is not a cache"):
        lightopd.open_cache(tmp_path)


def test_shards_that_come_are_seen_by_the_next_query(world, tmp_path):
    shutil.copytree(world.cache, tmp_path / "cache")
    moved = [*(tmp_path / "cache").rglob("part-00001.*")]
    held = {path: path.read_bytes() for path in moved}
    for path in moved:
        path.unlink()
    cache = lightopd.open_cache(tmp_path / "cache")
    assert cache.sql("SELECT count(*) AS n FROM rollouts").rows() == [{"n": 18}]
    for path, content in held.items():
        path.write_bytes(content)
    assert cache.sql("SELECT count(*) AS n FROM rollouts").rows() == [{"n": 24}]


def test_a_preview_shows_twenty_rows_and_no_control_characters(world):
    cache = lightopd.open_cache(world.cache)
    result = cache.sql("SELECT chr(27) || '[31m<b>' AS text FROM range(50)")
    assert repr(result).splitlines()[2] == "\\u001b[31m<b>"
    assert repr(result).endswith("...")
    assert "&lt;b&gt;" in result._repr_html_()
    assert "<b>" not in result._repr_html_()


def test_every_block_of_python_in_the_page_runs(world, tmp_path, monkeypatch, pytestconfig):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    shutil.copytree(world.cache, tmp_path / "runs" / "cache")
    (tmp_path / "runs" / "train").mkdir()
    (tmp_path / "runs" / "train" / "metrics.csv").write_text("step,loss\n1,0.5\n")
    text = (pytestconfig.rootpath / "docs" / "python.md").read_text()
    names: dict = {}
    for block in text.split("```python\n")[1:]:
        exec(block.split("```")[0], names)
    assert isinstance(names["table"], pa.Table)
    assert json.dumps(names["worst"])
