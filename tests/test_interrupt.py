"""Interrupted runs: real processes, real signals; a resumed run ends with the bytes of one that was left alone."""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from conftest import ROOT, TINY, cut_sample, read_scalars, run_script, start_script, write_model
from slurm import processes

WORLDS = [("baseline.py", None), ("distributed.py", 2)]
# The test's own hook: the interpreter imports a module of this name at its start. Writing a checkpoint takes 2 s more.
SLOW_CHECKPOINTS = """
import os, pathlib, time

replace = os.replace

def slow_replace(source, target):
    if str(target).endswith("last.pt"):
        pathlib.Path("writing").touch()
        time.sleep(2)
        pathlib.Path("writing").unlink()
    replace(source, target)

os.replace = slow_replace
"""


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    """A BERT of two small layers, with dropout: 120 quick steps in 12 epochs."""
    directory = tmp_path_factory.mktemp("data")
    files = cut_sample("train", 60, directory / "train.json"), cut_sample("dev", 20, directory / "dev.json")
    model = write_model(directory / "model", **TINY)
    arguments = ["--model", model, "--random-init", "--train-file", files[0], "--dev-file", files[1]]
    arguments += ["--threads", 1, "--batch-size", 7, "--epochs", 12, "--lr", 1e-3, "--run", "r"]
    return [*arguments, "--checkpoint-every", 2]


def start(script, arguments, directory, world_size, environment=()):
    """Start a script; all its processes have the directory in their environment."""
    environment = {"STARTED_IN": str(directory)} | dict(environment)
    return start_script(script, arguments, directory, world_size, environment, stderr=subprocess.STDOUT)


def kill(process, directory):
    """Kill all that was started in the directory, torchrun first."""
    for number in sorted(processes("STARTED_IN", str(directory))):
        with contextlib.suppress(ProcessLookupError):  # it ended meanwhile
            os.kill(number, signal.SIGKILL)
    process.wait()


def wait_for_step(process, step):
    """Return when the process says that it has done a step from `step` on, or has ended."""
    for line in process.stdout:
        if line.startswith("step ") and int(line.split()[1].split("/")[0]) >= step:
            return


def results(directory):
    """Return what a finished run leaves, apart from what tells the time."""
    scalars = read_scalars(directory / "logs/r")
    scalars.pop("train/features_per_s")
    record = json.loads((directory / "results/r.json").read_text())
    weights = (directory / "checkpoints/r/model/model.safetensors").read_bytes()
    return SimpleNamespace(record=record, scalars=scalars, weights=weights, quality=record["quality"])


@pytest.fixture(scope="module")
def undisturbed(arguments, tmp_path_factory):
    """Return a function that gives the results of a run that nothing interrupts."""
    known = {}

    def run(script, world_size):
        if script not in known:
            directory = tmp_path_factory.mktemp("undisturbed")
            process = run_script(script, arguments, directory, world_size)
            assert process.returncode == 0, process.stderr
            known[script] = results(directory)
        return known[script]

    return run


def check_same(directory, expected):
    """Check that weights, losses and TensorBoard's series are those of the undisturbed run; return the record."""
    found = results(directory)
    assert found.weights == expected.weights
    assert found.quality == expected.quality
    assert found.scalars == expected.scalars
    assert list(found.scalars["train/loss"]) == list(range(1, found.record["work"]["steps"] + 1))
    seconds = found.record["seconds"]
    assert 0 < seconds["train"] == sum(seconds["train_epochs"]) < seconds["total"]
    assert sorted(path.name for path in (directory / "checkpoints/r").iterdir()) == ["model"]
    return found.record


@pytest.mark.parametrize(("script", "world_size"), WORLDS)
def test_killed_at_any_moment_it_ends_with_the_same_bytes(arguments, undisturbed, tmp_path, script, world_size):
    """SIGKILL at random moments, and in the midst of writing a checkpoint."""
    chance = random.Random(0)
    (tmp_path / "sitecustomize.py").write_text(SLOW_CHECKPOINTS)
    kills = 8 if os.environ.get("SQUAD_LONG") == "1" else 1
    kills += world_size is None
    for number in range(kills):
        process = start(script, arguments, tmp_path, world_size)
        wait_for_step(process, (number + chance.random()) * 80 / kills)
        time.sleep(chance.random() / 10)
        kill(process, tmp_path)
    for _ in range(2):
        process = start(script, arguments, tmp_path, world_size, {"PYTHONPATH": str(tmp_path)})
        while not (tmp_path / "writing").exists() and process.poll() is None:
            time.sleep(0.05)
        assert process.poll() is None
        kill(process, tmp_path)
        (tmp_path / "writing").unlink()
        assert list((tmp_path / "checkpoints/r").glob(".*.partial"))
    process = run_script(script, arguments, tmp_path, world_size)
    assert process.returncode == 0 and "resumed after step" in process.stdout, process.stderr
    record = check_same(tmp_path, undisturbed(script, world_size))
    assert record["restarts"]["resumed"] == kills + 2 and record["restarts"]["steps_repeated"] >= 2


