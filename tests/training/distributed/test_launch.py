"""Several devices from the command line: equal to one, and all processes end together, however one ends."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lightopd.errors import ConfigError
from lightopd.ranks import is_main
from lightopd.schemas.finetune import FinetuneConfig
from lightopd.training.checkpoints.checkpoint import newest_checkpoint
from lightopd.training.distributed.launch import must_start
from lightopd.training.measures.metrics_file import read_metrics

LIGHTOPD = str(Path(sys.executable).with_name("lightopd"))
LAUNCHED = ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
ON_TWO = ("--devices", 2, "--strategy", "ddp")


@pytest.fixture
def environment(monkeypatch):
    """Function that sets what a launcher would, and nothing else of the kind."""
    for name in [*LAUNCHED, *(name for name in os.environ if name.startswith("SLURM_"))]:
        monkeypatch.delenv(name, raising=False)
    return lambda **values: [monkeypatch.setenv(name, str(value)) for name, value in values.items()]


def asks(devices, nodes=1):
    return FinetuneConfig(devices=devices, nodes=nodes)


def test_processes_are_started_unless_somebody_else_did(environment):
    assert not must_start(asks(1))
    assert must_start(asks(2))
    environment(RANK=1, LOCAL_RANK=1, WORLD_SIZE=2)
    assert not must_start(asks(2))


def test_a_launcher_that_started_another_number_is_refused(environment):
    environment(RANK=0, LOCAL_RANK=0, WORLD_SIZE=2)
    with pytest.raises(ConfigError, match="2 processes were started, and devices is 1 on 1 nodes"):
        must_start(asks(1))
    environment(RANK=0, WORLD_SIZE=4)
    assert not must_start(asks(2, nodes=2))


def test_slurm_counts_its_tasks_but_not_in_a_shell(environment):
    environment(SLURM_NTASKS=8, SLURM_PROCID=3, SLURM_JOB_NAME="opd")
    assert not must_start(asks(8))
    assert not is_main()
    with pytest.raises(ConfigError, match="8 processes were started"):
        must_start(asks(1))
    environment(SLURM_JOB_NAME="interactive")
    assert is_main()
    assert not must_start(asks(1))


def test_a_node_must_know_where_the_others_are(environment):
    environment(MASTER_ADDR="first", MASTER_PORT=29500)
    with pytest.raises(ConfigError, match="nodes is 2, without NODE_RANK in the environment: start the"):
        must_start(asks(8, nodes=2))
    environment(NODE_RANK=1)
    assert must_start(asks(8, nodes=2))
    assert not is_main(), "the run's folder is held on the first node"


def command(world, out, *more, **settings):
    """The words of `lightopd train` on the small run."""
    chosen = {"batch_sequences": 6, "checkpoint_every": 1, "optimizer.eps": 1e-3, "optimizer.lr": 1e-4}
    sets = [word for key, value in {**chosen, **settings}.items() for word in ("--set", f"{key}={value}")]
    return ["train", "--cache", world.cache, "--student", world.sft / "student", "--out", out, *more, *sets]


def start(words, *before, **variables):
    return subprocess.Popen(
        [*map(str, (*before, LIGHTOPD, *words))],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **variables},
        start_new_session=True,
    )


def finish(words, *before):
    process = start(words, *before)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out


def wait_for_steps(process, out, count):
    end_s = time.monotonic() + 120
    while len(read_metrics(out / "metrics.csv")) < count:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end_s
        time.sleep(0.01)


def of_session(session):
    """Ids of the live processes of a session: those that one `start` is to blame for."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, its_session = path.read_text().rpartition(")")[2].split()[:4]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(its_session) == session and state != "Z":
            found.append(int(path.parent.name))
    return found


def assert_nobody_is_left(process):
    end_s = time.monotonic() + 10
    while of_session(process.pid) and time.monotonic() < end_s:
        time.sleep(0.1)
    assert of_session(process.pid) == []


def assert_equal_runs(one, other):
    left, right = ([row["loss"] for row in read_metrics(folder / "metrics.csv")] for folder in (one, other))
    assert left == pytest.approx(right, rel=1e-6, abs=1e-6)
    weights = [load_file(folder / "student" / "model.safetensors") for folder in (one, other)]
    assert weights[0].keys() == weights[1].keys()
    for name, tensor in weights[0].items():
        torch.testing.assert_close(tensor, weights[1][name], rtol=1e-6, atol=1e-6)


@pytest.fixture(scope="session")
def one_device(world, tmp_path_factory):
    """Eight steps on one device."""
    out = tmp_path_factory.mktemp("one") / "run"
    finish(command(world, out, "--steps", 8))
    return out


@pytest.mark.slow
def test_the_command_on_two_devices_gives_the_run_of_one_and_one_report(world, one_device, tmp_path):
    out = finish(command(world, tmp_path / "two", "--steps", 8, *ON_TWO))
    assert_equal_runs(one_device, tmp_path / "two")
    assert out.count("steps") == 1
    names = {path.name for path in (tmp_path / "two").iterdir()}
    assert names == {path.name for path in one_device.iterdir()}
    assert (tmp_path / "two" / "student" / "lightopd_student.json").exists()


