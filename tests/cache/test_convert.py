"""The official Parquet in, a plain dataset out."""

from itertools import chain

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from cache_cases import make_cache

from lightopd.cache.formats.convert import convert_official
from lightopd.cache.formats.dataset import export_dataset
from lightopd.cache.index import query
from lightopd.cache.reader import read_shard_columns
from lightopd.cache.store import open_cache
from lightopd.cache.verify import verify
from lightopd.errors import InputError

PROMPTS = ["<user>1+1", "<user>2+2", "<user>1+1", "<user>3"]
RESPONSES = [[5, 6, 7], [], [8], [9, 10]]
LOGPROBS = [[-0.1, -2.5, -0.003], [], [-1.0], [-4.0, -0.25]]


def official(path, **changes):
    """A file as `prepare_lightning_opd.py` writes it: pandas, snappy, nested metadata."""
    columns = {
        "response_tokens": pa.array(RESPONSES, pa.list_(pa.int64())),
        "teacher_log_probs": pa.array(LOGPROBS, pa.list_(pa.float64())),
        "loss_mask": pa.array([[1] * len(row) for row in RESPONSES], pa.list_(pa.int64())),
        "response": pa.array(["a b c", "", "d", "e f"]),
        "is_lightning_opd": pa.array([True] * 4),
    }
    columns = {name: values for name, values in {**columns, **changes}.items() if values is not None}
    metadata = pa.StructArray.from_arrays(list(columns.values()), names=list(columns))
    pq.write_table(pa.table({"prompt": PROMPTS, "label": ["0"] * 4, "metadata": metadata}), path)
    return path


def encode(prompt):
    return [ord(letter) % 100 for letter in prompt]


def test_an_official_file_becomes_a_sound_cache_of_unknown_lineage(tmp_path):
    done = convert_official(
        official(tmp_path / "o.parquet"), tmp_path / "c", vocabulary_size=200, encode_prompt=encode
    )
    assert (done.num_rollouts, done.num_tokens, done.dropped) == (3, 6, {"empty response": 1})
    assert verify(tmp_path / "c") == []
    cache = open_cache(tmp_path / "c")
    assert cache.manifest.origin == "imported"
    assert cache.manifest.sft.proof == "unknown"
    assert cache.manifest.sampler is None
    assert cache.markers[0].dropped == {"empty response": 1}
    assert cache.signals["teacher"].manifest.top_k == 0
    assert cache.signals["teacher"].manifest.model is None


def test_imported_ids_and_logprobs_are_those_of_the_file(tmp_path):
    convert_official(
        official(tmp_path / "o.parquet"), tmp_path / "c", vocabulary_size=200, encode_prompt=encode
    )
    found = read_shard_columns(open_cache(tmp_path / "c"), 0, ["teacher"])
    assert found.response_ids_N.tolist() == [5, 6, 7, 8, 9, 10]
    assert found.prompt_ids_P.tolist() == [*encode(PROMPTS[0]), *encode(PROMPTS[2]), *encode(PROMPTS[3])]
    assert found.logprobs_N is None
    wanted = np.array([-0.1, -2.5, -0.003, -1.0, -4.0, -0.25], np.float32)
    np.testing.assert_array_equal(found.signals["teacher"].logprobs_N, wanted)
    np.testing.assert_array_equal(found.signals["teacher"].tail_logprobs_N, np.zeros(6, np.float32))


def test_two_responses_to_one_prompt_are_samples_of_one_group(tmp_path):
    convert_official(
        official(tmp_path / "o.parquet"), tmp_path / "c", vocabulary_size=200, encode_prompt=encode
    )
    rows = query(
        tmp_path / "c", "SELECT prompt_id, sample_index FROM rollouts ORDER BY row_in_shard"
    ).to_pylist()
    assert [row["sample_index"] for row in rows] == [0, 1, 0]
    assert rows[0]["prompt_id"] == rows[1]["prompt_id"] != rows[2]["prompt_id"]


