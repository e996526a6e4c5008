"""Interrupted runs: real processes, real signals; a resumed run ends with the bytes of one that was left alone."""

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

from conftest import ROOT, TINY, cut_sample, read_scalars, write_model
from ranks import Run, errors_of_ranks, run_ranks
from slurm import processes

WORLDS = [("baseline.py", None), ("distributed.py", 2)]
PATIENCE = 300  # seconds; only a broken script needs so many
# Renaming a checkpoint takes 1.5 s more.
SLOW_CHECKPOINTS = """
import os, pathlib, time

replace = os.replace

def slow_replace(source, target):
    if str(target).endswith("last.pt"):
        pathlib.Path("writing").touch()
        time.sleep(1.5)
        pathlib.Path("writing").unlink()
    replace(source, target)

os.replace = slow_replace
"""
# The kernel refuses to write files beyond a size, as it does on a full disk.
FULL_DISK = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))"


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    """A BERT of two narrow layers, with dropout: more than 100 quick steps in 12 epochs."""
    directory = tmp_path_factory.mktemp("data")
    files = cut_sample("train", 60, directory / "train.json"), cut_sample("dev", 20, directory / "dev.json")
    model = write_model(directory / "model", **TINY | {"hidden_size": 32, "intermediate_size": 64})
    arguments = ["--model", model, "--random-init", "--train-file", files[0], "--dev-file", files[1]]
    arguments += ["--threads", 1, "--batch-size", 7, "--epochs", 12, "--lr", 1e-3, "--run-name", "r"]
    return [*arguments, "--checkpoint-every", 2]


@pytest.fixture(scope="module")
def endless(arguments):
    """The arguments of a run that goes on long after a signal should have arrived."""
    return [*arguments[:-2], "--epochs", 60]


def wait_until(condition):
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def steps_done(output):
    """Return the last step that a run says it has done."""
    return max(
        (int(line.split()[1].split("/")[0]) for line in output.splitlines() if line.startswith("step ")), default=0
    )


def wait_for_step(run, step):
    """Return when the run says that it has done a step from `step` on, or has ended."""
    wait_until(lambda: steps_done(run.output) >= step or not run.is_alive())


def from_the_future(directory):
    """Name TensorBoard's files as if the clock of the node that wrote them had been ahead."""
    for number, path in enumerate(sorted(directory.glob("events.*"))):
        path.rename(path.with_name(f"events.out.tfevents.99999999{number:02}.ahead.1.0"))


def results(directory):
    """Return what a finished run leaves, apart from what tells the time."""
    scalars = read_scalars(directory / "logs/r")
    scalars.pop("speed/features_per_s")
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
            run_ranks(script, arguments[:-2], directory, world_size)
            known[script] = results(directory)
        return known[script]

    return run


def check_same(directory, expected, stopped=None):
    """Check that weights, losses and TensorBoard's series are those of the undisturbed run; return the record.

    Only the evaluation after the step at which the run was asked to stop is left out, where there would be one.
    """
    found = results(directory)
    assert found.weights == expected.weights
    assert found.quality == expected.quality
    scalars = {tag: dict(series) for tag, series in expected.scalars.items()}
    for tag in set(scalars) - {"loss/train", "lr"}:
        scalars[tag].pop(stopped, None)
    assert found.scalars == scalars
    assert list(found.scalars["loss/train"]) == list(range(1, found.record["settings"]["steps"] + 1))
    seconds = found.record["seconds"]
    assert 0 < seconds["train"] < seconds["total"]
    assert [path.name for path in (directory / "checkpoints/r").iterdir()] == ["model"]
    return found.record


