"""What a stage tells of its progress."""

import json

from lightopd.pipelines.shared.progress import StageProgress


def records(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_journal_begins_with_what_was_done_already(tmp_path):
    journal = tmp_path / "journal.jsonl"
    progress = StageProgress("rollout", journal, "shards", 4, 2)
    assert [(each["done"], each["made"], each["total"]) for each in records(journal)] == [(2, 0, 4)]
    for _ in range(2):
        progress.advance(10)
    assert [(each["done"], each["made"]) for each in records(journal)] == [(2, 0), (4, 2)]