def test_prompt_tokens_in_the_file_need_no_tokenizer(tmp_path):
    tokens = pa.array([[1, 2], [1], [3], [4]], pa.list_(pa.int64()))
    convert_official(
        official(tmp_path / "o.parquet", prompt_tokens=tokens), tmp_path / "c", vocabulary_size=200
    )
    assert read_shard_columns(open_cache(tmp_path / "c"), 0).prompt_ids_P.tolist() == [1, 2, 3, 4]


def test_chat_prompts_are_handed_to_the_tokenizer_as_turns(tmp_path):
    path = official(tmp_path / "o.parquet")
    turns = pa.array([[{"role": "user", "content": text}] for text in PROMPTS])
    pq.write_table(pq.read_table(path).set_column(0, "prompt", turns), path)
    seen = []

    def encode_turns(prompt):
        seen.append(prompt)
        return [1]

    convert_official(path, tmp_path / "c", vocabulary_size=200, encode_prompt=encode_turns)
    assert seen[0] == [{"role": "user", "content": "<user>1+1"}]


def test_importing_twice_gives_the_same_bytes(tmp_path):
    path = official(tmp_path / "o.parquet")
    for name in ("a", "b", "b"):
        convert_official(path, tmp_path / name, vocabulary_size=200, encode_prompt=encode)
    for file in (tmp_path / "a").rglob("part-*"):
        assert (tmp_path / "b" / file.relative_to(tmp_path / "a")).read_bytes() == file.read_bytes()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher_log_probs": None}, "has no metadata.teacher_log_probs"),
        ({"response_tokens": None}, "has no metadata.response_tokens"),
        (
            {"teacher_log_probs": pa.array([[-1.0, -1.0], [], [-1.0], [-1.0, -1.0]])},
            "row 0 has 3 response_tokens but 2 teacher_log_probs",
        ),
        (
            {"teacher_log_probs": pa.array([[-1.0] * 3, [], None, [-1.0, -1.0]])},
            "row 2 has 1 response_tokens but none teacher_log_probs",
        ),
        (
            {"teacher_log_probs": pa.array([[-1.0] * 3, [], [-1.0], [-1.0, float("nan")]])},
            "row 3 has teacher_log_probs = nan at position 1",
        ),
        (
            {"teacher_log_probs": pa.array([[-1.0] * 3, [], [0.5], [-1.0, -1.0]])},
            "row 2: logprobs has 0.5 at place 0, which is not a log-probability",
        ),
        (
            {"teacher_log_probs": pa.array([[-1.0] * 3, [], [None], [-1.0, -1.0]], pa.list_(pa.float64()))},
            "row 2 has teacher_log_probs = nan at position 0",
        ),
        (
            {"response_tokens": pa.array([[5, None, 7], [], [8], [9, 10]], pa.list_(pa.int64()))},
            "row 0 has a null in response_tokens at position 1",
        ),
        (
            {"response_tokens": pa.array([[5.0, 6.0, float("nan")], [], [8.0], [9.0, 10.0]])},
            "metadata.response_tokens",
        ),
        (
            {"loss_mask": pa.array([[1, 2, 1], [], [1], [1, 1]])},
            "row 0 has loss_mask = 2 at position 1, not 0 or 1",
        ),
        (
            {"loss_mask": pa.array([[1, None, 1], [], [1], [1, 1]])},
            "row 0 has a null in loss_mask at position 1",
        ),
        (
            {"loss_mask": pa.array([[1, 1, 1], [], [1], [1]])},
            "row 3 has 2 response_tokens but 1 loss_mask",
        ),
        (
            {"response_tokens": pa.array([[5, 6, 2**32 + 7], [], [8], [9, 10]])},
            "row 0 has response id 4294967303 at position 2, outside the vocabulary of 200",
        ),
    ],
)
def test_a_broken_official_file_is_refused_by_row_before_anything_is_written(changes, message, tmp_path):
    path = official(tmp_path / "o.parquet", **changes)
    with pytest.raises(InputError, match=message):
        convert_official(path, tmp_path / "c", vocabulary_size=200, encode_prompt=encode)
    assert not (tmp_path / "c").exists()