@pytest.mark.slow
def test_torchrun_gives_the_run_of_one_and_one_report(world, one_device, tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", 2]
    out = finish(command(world, tmp_path / "two", "--steps", 8, *ON_TWO), *torchrun)
    assert_equal_runs(one_device, tmp_path / "two")
    assert out.count("steps") == 1


def slurm(rank):
    job = {"SLURM_JOB_NAME": "opd", "SLURM_JOB_ID": "1", "SLURM_NODELIST": "127.0.0.1", "SLURM_NNODES": "1"}
    tasks = {"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2"}
    return job | tasks | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank), "SLURM_NODEID": "0"}


def node(rank):
    return {"MASTER_ADDR": "127.0.0.1", "NODE_RANK": str(rank)}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variables", "shape"), [(slurm, ON_TWO), (node, ("--nodes", 2))], ids=["srun", "two nodes"]
)
def test_two_commands_on_two_places_are_one_run(world, one_device, tmp_path, variables, shape):
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = {"MASTER_PORT": str(probe.getsockname()[1])}
    words = command(world, tmp_path / "two", "--steps", 8, *shape)
    both = [start(words, **port, **variables(rank)) for rank in (0, 1)]
    ends = [process.communicate(timeout=300) for process in both]
    assert [process.returncode for process in both] == [0, 0], ends
    assert_equal_runs(one_device, tmp_path / "two")
    assert [out.count("steps") for out, _ in ends] == [1, 0]


@pytest.mark.slow
def test_a_killed_worker_ends_the_run_with_one_line_and_the_run_goes_on(world, one_device, tmp_path):
    out = tmp_path / "cut"
    process = start(command(world, out, "--steps", 2000, *ON_TWO))
    wait_for_steps(process, out, 3)
    workers = [pid for pid in of_session(process.pid) if pid != process.pid]
    assert len(workers) == 2
    began_s = time.monotonic()
    os.kill(max(workers), signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert time.monotonic() - began_s < 15
    assert process.returncode == 8
    last = err.splitlines()[-1]
    assert "was killed (SIGKILL)" in last
    assert "run the same command again" in last
    assert "Traceback" not in err
    assert [line for line in err.splitlines() if "error:" in line] == [last]
    assert_nobody_is_left(process)
    done = len(read_metrics(out / "metrics.csv")) + 2
    finish(command(world, out, "--steps", done, *ON_TWO))
    assert len(read_metrics(out / "metrics.csv")) == done
    losses = [row["loss"] for row in read_metrics(out / "metrics.csv")][:8]
    whole = [row["loss"] for row in read_metrics(one_device / "metrics.csv")][: len(losses)]
    assert losses == pytest.approx(whole, rel=1e-6, abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("to_all", [True, False])
def test_sigterm_ends_every_process_with_its_own_code(world, tmp_path, to_all):
    process = start(command(world, tmp_path / "cut", "--steps", 2000, *ON_TWO))
    wait_for_steps(process, tmp_path / "cut", 2)
    if to_all:  # as Slurm does
        os.killpg(process.pid, signal.SIGTERM)
    else:
        process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143
    assert err.splitlines()[-1].startswith("stopped by SIGTERM; run the same command again")
    assert "Traceback" not in err
    assert_nobody_is_left(process)


def test_sigterm_keeps_the_last_step_of_a_single_process(world, tmp_path):
    out = tmp_path / "cut"
    process = start(command(world, out, "--steps", 2000, checkpoint_every=1000))
    wait_for_steps(process, out, 2)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143
    assert err.splitlines()[-1].startswith("stopped by SIGTERM; run the same command again")
    rows = read_metrics(out / "metrics.csv")
    path, state = newest_checkpoint(out / "checkpoints")
    assert [state.step, len(list(path.parent.iterdir()))] == [len(rows), 1]


@pytest.mark.slow
@pytest.mark.parametrize("to_all", [True, False])
def test_ctrl_c_ends_every_process_cleanly_and_says_how_to_go_on(world, tmp_path, to_all):
    out = tmp_path / "cut"
    process = start(command(world, out, "--steps", 2000, *ON_TWO))
    wait_for_steps(process, out, 2)
    if to_all:  # as a terminal does
        os.killpg(process.pid, signal.SIGINT)
    else:
        process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.splitlines()[-1].startswith("stopped; run the same command again")
    assert "Traceback" not in err
    assert_nobody_is_left(process)


@pytest.mark.slow
def test_workers_end_when_the_process_that_started_them_is_killed(world, tmp_path):
    out = tmp_path / "cut"
    process = start(command(world, out, "--steps", 2000, *ON_TWO))
    wait_for_steps(process, out, 1)
    process.kill()
    process.communicate(timeout=60)
    assert_nobody_is_left(process)


@pytest.mark.slow
def test_an_error_in_a_worker_is_told_once(world, tmp_path):
    process = start(command(world, tmp_path / "wild", "--steps", 3, *ON_TWO, **{"optimizer.lr": 1e30}))
    _, err = process.communicate(timeout=120)
    assert process.returncode == 8
    assert err.count("is not finite; rollouts in it: ") == 1
    assert "another device" not in err
    assert "Traceback" not in err
    assert_nobody_is_left(process)