@pytest.mark.parametrize(("script", "world_size"), WORLDS)
def test_killed_at_any_moment_it_ends_with_the_same_bytes(arguments, undisturbed, tmp_path, script, world_size):
    """SIGKILL at random moments, and in the midst of writing a checkpoint; in the end, no checkpoint is written."""
    chance, kills = random.Random(0), 12 if os.environ.get("SQUAD_LONG") == "1" else 2
    for number in range(kills):
        run = Run(script, arguments, tmp_path, world_size)
        wait_for_step(run, (number + chance.random()) * 60 / kills)
        time.sleep(chance.random() / 10)
        run.kill()
        assert set(run.statuses) == {-signal.SIGKILL}
    for _ in range(2):
        run = Run(script, arguments, tmp_path, world_size, before=SLOW_CHECKPOINTS)
        wait_until((tmp_path / "writing").exists)
        run.kill()
        (tmp_path / "writing").unlink()
        assert list((tmp_path / "checkpoints/r").glob(".*.partial"))
        from_the_future(tmp_path / "logs/r")
    run = run_ranks(script, arguments[:-2], tmp_path, world_size)
    assert run.output.count("resuming after step") == 1
    record = check_same(tmp_path, undisturbed(script, world_size))
    assert 2 <= record["resumed"] <= kills  # a start that was killed before it wrote a checkpoint does not count
    # Started once more, it says that it has finished, and leaves all as it is.
    before = {path: path.read_bytes() for path in tmp_path.glob("*/**/*") if path.is_file()}
    run = run_ranks(script, arguments, tmp_path, world_size)
    assert "this run is finished" in run.output and run.error == ""
    assert {path: path.read_bytes() for path in tmp_path.glob("*/**/*") if path.is_file()} == before


@pytest.mark.parametrize(("script", "world_size"), WORLDS)
def test_asked_to_stop_it_writes_a_checkpoint_and_goes_on(arguments, undisturbed, tmp_path, script, world_size):
    """SIGTERM, to the last rank alone, without --checkpoint-every: all ranks stop after the same step."""
    signals = {(world_size or 1) - 1: [TERM]}
    assert ask_to_stop(script, world_size, arguments, tmp_path, {}, signals) == BY_HAND
    assert not list((tmp_path / "results").iterdir())
    run = run_ranks(script, arguments[:-2], tmp_path, world_size)
    assert "resuming after step 3\n" in run.output
    assert check_same(tmp_path, undisturbed(script, world_size), 3)["resumed"] == 1


@pytest.mark.parametrize(("script", "world_size"), WORLDS)
def test_asked_to_stop_it_does_not_evaluate_first(endless, tmp_path, script, world_size):
    run = Run(script, [*endless, "--evaluate-every", 1], tmp_path, world_size)
    wait_for_step(run, 3)
    run.processes[-1].terminate()
    run.wait(PATIENCE)
    stopped = int(run.error.partition("stopped as asked after step ")[2].split(";")[0])
    assert f"dev set after step {stopped - 1}: " in run.output
    assert f"dev set after step {stopped}: " not in run.output
    assert (tmp_path / "checkpoints/r/last.pt").exists()


# As run_ddp.sh starts torchrun.
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--shutdown-timeout=110"]
TORCHRUN += ["--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"]


@pytest.fixture
def under_torchrun(endless, tmp_path):
    """Return a function that starts distributed.py in two ranks, waits for a step, sends a signal, and returns the
    lines of the script and the exit status; no rank may be left behind."""

    def run(send, environment=()):
        mark = {"STARTED_IN": str(tmp_path), "OMP_NUM_THREADS": "1"}  # in the environment of all processes
        command = [sys.executable, *TORCHRUN, ROOT / "distributed.py", *map(str, endless)]
        environment = {**os.environ, **mark, **dict(environment)}
        output = tmp_path / "output"
        with open(output, "w") as file:
            process = subprocess.Popen(
                command, cwd=tmp_path, env=environment, stdout=file, stderr=file, start_new_session=True
            )
        wait_until(lambda: steps_done(output.read_text()) >= 3 or process.poll() is not None)
        send(process)
        process.wait(PATIENCE)
        wait_until(lambda: not processes("STARTED_IN", str(tmp_path)))
        text = output.read_text()
        assert "[rank" not in text and 'distributed.py", line' not in text, text
        return [line for line in text.splitlines() if line.startswith("distributed.py: ")], process.returncode

    return run


def test_torchrun_passes_sigterm_on(under_torchrun, tmp_path):
    (line,), status = under_torchrun(lambda process: process.terminate())
    assert status != 0 and line.startswith("distributed.py: stopped as asked after step ")
    assert (tmp_path / "checkpoints/r/last.pt").exists() and not list((tmp_path / "results").iterdir())


def test_ctrl_c_under_torchrun(under_torchrun, tmp_path):
    """The terminal sends SIGINT to torchrun and to all ranks; torchrun passes it on once more."""
    lines, status = under_torchrun(lambda process: os.killpg(process.pid, signal.SIGINT))
    assert status != 0 and len(lines) == 1 and lines[0].startswith("distributed.py: error: interrupted")
    assert not list((tmp_path / "results").iterdir())


