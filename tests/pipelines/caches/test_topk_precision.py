"""A signal in parts of a nat, through the command: scored, verified, scored again, read in SQL."""

import json
import shutil

import pytest


@pytest.mark.parametrize("dtype", ["sixteenths", "quarters"])
def test_a_signal_in_steps_is_made_verified_rescored_and_read(dtype, world, lightopd, tmp_path):
    cache = tmp_path / "cache"
    shutil.copytree(world.cache, cache)
    settings = ("--set", f"topk_dtype={dtype}", "--top-k", 8)
    made = lightopd(
        "precompute", "--cache", cache, "--teacher", world.teacher, "--signal", "small", *settings
    )
    assert made[0] == 0, made[2]
    assert lightopd("verify", cache)[0] == 0
    code, out, err = lightopd("verify", cache, "--signal", "small", "--rescore", 4)
    assert code == 0, out + err
    step = {"sixteenths": 16, "quarters": 4}[dtype]
    whole = f"bool_and(logprob * {step} = round(logprob * {step}))"
    code, out, _ = lightopd("sql", cache, f"select {whole} w from topk where signal = 'small'", "--json")
    assert code == 0
    assert json.loads(out)["rows"] == [[True]]


def test_a_signal_in_steps_that_was_begun_goes_on_with_the_same_bytes(world, lightopd, tmp_path):
    folders = []
    for name in ("whole", "killed"):
        cache = tmp_path / name
        shutil.copytree(world.cache, cache)
        command = (
            "precompute",
            "--cache",
            cache,
            "--teacher",
            world.teacher,
            "--signal",
            "small",
            "--top-k",
            8,
        )
        assert lightopd(*command, "--set", "topk_dtype=eighths")[0] == 0
        folders.append(cache / "signals" / "small")
    for file in folders[1].glob("part-00001*"):
        file.unlink()
    command = (
        "precompute",
        "--cache",
        tmp_path / "killed",
        "--teacher",
        world.teacher,
        "--signal",
        "small",
        "--top-k",
        8,
    )
    assert lightopd(*command, "--set", "topk_dtype=eighths")[0] == 0
    assert [file.read_bytes() for file in sorted(folders[0].glob("*.parquet"))] == [
        file.read_bytes() for file in sorted(folders[1].glob("*.parquet"))
    ]
    code, _, err = lightopd(*command, "--set", "topk_dtype=quarters")
    assert code != 0
    assert "topk_dtype" in err