def test_prompts_without_a_tokenizer_a_wrong_file_and_an_empty_one_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"row 0 has no metadata.prompt_tokens"):
        convert_official(official(tmp_path / "o.parquet"), tmp_path / "c", vocabulary_size=200)
    (tmp_path / "text.parquet").write_text("no parquet")
    with pytest.raises(InputError, match="cannot be read as Parquet"):
        convert_official(tmp_path / "text.parquet", tmp_path / "c", vocabulary_size=200)
    with pytest.raises(InputError, match="cannot be read as Parquet"):
        convert_official(tmp_path / "nowhere.parquet", tmp_path / "c", vocabulary_size=200)
    pq.write_table(pa.table({"prompt": ["a"]}), tmp_path / "bare.parquet")
    with pytest.raises(InputError, match="has no column 'metadata'"):
        convert_official(tmp_path / "bare.parquet", tmp_path / "c", vocabulary_size=200)
    empty = {
        "response_tokens": pa.array([[]] * 4, pa.list_(pa.int64())),
        "teacher_log_probs": pa.array([[]] * 4, pa.list_(pa.float64())),
        "loss_mask": None,
    }
    path = official(tmp_path / "o.parquet", **empty)
    with pytest.raises(InputError, match="nothing can be imported"):
        convert_official(path, tmp_path / "c", vocabulary_size=200, encode_prompt=encode)


def test_an_exported_dataset_has_rollouts_and_signals_in_plain_nested_lists(tmp_path):
    signals = {"teacher": {}, "adaptive": {"min_probability": 0.1, "top_k": 9}, "sampled": {"top_k": 0}}
    cache, rollouts, scores = make_cache(tmp_path / "c", signals=signals)
    files = export_dataset(cache, tmp_path / "d")
    assert [path.relative_to(tmp_path / "d").as_posix() for path in files] == [
        "data/part-00000.parquet",
        "data/part-00001.parquet",
    ]
    for shard, path in enumerate(files):
        rows = pq.read_table(path).to_pylist()
        for number, row in enumerate(rows):
            wanted = rollouts[shard][number]
            assert row["rollout_id"] == wanted.rollout_id
            assert row["response_ids"] == wanted.response_ids.tolist()
            for name in signals:
                score = scores[name][shard][number]
                assert row[f"{name}_logprobs"] == score.logprobs.tolist()
                assert [len(entry) for entry in row[f"{name}_topk_ids"]] == score.topk_counts.tolist()
                assert list(chain(*row[f"{name}_topk_ids"])) == score.topk_ids.tolist()
                assert list(chain(*row[f"{name}_topk_logprobs"])) == pytest.approx(
                    score.topk_logprobs, rel=2**-11
                )


def test_an_exported_dataset_has_plain_types_and_a_card_that_names_its_files(tmp_path):
    cache, _, _ = make_cache(tmp_path / "c")
    schema = pq.read_schema(export_dataset(cache, tmp_path / "d")[0])
    assert schema.field("teacher_topk_ids").type.value_type.value_type == pa.int32()
    assert schema.field("teacher_topk_logprobs").type.value_type.value_type == pa.float32()
    assert not any(pa.types.is_float16(kind) or pa.types.is_dictionary(kind) for kind in schema.types)
    card = (tmp_path / "d" / "README.md").read_text()
    assert card.startswith("---\nconfigs:\n- config_name: default\n  data_files: data/*.parquet\n---\n")
    assert "5 rollouts, 30 response tokens" in card
    assert "`teacher_topk_ids`" in card
