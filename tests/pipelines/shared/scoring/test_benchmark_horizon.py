"""The benchmark of horizons measures what it says."""

from fake_engine import FakeEngine
from scripts import script


def test_bytes_and_tokens_fall_with_the_horizon():
    bench = script("benchmarks/horizon.py")
    sequences = bench.make_sequences(4, (20, 40), 32)
    assert [len(one.response_ids) for one in sequences] == [20, 27, 33, 40]
    found = bench.measure(FakeEngine(context_length=128), sequences, 8)
    assert [found[name]["tokens"] for name in ("0.1", "0.3", "1")] == [2 + 3 + 4 + 4, 6 + 9 + 10 + 12, 120]
    assert found["0.1"]["bytes"] < found["0.3"]["bytes"] < found["1"]["bytes"]
    assert found["1"]["bytes_share"] == found["1"]["cpu_seconds_share"] == 1