@pytest.mark.parametrize(("script", "world_size"), WORLDS)
def test_asked_to_stop_it_writes_a_checkpoint_and_goes_on(arguments, undisturbed, tmp_path, script, world_size):
    """SIGTERM, to torchrun where it is there; without --checkpoint-every."""
    arguments = arguments[:-2]
    process = start(script, arguments, tmp_path, world_size)
    wait_for_step(process, 3)
    process.terminate()
    output, _ = process.communicate(timeout=60)
    assert process.returncode != 0
    stopped = [line for line in output.splitlines() if "stopped as asked, after step" in line]
    assert len(stopped) == 1 and stopped[0].startswith(f"{script}: error:")
    assert (tmp_path / "checkpoints/r/last.pt").exists() and not list((tmp_path / "results").iterdir())
    process = run_script(script, arguments, tmp_path, world_size)
    assert process.returncode == 0, process.stderr
    record = check_same(tmp_path, undisturbed(script, world_size))
    assert record["restarts"] == {"resumed": 1, "steps_repeated": 0}


@pytest.fixture(scope="module")
def interrupted(arguments, tmp_path_factory):
    """Return the directory of a baseline that was killed after a checkpoint."""
    directory = tmp_path_factory.mktemp("interrupted")
    process = start("baseline.py", arguments, directory, None)
    wait_for_step(process, 4)
    kill(process, directory)
    assert (directory / "checkpoints/r/last.pt").exists()
    return directory


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--seed", 7], "a checkpoint of other work: seed was 42 and is 7"),
        (["--batch-size", 8], "global_batch_size was 7 and is 8"),
        (["--lr", 0.01], "lr was 0.001 and is 0.01"),
    ],
)
def test_other_work_is_refused(arguments, interrupted, more, message):
    before = (interrupted / "checkpoints/r/last.pt").read_bytes()
    process = run_script("baseline.py", [*arguments, *more], interrupted)
    assert process.returncode == 2 and message in process.stderr and process.stderr.count("\n") == 1
    assert (interrupted / "checkpoints/r/last.pt").read_bytes() == before


def test_another_world_size_is_refused(arguments, interrupted):
    process = run_script("distributed.py", arguments, interrupted, 2)
    lines = [line for line in process.stderr.splitlines() if line.startswith("distributed.py")]
    assert len(lines) == 1 and "script was 'baseline' and is 'distributed'" in lines[0]


@pytest.mark.parametrize("damage", ["cut", "changed", "other", "empty"])
def test_a_damaged_checkpoint_is_named(arguments, interrupted, tmp_path, damage):
    shutil.copytree(interrupted / "checkpoints", tmp_path / "checkpoints")
    path = tmp_path / "checkpoints/r/last.pt"
    content = bytearray(path.read_bytes())
    if damage == "changed":
        content[len(content) // 2] ^= 255
    path.write_bytes({"cut": content[: len(content) // 2], "empty": b""}.get(damage, content))
    if damage == "other":
        torch.save({"x": torch.zeros(2)}, path)
    process = run_script("baseline.py", arguments, tmp_path)
    assert process.returncode == 2, process.stderr
    assert "checkpoints/r/last.pt: a damaged checkpoint" in process.stderr and "remove it" in process.stderr
    assert process.stderr.count("\n") == 1


def test_what_is_loaded_cannot_run_code(arguments, interrupted, tmp_path):
    shutil.copytree(interrupted / "checkpoints", tmp_path / "checkpoints")

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "owned"),)

    torch.save({"work": Evil()}, tmp_path / "checkpoints/r/last.pt")
    process = run_script("baseline.py", arguments, tmp_path)
    assert process.returncode == 2 and "a damaged checkpoint" in process.stderr
    assert not (tmp_path / "owned").exists()


def test_a_full_disk_keeps_the_last_checkpoint(arguments, interrupted, tmp_path):
    """The kernel refuses to write files beyond a size, as it does on a full disk."""
    shutil.copytree(interrupted / "checkpoints", tmp_path / "checkpoints")
    before = (tmp_path / "checkpoints/r/last.pt").read_bytes()
    command = 'ulimit -f 1000; exec "$@" > out 2> err'
    process = subprocess.run(
        ["bash", "-c", command, "bash", sys.executable, ROOT / "baseline.py", *map(str, arguments)], cwd=tmp_path
    )
    error = (tmp_path / "err").read_text()
    assert process.returncode == 1, error
    assert "checkpoints/r/last.pt: cannot be written; what was there before stays" in error and error.count("\n") == 1
    assert (tmp_path / "checkpoints/r/last.pt").read_bytes() == before
    assert not list((tmp_path / "checkpoints/r").glob(".*")) and not (tmp_path / "results/r.json").exists()


@pytest.mark.skipif(os.environ.get("SQUAD_LONG") != "1", reason="SQUAD_LONG=1 switches on a minute of waiting")
def test_a_rank_that_hangs_is_named(arguments, tmp_path):
    source = (ROOT / "distributed.py").read_text()
    assert source.count("timedelta(minutes=5)") == 1
    (tmp_path / "distributed.py").write_text(source.replace("timedelta(minutes=5)", "timedelta(seconds=8)"))
    process = start(tmp_path / "distributed.py", [*arguments, "--epochs", 1000], tmp_path, 2)
    wait_for_step(process, 3)
    ranks = {of.get("RANK"): number for number, of in processes("STARTED_IN", str(tmp_path)).items()}
    os.kill(ranks["1"], signal.SIGSTOP)
    output, _ = process.communicate(timeout=150)
    assert process.returncode != 0
    said = [line for line in output.splitlines() if line.startswith("distributed.py: error:")]
    assert said == ["distributed.py: error: rank 1 hangs: the others have waited for 0:00:08"]