@pytest.mark.parametrize(("script", "world_size"), WORLDS)
def test_ctrl_c_is_one_line(endless, tmp_path, script, world_size):
    """At random moments of the training."""
    chance = random.Random(0)
    for _ in range(20 if os.environ.get("SQUAD_LONG") == "1" else 4):
        run = Run(script, [*endless, "--checkpoint-every", 2], tmp_path, world_size)
        wait_for_step(run, 1)
        time.sleep(chance.random() / 5)
        run.send(signal.SIGINT)
        run.wait(PATIENCE)
        assert run.error == f"{script}: error: interrupted without saving a checkpoint; SIGTERM saves one\n"
        assert set(run.statuses) == {130}


# queued again ---------------------------------------------------------------------------------------------------------

# In step 3, each rank that is named sends itself a signal.
SIGNAL_AT_STEP_3 = """
import os, signal, torch

steps = []
clip = torch.nn.utils.clip_grad_norm_

def watched_clip(*given):
    steps.append(1)
    if len(steps) == 3:
        for number in {signals}.get(int(os.environ.get("RANK", 0)), []):
            os.kill(os.getpid(), number)
    return clip(*given)

torch.nn.utils.clip_grad_norm_ = watched_clip
"""
USR1 = signal.SIGUSR1.value
TERM = signal.SIGTERM.value
JOBS = {
    "a job": ({"SLURM_JOB_ID": "7"}, "7"),
    "a task of an array": ({"SLURM_JOB_ID": "9", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3"}, "7_3"),
}
BY_HAND = "resume with the same command and --run-name r"


@pytest.fixture
def slurm(tmp_path):
    """Return the variables of a job whose `scontrol` notes how it is called, and what lies in the run's directory."""
    tools = tmp_path / "tools"
    tools.mkdir()
    note = 'echo "$@:" $(ls -A checkpoints/r) >> calls'
    refuse = 'test ! -e refuse || { echo "Requeue is off" >&2; exit 1; }'
    (tools / "scontrol").write_text(f"#!/bin/sh\n{note}\n{refuse}\n")
    (tools / "scontrol").chmod(0o755)
    (tools / "squeue").write_text("#!/bin/sh\ncat state\n")
    (tools / "squeue").chmod(0o755)
    (tmp_path / "state").write_text("RUNNING\n")
    return {"PATH": f"{tools}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}


def calls(directory):
    """Return how scontrol was called."""
    path = directory / "calls"
    return path.read_text().splitlines() if path.exists() else []


def ask_to_stop(script, world_size, arguments, directory, environment, signals):
    """Run until step 3, where `signals`, {rank: [number, ...]}, arrive; return what the one line says of going on."""
    before = SIGNAL_AT_STEP_3.format(signals=signals)
    run = Run(script, arguments[:-2], directory, world_size, environment, before).wait(PATIENCE)
    assert set(run.statuses) == {143} and run.error.count("\n") == 1, run.error
    said, outcome = run.error.rstrip("\n").split("; ", 1)
    assert said == f"{script}: stopped as asked after step 3"
    assert (directory / "checkpoints/r/last.pt").exists()
    return outcome


@pytest.mark.parametrize(("script", "world_size"), WORLDS)
@pytest.mark.parametrize("case", JOBS)
def test_usr1_queues_the_job_again(arguments, slurm, tmp_path, script, world_size, case):
    """Once, after the checkpoint was written; where the warning reaches all ranks as where it reaches the last only."""
    variables, job = JOBS[case]
    ranks = range(world_size or 1) if case == "a job" else [(world_size or 1) - 1]
    signals = {rank: [USR1] for rank in ranks}
    outcome = ask_to_stop(script, world_size, arguments, tmp_path, {**slurm, **variables}, signals)
    assert outcome == f"job {job} has been requeued"
    assert calls(tmp_path) == [f"requeue {job}: last.pt lock"]


@pytest.mark.parametrize(("script", "world_size"), WORLDS)
@pytest.mark.parametrize("case", ["no job", "no scontrol", "scontrol refuses"])
def test_usr1_says_how_to_go_on_where_the_job_cannot_be_queued(arguments, slurm, tmp_path, script, world_size, case):
    if case == "no job":
        del slurm["SLURM_JOB_ID"]
    if case == "no scontrol":
        (tmp_path / "tools/scontrol").unlink()
    if case == "scontrol refuses":
        (tmp_path / "refuse").touch()
    outcome = ask_to_stop(script, world_size, arguments, tmp_path, slurm, {0: [USR1]})
    assert outcome.endswith(BY_HAND)
    assert (outcome == BY_HAND) == (case == "no job")
    assert outcome.startswith("job 7 cannot be requeued (") or case == "no job"
    assert len(calls(tmp_path)) == (case == "scontrol refuses")
    # In Slurm's own words.
    assert ("(Requeue is off)" in outcome) == (case == "scontrol refuses")


@pytest.mark.parametrize(("script", "world_size"), WORLDS)
def test_nothing_is_queued_where_the_job_is_to_end(arguments, slurm, tmp_path, script, world_size):
    """SIGUSR1 to the first rank and SIGTERM to the last, in the same step; or the job was cancelled meanwhile."""
    signals = {0: [USR1], 1: [TERM]} if world_size else {0: [TERM, USR1]}
    assert ask_to_stop(script, world_size, arguments, tmp_path, slurm, signals) == BY_HAND
    assert calls(tmp_path) == []
    (tmp_path / "state").write_text("COMPLETING\n")
    shutil.rmtree(tmp_path / "checkpoints")
    assert ask_to_stop(script, world_size, arguments, tmp_path, slurm, {0: [USR1]}) == BY_HAND
    assert calls(tmp_path) == []


# While rank 0 writes the checkpoint, another signal arrives.
SIGNAL_WHILE_SAVING = """
import os

replace = os.replace

def watched_replace(source, target):
    if str(target).endswith("last.pt"):
        os.kill(os.getpid(), {number})
    replace(source, target)

os.replace = watched_replace
"""


@pytest.mark.parametrize(("script", "world_size"), WORLDS)
@pytest.mark.parametrize("number", [USR1, TERM])
def test_a_signal_while_it_saves(arguments, undisturbed, slurm, tmp_path, script, world_size, number):
    """The first warning counts: torchrun turns a second one into SIGTERM. The checkpoint is complete."""
    before = SIGNAL_AT_STEP_3.format(signals={0: [USR1]}) + SIGNAL_WHILE_SAVING.format(number=number)
    run = Run(script, arguments[:-2], tmp_path, world_size, slurm, before).wait(PATIENCE)
    assert set(run.statuses) == {143} and run.error.count("\n") == 1, run.error
    assert calls(tmp_path) == ["requeue 7: last.pt lock"]
    assert run.error.endswith("; job 7 has been requeued\n")
    run_ranks(script, arguments[:-2], tmp_path, world_size)
    assert check_same(tmp_path, undisturbed(script, world_size), 3)["resumed"] == 1


# While the last rank reads the questions, the warning arrives.
SIGNAL_WHILE_LOADING = """
import os, pathlib, signal

read_bytes = pathlib.Path.read_bytes

def watched_read_bytes(path):
    if path.name == "train.json" and os.environ.get("RANK", "1") == "1":
        os.kill(os.getpid(), signal.SIGUSR1)
    return read_bytes(path)

pathlib.Path.read_bytes = watched_read_bytes
"""


@pytest.mark.parametrize(("script", "world_size"), WORLDS)
def test_usr1_before_the_first_step_queues_nothing(arguments, slurm, tmp_path, script, world_size):
    """Else a job that is too short even to start would be queued for ever."""
    run = Run(script, arguments, tmp_path, world_size, slurm, SIGNAL_WHILE_LOADING).wait(PATIENCE)
    assert set(run.statuses) == {143}
    (error,) = errors_of_ranks(run.error, 1).values()
    assert error.startswith("told to stop before ") and "not requeued" in error and "--time" in error
    assert calls(tmp_path) == [] and not (tmp_path / "checkpoints/r/last.pt").exists()


def test_torchrun_passes_usr1_on(under_torchrun, slurm, tmp_path):
    (line,), status = under_torchrun(lambda process: process.send_signal(signal.SIGUSR1), slurm)
    assert status != 0 and line.startswith("distributed.py: stopped as asked after step ")
    assert line.endswith("; job 7 has been requeued") and calls(tmp_path) == ["requeue 7: last.pt lock"]


# checkpoints that cannot be used --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def interrupted(arguments, tmp_path_factory):
    """Return a function that gives the directory of a run that was killed after a checkpoint."""
    known = {}

    def run(script, world_size):
        if script not in known:
            directory = tmp_path_factory.mktemp("interrupted")
            run = Run(script, arguments, directory, world_size)
            wait_for_step(run, 4)
            run.kill()
            assert (directory / "checkpoints/r/last.pt").exists()
            known[script] = directory
        return known[script]

    return run


OTHER_WORK = {
    "seed": (["--seed", 7], "made with seed 42, not 7"),
    "batch size": (["--batch-size", 8], "made with batch_size 7, not 8"),
    "learning rate": (["--lr", 0.01], "made with lr 0.001, not 0.01"),
}


@pytest.mark.parametrize(("script", "world_size"), WORLDS)
@pytest.mark.parametrize("case", OTHER_WORK)
def test_other_work_is_refused(arguments, interrupted, script, world_size, case):
    more, message = OTHER_WORK[case]
    directory = interrupted(script, world_size)
    before = (directory / "checkpoints/r/last.pt").read_bytes()
    run = Run(script, [*arguments, *more], directory, world_size).wait(PATIENCE)
    errors = errors_of_ranks(run.error, world_size)
    assert run.status == 2
    assert set(errors.values()) == {f"checkpoints/r/last.pt: {message}; give another --run-name"}
    assert (directory / "checkpoints/r/last.pt").read_bytes() == before


@pytest.mark.parametrize(
    ("made_by", "world_size", "message"),
    [
        (WORLDS[0], 2, "made with script 'baseline', not 'distributed'"),
        (WORLDS[1], 3, "made with world_size 2, not 3"),
        (WORLDS[1], None, "made with script 'distributed', not 'baseline'"),
    ],
)
def test_another_script_or_world_size_is_refused(arguments, interrupted, made_by, world_size, message):
    script = "distributed.py" if world_size else "baseline.py"
    directory = interrupted(*made_by)
    run = Run(script, arguments, directory, world_size).wait(PATIENCE)
    assert run.status == 2
    assert all(message in error for error in errors_of_ranks(run.error, world_size).values())


def copy_checkpoint(interrupted, script, world_size, directory):
    shutil.copytree(interrupted(script, world_size) / "checkpoints", directory / "checkpoints")
    return directory / "checkpoints/r/last.pt"


DAMAGES = [("baseline.py", None, damage) for damage in ("cut", "changed", "other", "empty")]


@pytest.mark.parametrize(("script", "world_size", "damage"), [*DAMAGES, ("distributed.py", 2, "cut")])
def test_a_damaged_checkpoint_is_named(arguments, interrupted, tmp_path, script, world_size, damage):
    path = copy_checkpoint(interrupted, script, world_size, tmp_path)
    content = bytearray(path.read_bytes())
    if damage == "changed":
        content[len(content) // 2] ^= 255
    path.write_bytes({"cut": content[: len(content) // 2], "empty": b""}.get(damage, content))
    if damage == "other":
        torch.save({"x": torch.zeros(2)}, path)
    run = Run(script, arguments, tmp_path, world_size).wait(PATIENCE)
    assert run.status == 2
    for error in errors_of_ranks(run.error, world_size).values():
        assert error.startswith("checkpoints/r/last.pt: cannot be read: ") and "if it is damaged, remove it" in error


def test_what_is_loaded_cannot_run_code(arguments, interrupted, tmp_path):
    path = copy_checkpoint(interrupted, "baseline.py", None, tmp_path)

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "owned"),)

    torch.save({"settings": Evil()}, path)
    run = Run("baseline.py", arguments, tmp_path).wait(PATIENCE)
    assert run.status == 2 and "last.pt: cannot be read" in run.error and run.error.count("\n") == 1
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(("script", "world_size"), WORLDS)
def test_a_full_disk_keeps_the_last_checkpoint(arguments, interrupted, tmp_path, script, world_size):
    path = copy_checkpoint(interrupted, script, world_size, tmp_path)
    before = path.read_bytes()
    run = Run(script, arguments, tmp_path, world_size, before=FULL_DISK).wait(PATIENCE)
    errors = errors_of_ranks(run.error, world_size)
    assert run.statuses[0] == 1 and errors[0].startswith("checkpoints/r/last.pt: cannot be written: ")
    assert errors[0].endswith("; check the disk space; the previous file is unchanged")
    # The other ranks, which only wait until it is written, lose the first.
    assert all(error.startswith("lost the connection to another rank") for rank, error in errors.items() if rank)
    assert path.read_bytes() == before
    assert not list((tmp_path / "checkpoints/r").glob(".*")) and not (tmp_path / "results/r.json").exists()
