"""The stage that lets a model write a text about each rollout: columns, contexts and new rollouts."""

import json
import shutil

import numpy as np
import pyarrow as pa
import pytest
from tiny_models import save_model

from lightopd.cache.contexts import read_texts
from lightopd.cache.store import open_cache
from lightopd.cache.tables import split_lists
from lightopd.cache.verify import verify
from lightopd.config import load_stage
from lightopd.errors import CacheError, ConfigError, InputError, LineageError, OutputError
from lightopd.models.tokenizer import load_tokenizer
from lightopd.pipelines import precompute, rewrite
from lightopd.schemas.configs import ModelConfig

TEMPLATE = "{{ prompt }}{{ response }}"


@pytest.fixture
def cache(world, tmp_path):
    """A copy of the world's rollouts."""
    folder = shutil.copytree(world.cache, tmp_path / "cache")
    shutil.rmtree(folder / "signals")
    return folder


def run(world, cache, *sets, dry_run=False, **flags):
    asked = {"cache": cache, "model": world.teacher, "prompts": world.root / "prompts.jsonl"}
    asked |= {"template": TEMPLATE, **flags}
    return rewrite.run(load_stage("rewrite", [], ["sampling.max_tokens=10", *sets], asked), dry_run=dry_run)


def texts_of(path, name="rewrite"):
    opened = open_cache(path, signals=())
    return [row for shard in opened.shards for row in read_texts(opened, name, shard).to_pylist()]


def rollouts_of(path):
    from lightopd.cache.reader import read_columns
    from lightopd.schemas.cache import ROLLOUTS

    opened = open_cache(path, signals=())
    return [row for n in opened.shards for row in read_columns(opened, n, ROLLOUTS.names).to_pylist()]


def test_a_text_lies_beside_its_rollout_with_what_was_shown_and_exactly_what_was_drawn(world, cache):
    report = run(world, cache)
    tokenizer = load_tokenizer(ModelConfig(path=str(world.teacher)))
    texts, rollouts = texts_of(cache), rollouts_of(cache)
    assert [row["rollout_id"] for row in texts] == [row["rollout_id"] for row in rollouts]
    for text, rollout in zip(texts, rollouts, strict=True):
        shown = tokenizer.decode(text["prompt_ids"])
        asked = tokenizer.decode(rollout["prompt_ids"])
        assert shown == asked + tokenizer.decode(rollout["response_ids"], skip_special_tokens=True)
        assert text["text"] == tokenizer.decode(text["response_ids"], skip_special_tokens=True)
        assert (text["response_ids"][-1] == 1) == (text["finish_reason"] == "stop")
    assert report.figures["rollouts"] == len(texts)
    assert verify(cache) == []


def test_a_stopped_run_resumes_with_the_same_bytes_and_writes_nothing_twice(world, cache, caplog):
    run(world, cache)
    folder = cache / "texts" / "rewrite"
    whole = {path.name: path.read_bytes() for path in folder.glob("part-*")}
    (folder / "part-00001.parquet").unlink()
    first = (folder / "part-00000.parquet").stat().st_mtime_ns
    run(world, cache)
    assert {path.name: path.read_bytes() for path in folder.glob("part-*")} == whole
    assert (folder / "part-00000.parquet").stat().st_mtime_ns == first
    caplog.set_level("INFO")
    run(world, cache)
    assert "nothing to do, all 4 shards are there" in caplog.text


def test_another_template_under_the_same_name_is_refused_and_names_it(world, cache):
    run(world, cache)
    with pytest.raises(OutputError, match=r"template: is '\{\{ prompt \}\}\{\{ response \}\}', would be"):
        run(world, cache, template="{{ response }}{{ prompt }}")


def test_a_dry_run_writes_nothing(world, cache):
    report = run(world, cache, dry_run=True)
    assert "dry run: nothing was written" in report.notes
    assert report.figures["prompt_tokens"] > 0
    assert not (cache / "texts").exists()


def test_templates_see_the_group_the_pass_rate_and_earlier_texts(world, cache):
    run(world, cache)
    template = "{{ responses | length }}*{{ (100 * pass_rate) | int }}+{{ texts.rewrite[:2] }}"
    run(world, cache, 'texts=["rewrite"]', name="second", template=template, gives="context")
    tokenizer = load_tokenizer(ModelConfig(path=str(world.teacher)))
    groups, rates = {}, {}
    for row in rollouts_of(cache):
        groups.setdefault(row["prompt_id"], []).append(row["reward"])
    rates = {name: int(100 * float(np.mean(rewards))) for name, rewards in groups.items()}
    rows = zip(texts_of(cache, "second"), texts_of(cache), rollouts_of(cache), strict=True)
    for shown, first, rollout in rows:
        wanted = f"2*{rates[rollout['prompt_id']]}+{first['text'][:2]}"
        assert tokenizer.decode(shown["prompt_ids"]) == wanted
        assert shown["response_ids"] == []
        assert shown["text"] is None


def test_a_number_in_the_text_is_stored_beside_it(world, cache):
    report = run(world, cache, r"value=(\d+)")
    for row in texts_of(cache):
        digits = "".join(c if c.isdigit() else " " for c in row["text"]).split()
        assert row["value"] == (pytest.approx(float(digits[0])) if digits else None)
    assert report.figures["without_value"] == sum(row["value"] is None for row in texts_of(cache))


def test_written_texts_become_rollouts_that_a_teacher_scores_under_what_it_was_shown(world, cache, tmp_path):
    out = tmp_path / "refined"
    run(world, cache, gives="rollouts", out=out, name="refined")
    rows, texts = rollouts_of(out), texts_of(cache, "refined")
    assert [row["response_ids"] for row in rows] == [text["response_ids"] for text in texts]
    assert [row["prompt_ids"] for row in rows] == [row["prompt_ids"] for row in rollouts_of(cache)]
    assert {row["origin"] for row in rows} == {"teacher"}
    assert all(row["logprobs"] is None for row in rows)
    assert verify(out) == []
    asked = {"cache": out, "teacher": world.teacher, "signal": "privileged", "top_k": 4}
    precompute.run(load_stage("precompute", [], ["context.text=refined"], asked))
    assert verify(out) == []
    before = {path.name: path.read_bytes() for path in (out / "rollouts").iterdir()}
    run(world, cache, gives="rollouts", out=out, name="refined")
    assert {path.name: path.read_bytes() for path in (out / "rollouts").iterdir()} == before


def test_a_signal_under_a_written_context_is_that_of_a_direct_forward_pass(world, cache):
    import torch

    from lightopd.models.load import load_model

    run(world, cache, gives="context", name="seen")
    asked = {"cache": cache, "teacher": world.teacher, "signal": "privileged", "top_k": 4}
    precompute.run(load_stage("precompute", [], ["context.text=seen"], asked))
    opened = open_cache(cache)
    from lightopd.cache.reader import read_columns

    model = load_model(ModelConfig(path=str(world.teacher)), "cpu")
    scored = split_lists(read_columns(opened, 0, ["logprobs"], "privileged").column("logprobs"))
    for text, rollout, found in zip(texts_of(cache, "seen"), rollouts_of(cache), scored, strict=False):
        ids = torch.tensor([[*text["prompt_ids"], *rollout["response_ids"]]])
        with torch.no_grad():
            direct = model(input_ids=ids).logits[0].double().log_softmax(-1)
        places = range(len(text["prompt_ids"]) - 1, ids.shape[1] - 1)
        wanted = [float(direct[p, ids[0, p + 1]]) for p in places]
        np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_a_writer_that_did_not_teach_the_student_is_refused(world, cache, tmp_path):
    other = save_model(tmp_path / "other", 7)
    with pytest.raises(LineageError, match="rewrite refused: the SFT teacher is"):
        run(world, cache, model=other)
    report = run(world, cache, model=other, allow=["teacher-mismatch"], name="allowed")
    assert any("teacher-mismatch in rewrite" in note for note in report.notes)
    run(world, cache, model=other, role="reference", name="free")


def test_a_student_that_is_to_be_itself_must_be_the_one_that_sampled(world, cache):
    run(world, cache, model=world.sft / "student", role="self")
    with pytest.raises(LineageError, match="the rollouts were sampled by"):
        run(world, cache, role="self", name="other")


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ({"template": "refined"}, "no template 'refined'; shipped are refine"),
        ({"gives": "rollouts"}, "gives is rollouts and out is None; out is what gives"),
        ({"value": r"\d+"}, "has 0 groups; give it one"),
        ({"value": "("}, "is no regular expression"),
        ({"sampling": {"n": 2}}, "a rollout gets one text"),
        ({"texts": ["rewrite"]}, "cannot be shown to its own writer"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(world, cache, flags, told):
    with pytest.raises(ConfigError, match=told):
        run(world, cache, **flags)


def test_a_template_that_cannot_be_filled_names_the_row_and_what_there_is(world, cache):
    with pytest.raises(InputError, match=r"prompts.jsonl.* cannot fill template \('solution' is undefined\)"):
        run(world, cache, template="{{ solution }}")


def test_a_template_may_not_reach_outside_its_sandbox(world, cache):
    with pytest.raises(InputError, match="cannot fill template"):
        run(world, cache, template="{{ ''.__class__.__mro__[1].__subclasses__() }}")


def test_a_template_that_leaves_no_room_is_refused_before_a_model_is_loaded(world, cache):
    with pytest.raises(InputError, match=r"makes a prompt of \d+ tokens, the context of .* is 64"):
        run(world, cache, template="{{ prompt * 30 }}")


def test_texts_of_other_rollouts_are_refused(world, cache):
    run(world, cache)
    manifest = cache / "texts" / "rewrite" / "text.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"rollouts": "0" * 64}))
    with pytest.raises(CacheError, match="speaks of rollouts 000000000000"):
        texts_of(cache)


def test_the_command_prints_its_report(world, cache, lightopd):
    arguments = ["--cache", cache, "--model", world.teacher, "--prompts", world.root / "prompts.jsonl"]
    code, out, _ = lightopd("rewrite", *arguments, "--template", TEMPLATE, "--max-tokens", 4, "--json")
    assert code == 0
    assert json.loads(out)["stage"] == "rewrite"
    code, _, err = lightopd("rewrite", *arguments, "--template", "{{ nothing }}")
    assert code != 0
    assert "cannot fill template" in err
    assert "Traceback" not in err


def test_a_student_trains_on_what_the_teacher_made_of_its_rollouts(world, cache, tmp_path):
    """TRD (arXiv 2606.08432), as its page says it."""
    from lightopd.pipelines import RECIPES, train

    out = tmp_path / "refined"
    run(world, cache, gives="rollouts", out=out, name="refined")
    asked = {"cache": out, "teacher": world.teacher, "signal": "privileged", "top_k": 4}
    precompute.run(load_stage("precompute", [], ["context.text=refined"], asked))
    asked = {"cache": out, "student": world.sft / "student", "out": tmp_path / "run", "steps": 2}
    recipe = str(RECIPES / "methods" / "trd.yaml")
    report = train.run(load_stage("train", [recipe], ["batch_sequences=6"], asked))
    assert (tmp_path / "run" / "student" / "model.safetensors").is_file()
    assert report.figures["steps"] == 2


def test_a_damaged_text_is_a_finding(world, cache):
    run(world, cache)
    part = cache / "texts" / "rewrite" / "part-00001.parquet"
    part.write_bytes(part.read_bytes()[:-40])
    (finding,) = verify(cache)
    assert finding.file == "texts/rewrite/part-00001.parquet"
    assert "its marker says" in finding.what


def test_a_spliced_response_has_another_span_and_the_drawn_ids_around_it(world, cache, tmp_path):
    """CaOPD (arXiv 2604.16830): a number in the student's own response becomes its pass rate."""
    out, student = tmp_path / "spliced", world.sft / "student"
    own = {"model": student, "role": "self", "gives": "rollouts", "out": out, "name": "calibrated"}
    report = run(world, cache, splice=r"([0-9]+)", template="{{ (100 * pass_rate) | int }}77", **own)
    tokenizer = load_tokenizer(ModelConfig(path=str(student)))
    changed = 0
    for old, new in zip(rollouts_of(cache), rollouts_of(out), strict=True):
        before, after = (tokenizer.decode(row["response_ids"]) for row in (old, new))
        if not any(c.isdigit() for c in before):
            assert old["response_ids"] == new["response_ids"]
            continue
        changed += 1
        begin = next(place for place, c in enumerate(before) if c.isdigit())
        assert after[:begin] == before[:begin]
        end = next((place for place in range(begin, len(before)) if not before[place].isdigit()), len(before))
        assert after.endswith("77" + before[end:])
        assert (new["response_ids"][-1] == 1) == (old["response_ids"][-1] == 1)
    assert report.figures["without_span"] == len(rollouts_of(cache)) - changed
    assert changed
    assert verify(out) == []


def test_a_splice_is_the_students_own_and_its_numbers_are_those_of_its_model(world, cache):
    with pytest.raises(ConfigError, match="a spliced response is the student's own; set gives"):
        run(world, cache, splice="([0-9])")


def test_prompts_are_made_of_what_teacher_and_student_answered(world, cache, tmp_path):
    """ZPPO (arXiv 2606.18216); the rewards make every prompt hard for the student alone."""
    from lightopd.cache.manifests import rollouts_folder
    from lightopd.cache.reader import read_columns
    from lightopd.cache.shards import write_shard
    from lightopd.pipelines.caches.join import join
    from lightopd.schemas.cache import ROLLOUTS

    join(tmp_path / "both", [world.sft / "answers", cache])
    both = open_cache(tmp_path / "both", signals=())
    for shard in both.shards:
        table = read_columns(both, shard, ROLLOUTS.names)
        right = [1.0 if origin == "teacher" else 0.0 for origin in table.column("origin").to_pylist()]
        place = table.schema.get_field_index("reward")
        table = table.set_column(place, ROLLOUTS.field("reward"), pa.array(right, pa.float32()))
        write_shard(
            rollouts_folder(both.path), shard, table, kind="rollouts", fingerprint=both.manifest.fingerprint()
        )
    own = {"model": world.sft / "student", "role": "self", "gives": "prompts"}
    report = run(world, both.path, template="which_is_right", out=tmp_path / "which", name="which", **own)
    run(world, both.path, template="none_is_right", out=tmp_path / "none", name="none", **own)
    which, none = (
        [json.loads(line) for line in (tmp_path / name / "prompts.jsonl").read_text().splitlines()]
        for name in ("which", "none")
    )
    assert report.figures["prompts"] == len(which) == 12
    assert [row["id"] for row in which] == [f"p{number}-which" for number in range(12)]
    answers = {}
    tokenizer = load_tokenizer(ModelConfig(path=str(world.teacher)))
    for row in rollouts_of(both.path):
        said = tokenizer.decode(row["response_ids"], skip_special_tokens=True)
        answers.setdefault(row["prompt_id"], {}).setdefault(row["origin"], []).append(said)
    orders = set()
    for made, listed in zip(which, none, strict=True):
        own = answers[made["id"].removesuffix("-which")]
        pair = [own["teacher"][0], own["student"][0]]
        texts = [f"Answer A:\n{a}\n\nAnswer B:\n{b}\n" for a, b in (pair, pair[::-1])]
        assert sum(text in made["prompt"] for text in texts) >= 1
        orders.add(texts[0] in made["prompt"])
        assert all(wrong in listed["prompt"] for wrong in own["student"])
        assert made["answer"] == listed["answer"]
    assert orders == {True, False}


def test_a_template_that_is_empty_for_every_prompt_says_why_it_may_be(world, cache, tmp_path):
    own = {"model": world.sft / "student", "role": "self", "gives": "prompts", "out": tmp_path / "out"}
    with pytest.raises(InputError, match=r"empty for each of the 12 prompts .* answers of the teacher"):
        run(world, cache, template="which_is_right", **own)
