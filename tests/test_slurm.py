"""The launchers: under a real Slurm of two nodes (tests/slurm.py), and without one."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import slurm
from conftest import ENCODER, ROOT, TINY, cut_sample, read_scalars, write_model

LAUNCHERS = {"run_baseline.sh": "baseline.py", "run_ddp.sh": "distributed.py"}
CHOICES = ["PYTHON", "TRAIN_PYTHON", "PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "MASTER_ADDR", "MASTER_PORT"]
CHOICES += ["OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES"]

# Stands for Python: says how it was called, and where. What is not here it takes from its environment: CHECK, the exit
# status of the launchers' own questions; PREPARE, that of --prepare; TRAIN, a command in place of the training.
STUB = r"""#!/bin/bash
if [[ $1 == -c ]]; then
    [[ $2 != *device_count* ]] || echo "${GPUS:-2}"
    exit "${CHECK:-0}"
fi
echo "called: $* | ${0##*/} node=${SLURMD_NODENAME:-} gpus=${CUDA_VISIBLE_DEVICES:-} threads=${OMP_NUM_THREADS:-}"
if [[ $* == "-m venv "* ]]; then
    rm -rf "${!#}"
    mkdir -p "${!#}/bin"
    cp "$0" "${!#}/bin/python"
    sleep "${INSTALLING:-0}"
fi
[[ $* != *" --prepare"* ]] || exit "${PREPARE:-0}"
[[ "$* " != *.py\ * ]] || ${TRAIN:-true}
"""


def copy_project(directory):
    """Copy what the launchers and scripts need into the directory; return it."""
    directory.mkdir(parents=True)
    for name in (*LAUNCHERS, *LAUNCHERS.values(), "requirements.txt"):
        shutil.copy(ROOT / name, directory)
    shutil.copytree(ROOT / "sample", directory / "sample")
    return directory


def write_stub(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(STUB)
    path.chmod(0o755)
    return path


def mark_complete(directory):
    """Have the launchers take what is in .venv for complete."""
    wanted = "".join((directory / name).read_text() for name in ("requirements.txt", "sample/requirements.txt"))
    (directory / ".venv/installed-requirements.txt").write_text(f"{wanted}# index: \n")


def without_choices():
    """Return the environment without what the launchers go by."""
    return {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("SLURM", "SBATCH")) and name not in CHOICES
    }


# with Slurm -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def environment():
    """Boot the cluster; give the environment for Slurm's commands."""
    reason = slurm.missing()
    if reason:
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(reason)
    # It shuts down when its standard input ends: at the end of these tests, or of this process, however it ends.
    cluster = subprocess.Popen(
        [sys.executable, slurm.__file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,  # Ctrl-C ends the tests, and they end the cluster
    )
    try:
        booted = cluster.stdout.readline()
        assert booted, "the cluster did not boot"
        yield without_choices() | json.loads(booted)
    finally:
        cluster.stdin.close()
        assert cluster.wait(timeout=90) == 0


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """Return a copy of the project, in a path with a space, with this interpreter's environment as .venv."""
    directory = copy_project(tmp_path_factory.mktemp("slurm") / "the project")
    (directory / ".venv").mkdir()
    for entry in Path(sys.prefix).iterdir():
        if entry.name != "installed-requirements.txt":
            (directory / ".venv" / entry.name).symlink_to(entry)
    mark_complete(directory)
    return directory


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """Return a copy of the project whose .venv is the stub: real jobs that train nothing."""
    directory = copy_project(tmp_path_factory.mktemp("slurm") / "quick project")
    write_stub(directory / ".venv/bin/python")
    mark_complete(directory)
    return directory


@pytest.fixture(scope="module")
def submit(environment):
    """Return a function that runs sbatch in a directory and gives the job's number."""

    def submit(directory, *arguments, stdin=subprocess.DEVNULL, **variables):
        directory.mkdir(exist_ok=True)
        command = ["timeout", "60", "sbatch", "--parsable", *map(str, arguments)]
        streams = {"stdin": stdin, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        run = subprocess.run(command, cwd=directory, env=environment | variables, text=True, **streams)
        assert run.returncode == 0, run.stderr
        return run.stdout.strip()

    return submit


@pytest.fixture(scope="module")
def show(environment):
    """Return a function that gives a job's fields from Slurm."""

    def show(number):
        command = ["scontrol", "--oneliner", "show", "job", number]
        output = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=True).stdout
        return dict(field.partition("=")[::2] for field in output.split() if "=" in field)

    return show


@pytest.fixture(scope="module")
def finish(show):
    """Return a function that waits for a job's end and gives its state, exit status, output and record."""

    def finish(directory, number, record=None):
        active = {"PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "REQUEUED"}
        slurm.wait_until(lambda: show(number)["JobState"] not in active, 900, f"the end of job {number}")
        fields = show(number)
        name = f"{fields['JobName']}-{fields['JobId']}"
        record = directory / (record or f"results/{name}.json")
        return SimpleNamespace(
            number=fields["JobId"],
            fields=fields,
            state=fields["JobState"],
            exit_code=fields["ExitCode"],
            output=(directory / f"{name}.out").read_text(),
            outputs=record.parent.parent,
            run=record.stem,
            record=json.loads(record.read_text()) if record.exists() else None,
        )

    return finish


def calls(output):
    """Return [(arguments, {variable: value})] of the stub's calls, in the order of the nodes."""
    found = [line.split(" | ") for line in re.findall("^called: (.*)", output, re.MULTILINE)]
    return [(arguments, dict(re.findall(r"(\w+)=(\S*)", where))) for arguments, where in found]


def workers(output):
    """Return {node: number of workers} of the stub's calls as torchrun."""
    starts = [call for call in calls(output) if call[0].startswith("-m torch.distributed.run ")]
    return {where["node"]: int(re.search(r"--nproc-per-node=(\d+)", arguments)[1]) for arguments, where in starts}


@pytest.fixture(scope="module")
def stalled(quick, submit):
    """Submit, before all others, jobs that are looked at last: Slurm looks at the time only every half minute.

    Of the array, the first task ends at once; the second, whose job id is the array's, stands still like the other job.
    """
    (quick / "stall").write_text('[ "$SLURM_ARRAY_TASK_ID" = 1 ] || exec sleep 3600\n')
    return {
        option: submit(quick, "--time=1", option, "run_baseline.sh", "--epochs", "2 3", TRAIN="sh stall")
        for option in ("--array=1-2", "--no-requeue")
    }


@pytest.fixture(scope="module")
def jobs(project, submit, finish, stalled):
    """Run one baseline and three data-parallel jobs of equal work, all at once."""
    data = project.parent / "some data"
    data.mkdir()
    train, dev = (cut_sample(split, 40, data / f"{split}.json") for split in ("train", "dev"))
    work = ["--model", ENCODER, "--train-file", train, "--dev-file", dev, "--device", "cpu", "--threads", "1"]
    work += ["--epochs", "1", "--max-steps", "3", "--batch-size", "12", "--dropout", "0"]
    elsewhere = project.parent / "another directory"
    submitted = {
        "baseline": (project, ["run_baseline.sh", *work]),
        "2x2": (elsewhere, [project / "run_ddp.sh", *work]),
        "2+1": (elsewhere, ["--gres=none", "--gpus=a100:3", "../the project/run_ddp.sh", *work, "--run-name", "mine"]),
        "1x2": (project, ["--nodes=1", "run_ddp.sh", *work, "--output-dir=my output", "--run-name=mine"]),
    }
    records = {"2+1": "results/mine.json", "1x2": "my output/results/mine.json"}
    numbers = {name: submit(directory, *arguments) for name, (directory, arguments) in submitted.items()}
    return {name: finish(submitted[name][0], number, records.get(name)) for name, number in numbers.items()}


@pytest.mark.parametrize(
    ("name", "nodes", "world_size"), [("baseline", 1, 1), ("1x2", 1, 2), ("2+1", 2, 3), ("2x2", 2, 4)]
)
def test_job(jobs, name, nodes, world_size):
    job = jobs[name]
    assert (job.state, job.exit_code) == ("COMPLETED", "0:0"), job.output
    assert job.record["workers"] == {"world_size": world_size, "nodes": nodes, "threads": 1}
    assert job.record["environment"]["slurm_job_id"] == job.number
    assert len(job.record["environment"]["hosts"]) == nodes
    assert set(job.record["environment"]["hosts"]) <= set(slurm.NODES)
    assert re.match(rf"job {job.number} started 20\d\d-\d\d-\d\dT\d\d:\d\d:\d\dZ on n", job.output)
    assert "\r" not in job.output and "Traceback" not in job.output
    assert len(re.findall("^step 3/3 ", job.output, re.MULTILINE)) == 1


def test_losses_are_equal(jobs):
    losses = {name: read_scalars(job.outputs / "logs" / job.run)["loss/train"] for name, job in jobs.items()}
    assert list(losses["baseline"]) == [1, 2, 3]
    for name, job in jobs.items():
        assert losses[name] == pytest.approx(losses["baseline"], rel=1e-4), name
        expected = jobs["baseline"].record["quality"]["train_loss"]
        assert job.record["quality"]["train_loss"] == pytest.approx(expected, rel=1e-4), name


def test_two_jobs_at_once_on_the_same_nodes(jobs):
    one, other = jobs["2x2"].fields, jobs["2+1"].fields
    assert one["NodeList"] == other["NodeList"] == "n[1-2]"
    assert max(one["StartTime"], other["StartTime"]) < min(one["EndTime"], other["EndTime"])


def test_wrong_argument_ends_the_job_in_one_line(project, submit, finish):
    numbers = {launcher: submit(project, launcher, "--sample", "--epochs", "none") for launcher in LAUNCHERS}
    for launcher, number in numbers.items():
        job = finish(project, number)
        assert (job.state, job.exit_code) == ("FAILED", "2:0"), job.output
        head, error, *rest = job.output.splitlines()
        assert head.startswith(f"job {number} started")
        assert error.startswith(f"{LAUNCHERS[launcher]}: error: ") and "--epochs" in error
        assert all(line.startswith("srun: ") for line in rest)


@pytest.fixture(scope="module")
def small_work(project):
    """Return arguments for some dozens of quick steps."""
    directory = project.parent / "small"
    directory.mkdir()
    files = [cut_sample(split, 60, directory / f"{split}.json") for split in ("train", "dev")]
    work = ["--model", write_model(directory / "model", **TINY), "--random-init", "--train-file", files[0]]
    return [*work, "--dev-file", files[1], "--batch-size", 12, "--epochs", 30, "--threads", 1, "--device", "cpu"]


@pytest.fixture(scope="module")
def train_some_steps(submit):
    """Return a function that submits jobs at once, and gives them when their training is stopped after some steps."""

    def train_some_steps(directory, commands):
        jobs = {}
        for name, command in commands.items():
            number, launcher = submit(directory, *command), next(word for word in command if word in LAUNCHERS)
            output = directory / f"{Path(LAUNCHERS[launcher]).stem}-{number}.out"
            pattern = re.compile(rf"[^\0]*python[^\0]*\0(-u\0)?[^\0]*/{LAUNCHERS[launcher]}\0")
            jobs[name] = SimpleNamespace(number=number, output=output, pattern=pattern, processes={})

        def all_stopped():
            for job in jobs.values():
                if not job.processes and job.output.exists() and "\nstep " in job.output.read_text():
                    job.processes = slurm.processes("SLURM_JOB_ID", job.number, job.pattern)
                    signal_all(job.processes, signal.SIGSTOP)
            return all(job.processes for job in jobs.values())

        slurm.wait_until(all_stopped, 600, f"the first steps of {list(commands)}")
        return jobs

    return train_some_steps


@pytest.fixture(scope="module")
def control(environment):
    """Return a function that runs one of Slurm's commands."""

    def control(*command):
        subprocess.run(command, env=environment, check=True, capture_output=True, timeout=60)

    return control


def signal_all(processes, number):
    for process in processes:
        os.kill(process, number)


def check_resumed(job):
    assert job.state == "COMPLETED", job.output
    assert job.fields["Restarts"] == "1" and job.record["resumed"] == 1
    last = job.record["settings"]["steps"]
    assert list(read_scalars(job.outputs / "logs" / job.run)["loss/train"]) == list(range(1, last + 1))
    assert job.output.count("resuming after step") == 1 and job.output.count(f"job {job.number} started") == 2


def test_warned_before_its_time_is_over_a_job_goes_on_later(
    project, train_some_steps, finish, show, control, small_work
):
    """Slurm itself warns: the time limit is lowered while the training stands still."""
    commands = {"baseline": ["run_baseline.sh"], "ddp": ["--gres=gpu:1", "run_ddp.sh"]}
    jobs = train_some_steps(project, {name: [*command, *small_work] for name, command in commands.items()}).values()
    for job in jobs:
        hours, minutes, _ = show(job.number)["RunTime"].split(":")
        control("scontrol", "update", f"JobId={job.number}", f"TimeLimit={int(hours) * 60 + int(minutes) + 2}")
    for job in jobs:
        slurm.wait_until(lambda job=job: "CANCELLED AT" in job.output.read_text(), 300, f"the warning of {job.number}")
        signal_all(job.processes, signal.SIGCONT)
    for job in jobs:
        slurm.wait_until(lambda job=job: show(job.number)["Restarts"] == "1", 300, f"the restart of {job.number}")
        control("scontrol", "update", f"JobId={job.number}", "TimeLimit=120")
    for job in jobs:
        finished = finish(project, job.number)
        check_resumed(finished)
        assert finished.output.count("stopped as asked after step") == 1


def test_a_killed_rank_ends_the_job(project, train_some_steps, finish, small_work):
    job = train_some_steps(project, {"killed": ["--gres=gpu:1", "run_ddp.sh", *small_work]})["killed"]
    ranks = {of["SLURMD_NODENAME"]: process for process, of in job.processes.items()}
    assert sorted(ranks) == slurm.NODES
    os.kill(ranks["n2"], signal.SIGKILL)
    os.kill(ranks["n1"], signal.SIGCONT)
    ended = finish(project, job.number)
    assert ended.state == "FAILED" and ended.fields["Restarts"] == "0" and ended.record is None, ended.output
    slurm.wait_until(lambda: not slurm.processes("SLURM_JOB_ID", job.number), 60, "the end of the job's processes")


def test_cancelled_requeued_and_on_a_lost_node(project, train_some_steps, finish, control, small_work, environment):
    """Three jobs at once: one is cancelled, one queued again from outside, one loses its node, the daemon too."""
    options = {"cancelled": [], "requeued": [], "lost": ["--checkpoint-every", 2]}
    commands = {name: ["run_baseline.sh", *small_work, *option] for name, option in options.items()}
    jobs = train_some_steps(project, commands)
    control("scancel", jobs["cancelled"].number)
    control("scontrol", "requeue", jobs["requeued"].number)
    for name in "cancelled", "requeued":
        signal_all(jobs[name].processes, signal.SIGCONT)
    ended = finish(project, jobs["cancelled"].number)
    assert ended.state == "CANCELLED" and ended.fields["Restarts"] == "0" and ended.record is None
    assert (project / f"checkpoints/{ended.run}/last.pt").exists()
    check_resumed(finish(project, jobs["requeued"].number))

    number, (of,) = jobs["lost"].number, jobs["lost"].processes.values()
    daemon = shutil.which("slurmd", path=slurm.SEARCH_PATH)
    for pattern in rf"{daemon}\0-D\0-N\0{of['SLURMD_NODENAME']}\0", rf"slurmstepd: \[{number}\.":
        signal_all(slurm.processes("SLURM_CONF", environment["SLURM_CONF"], re.compile(pattern)), signal.SIGKILL)
    signal_all(slurm.processes("SLURM_JOB_ID", number), signal.SIGKILL)
    control("scontrol", "update", f"NodeName={of['SLURMD_NODENAME']}", "State=DOWN", "Reason=test")
    try:
        job = finish(project, number)
    finally:
        streams = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
        subprocess.Popen([daemon, "-D", "-N", of["SLURMD_NODENAME"]], env=environment, **streams)
        control("scontrol", "update", f"NodeName={of['SLURMD_NODENAME']}", "State=RESUME")
    check_resumed(job)
    assert job.record["environment"]["hosts"] == [node for node in slurm.NODES if node != of["SLURMD_NODENAME"]]


# with Slurm, without training: the stub for Python --------------------------------------------------------------------


@pytest.fixture(scope="module")
def started(quick, submit, finish):
    """Run jobs with all kinds of sbatch's options at once; return {name: job}."""
    elsewhere = quick.parent / "elsewhere"
    elsewhere.mkdir()
    for name in "run_ddp.sh", "run_baseline.sh":
        (elsewhere / f"link-{name}").symlink_to(quick / name)
    ddp = {
        "head": [],
        "nothing exported": ["--export=NONE"],
        "uneven": ["--gres=none", "--gpus=a100:3"],
        "no GPUs": ["--gres=none"],
        "typed": ["--gres=gpu:a100:1"],
        "typed per node": ["--gres=none", "--gpus-per-node=a100:4"],
        "GPUs of the job": ["--gpus=4"],
        "memory per CPU": ["--mem-per-cpu=1G"],
        "CPUs of the node": ["--cpus-per-task=5"],
        "whole nodes": ["--exclusive"],
        "another directory": [f"--chdir={elsewhere}", f"--output={quick}/%x-%j.out"],
    }
    numbers = {name: (quick, submit(quick, *options, "run_ddp.sh", "two words")) for name, options in ddp.items()}
    numbers["array 1"] = (
        quick,
        submit(quick, "--array=1-2", "--gres=gpu:a100:1", "run_baseline.sh", "two words") + "_1",
    )
    numbers["array 2"] = (quick, numbers["array 1"][1][:-1] + "2")
    numbers["link"] = (elsewhere, submit(elsewhere, "--job-name=distributed", "link-run_ddp.sh", "two words"))
    for name, directory in ("standard input", quick), ("standard input elsewhere", elsewhere):
        with open(quick / "run_baseline.sh") as script:
            numbers[name] = (directory, submit(directory, stdin=script))
    return {name: finish(*where) for name, where in numbers.items()}


@pytest.mark.parametrize(
    ("name", "expected", "threads"),
    [
        ("head", {"n1": 2, "n2": 2}, {"8"}),
        ("nothing exported", {"n1": 2, "n2": 2}, {"8"}),
        ("uneven", {"n1": 2, "n2": 1}, {"8", "16"}),
        ("no GPUs", {"n1": 2, "n2": 2}, {"8"}),
        ("typed", {"n1": 1, "n2": 1}, {"16"}),
        ("typed per node", {"n1": 4, "n2": 4}, {"4"}),
        ("GPUs of the job", {"n1": 2, "n2": 2}, {"8"}),
        ("memory per CPU", {"n1": 2, "n2": 2}, {"8"}),
        ("CPUs of the node", {"n1": 2, "n2": 2}, {"2"}),
        ("whole nodes", {"n1": 2, "n2": 2}, {"32"}),
        ("another directory", {"n1": 2, "n2": 2}, {"8"}),
        ("link", {"n1": 2, "n2": 2}, {"8"}),
    ],
)
def test_a_worker_for_each_gpu(started, quick, name, expected, threads):
    job = started[name]
    assert (job.state, job.exit_code) == ("COMPLETED", "0:0"), job.output
    (prepared, _), *starts = calls(job.output)
    assert prepared == f"{quick}/distributed.py --prepare two words"
    assert workers(job.output) == expected
    assert {where["threads"] for _, where in starts} == threads
    for arguments, where in starts:
        count, rank = expected[where["node"]], slurm.NODES.index(where["node"])
        assert len(where["gpus"].split(",")) == count or name == "no GPUs"
        assert f" --nnodes=2 --node-rank={rank} --rdzv-conf=timeout=300 --nproc-per-node={count} " in arguments
        assert arguments.endswith(
            f" --master-addr=n1 --master-port={10000 + int(job.number)} {quick}/distributed.py two words"
        )


def test_other_ways_to_submit_the_baseline(started, quick):
    for name, arguments in ("array 1", " two words"), ("array 2", " two words"), ("standard input", ""):
        job = started[name]
        assert (job.state, job.exit_code) == ("COMPLETED", "0:0"), job.output
        ((call, where),) = calls(job.output)
        assert call == f"{quick}/baseline.py{arguments}"
        assert where["node"] in slurm.NODES and len(where["gpus"]) == 1 and where["threads"] == "8"
    job = started["standard input elsewhere"]
    assert (job.state, job.exit_code) == ("FAILED", "2:0")
    assert re.fullmatch(r"run_baseline.sh: error: \S* is not the project: .*\n", job.output)


@pytest.mark.parametrize("launcher", LAUNCHERS)
@pytest.mark.parametrize("option", ["--cpus-per-gpu=4", "--gpus-per-node=a100:4", "--gpus=3"])
def test_what_sbatch_itself_refuses(quick, environment, launcher, option):
    command = ["timeout", "60", "sbatch", option, launcher]
    run = subprocess.run(command, cwd=quick, env=environment, capture_output=True, text=True)
    assert run.returncode == 1 and run.stderr.startswith("sbatch: error: ") and run.stderr.count("\n") <= 2


def test_what_cannot_work_ends_the_job_in_one_line(quick, tmp_path, submit, finish):
    bare = copy_project(tmp_path / "bare")
    with socket.create_server(("localhost", 0)) as server:
        port = str(server.getsockname()[1])
        jobs = {
            "use --gres=gpu:4": (quick, submit(quick, "--gpus-per-node=4", "run_baseline.sh")),
            "n2: nowhere.invalid does not resolve": (quick, submit(quick, "run_ddp.sh", MASTER_ADDR="nowhere.invalid")),
            "n1: port in use": (quick, submit(quick, "run_ddp.sh", MASTER_PORT=port)),
            "first run bash run_ddp.sh --prepare on a login node": (bare, submit(bare, "run_ddp.sh")),
            "No package metadata was found for torch": (
                bare,
                submit(bare, "run_ddp.sh", TRAIN_PYTHON=bare_python(bare)),
            ),
        }
        for error, (directory, number) in jobs.items():
            job = finish(directory, number)
            assert job.state == "FAILED", job.output
            lines = [line for line in job.output.splitlines() if line.startswith("run_")]
            assert any(error in line for line in lines), job.output
            assert not workers(job.output) or "port" in error
            assert len(lines) == (2 if "nowhere" in error else 1), job.output


def bare_python(directory):
    """Write a command for this Python without its packages; return its path."""
    path = directory / "bare-python"
    path.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S "$@"\n')
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(
    ("allocate", "launcher", "expected", "threads"),
    [
        (["salloc", "--nodes=2", "--gres=gpu:2"], "run_baseline.sh", None, "1"),
        (["salloc", "--nodes=2", "--gres=gpu:2", "--ntasks-per-node=4"], "run_ddp.sh", {"n1": 2, "n2": 2}, "2"),
        (["salloc", "--nodes=2", "--gpus=a100:3", "--exclusive"], "run_ddp.sh", {"n1": 2, "n2": 1}, None),
        (["srun", "--nodes=1", "--gres=gpu:2", "--cpus-per-task=4"], "run_ddp.sh", {"n1": 2}, "2"),
        (["srun", "--nodes=1", "--gres=gpu:1", "--cpus-per-task=4"], "run_baseline.sh", None, "4"),
    ],
)
def test_in_an_allocation(quick, environment, allocate, launcher, expected, threads):
    command = ["timeout", "300", *allocate, "bash", launcher, "--seed", "1"]
    run = subprocess.run(command, cwd=quick, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    *_, (arguments, where) = calls(run.stdout)
    assert where["node"] in slurm.NODES and arguments.endswith(f"/{LAUNCHERS[launcher]} --seed 1")
    assert where["threads"] == (threads or where["threads"])
    assert expected is None or workers(run.stdout) == expected


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_ctrl_c_in_an_allocation_leaves_nothing_behind(quick, environment, launcher):
    # script gives it a terminal; Python, because a shell's background process ignores what Ctrl-C sends.
    train = f"{sys.executable} -c print('training',flush=True);__import__('time').sleep(3600)"
    command = [
        "script",
        "--quiet",
        "--flush",
        "--return",
        "--command",
        f"salloc --nodes=2 bash {launcher}",
        "/dev/null",
    ]
    streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with subprocess.Popen(command, cwd=quick, env=environment | {"TRAIN": train}, **streams) as terminal:
        output = ""
        while "training" not in output:
            line = terminal.stdout.readline().decode()
            assert line, output
            output += line
        number = re.search(r"job allocation (\d+)", output)[1]
        assert slurm.processes("SLURM_JOB_ID", number, re.compile(r"[^\0]*python[^\0]*\0-c\0"))
        terminal.stdin.write(b"\x03")
        terminal.stdin.flush()
        output += terminal.stdout.read().decode()
        assert terminal.wait(timeout=300) != 0
    slurm.wait_until(lambda: not slurm.processes("SLURM_JOB_ID", number), 60, "the end of the job's processes")


def test_three_restarts_without_a_checkpoint_end_the_job(stalled, quick, finish):
    job, other = (finish(quick, f"{stalled['--array=1-2']}_{task}") for task in (2, 1))
    assert other.state == "COMPLETED" and other.fields["Restarts"] == "0"  # it was not queued again with its array
    assert job.state == "FAILED" and job.fields["Restarts"] == "3"
    assert job.number == stalled["--array=1-2"]
    assert job.output.count(f"job {job.number} started") == 4
    assert job.output.splitlines()[-1].startswith("run_baseline.sh: error: three restarts without a later checkpoint")


def test_a_job_that_may_not_be_requeued_says_how_to_go_on(stalled, quick, finish):
    job = finish(quick, stalled["--no-requeue"])
    assert job.state == "FAILED" and job.fields["Restarts"] == "0"
    launcher = f"{quick}/run_baseline.sh".replace(" ", r"\ ")
    resume = rf"sbatch {launcher} --epochs 2\ 3 --run-name baseline-{job.number}"
    assert job.output.splitlines()[-1].endswith(f"cannot be queued again; go on with: {resume}")


# without Slurm --------------------------------------------------------------------------------------------------------


@pytest.fixture
def launch(tmp_path):
    """Return a function that runs a launcher of a copy of the project with the stub as PYTHON."""
    directory = copy_project(tmp_path / "the project")
    stub = write_stub(tmp_path / "stub")

    def start(path, *arguments, **variables):
        command = ["bash", launch.directory / path, *arguments]
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(
            command, cwd=tmp_path, env=without_choices() | {"PYTHON": str(stub)} | variables, **streams
        )

    def launch(path, *arguments, **variables):
        process = start(path, *arguments, **variables)
        output, error = process.communicate(timeout=120)
        return process.returncode, [arguments for arguments, _ in calls(output)], output + error

    launch.directory, launch.start, launch.stub = directory, start, stub
    return launch


def installation(directory):
    return [
        f"-m venv --clear {directory}/.venv",
        f"-m pip install -r {directory}/requirements.txt",
        f"-m pip install --no-deps --require-hashes -r {directory}/sample/requirements.txt",
    ]


def test_what_both_launchers_need_is_the_same_to_the_letter():
    def blocks(launcher):
        text = (ROOT / launcher).read_text()
        first = re.search(r"^# The same to the letter.*?(?=^# The launcher's own)", text, re.MULTILINE | re.DOTALL)[0]
        return first, text[text.index("\n# The same in both again") :]

    assert blocks("run_baseline.sh") == blocks("run_ddp.sh")
    limits = {"run_baseline.sh": 80, "run_ddp.sh": 100}
    for launcher, most in limits.items():
        lines = (ROOT / launcher).read_text().splitlines()
        assert len(lines) <= most and max(map(len, lines)) <= 120


def test_shellcheck():
    if not shutil.which("shellcheck"):
        pytest.skip("no shellcheck here")
    subprocess.run(["shellcheck", *LAUNCHERS], cwd=ROOT, check=True)


def test_two_starts_at_once_install_once(launch):
    starts = [launch.start(launcher, INSTALLING="1") for launcher in ("run_baseline.sh", "run_ddp.sh")]
    outputs = [start.communicate(timeout=120)[0] for start in starts]
    assert [start.returncode for start in starts] == [0, 0]
    found = [arguments for output in outputs for arguments, _ in calls(output)]
    assert [call for call in found if call.startswith("-m venv") or " pip " in call] == installation(launch.directory)


def test_complete_environment_is_left_alone(launch):
    script, install = f"{launch.directory}/baseline.py", installation(launch.directory)
    assert launch("run_baseline.sh")[:2] == (0, [*install, script])
    assert launch("run_baseline.sh", "two words", TRAIN="exit 2")[:2] == (2, [f"{script} two words"])
    with open(launch.directory / "requirements.txt", "a") as requirements:
        requirements.write("another==1\n")
    status, found, output = launch("run_baseline.sh")  # another run may be using the old one
    assert status == 2 and not found and output.startswith("run_baseline.sh: error: no .venv that fits: ")
    assert launch("run_baseline.sh", "--prepare")[:2] == (0, [*install, f"{script} --prepare"])
    assert launch("run_baseline.sh")[:2] == (0, [script])


def test_another_index_is_another_environment(launch):
    script, install = f"{launch.directory}/baseline.py", installation(launch.directory)
    old, new = "https://example.invalid/cu126", "https://example.invalid/cu128"
    assert launch("run_baseline.sh", PIP_EXTRA_INDEX_URL=old)[1] == [*install, script]
    assert launch("run_baseline.sh", PIP_EXTRA_INDEX_URL=old)[1] == [script]
    assert launch("run_baseline.sh")[1] == [script]  # a job, perhaps, that does not know of the choice
    assert launch("run_baseline.sh", PIP_EXTRA_INDEX_URL=new)[:2] == (2, [])
    assert launch("run_baseline.sh", "--prepare", PIP_EXTRA_INDEX_URL=new)[1] == [*install, f"{script} --prepare"]


def test_moved_project(launch):
    assert launch("run_ddp.sh")[0] == 0
    launch.directory = launch.directory.rename(launch.directory.parent / "moved")
    status, found, _ = launch("run_ddp.sh")
    script = f"{launch.directory}/distributed.py"
    assert status == 0
    assert found == [f"{script} --prepare", f"-m torch.distributed.run --standalone --nproc-per-node=2 {script}"]


def test_failed_installation_is_not_complete(launch):
    failing = launch.stub.with_name("failing")
    failing.write_text(f'[[ "$*" != *pip* ]] || exit 1\n{STUB}')
    failing.chmod(0o755)
    status, _, output = launch("run_baseline.sh", PYTHON=str(failing))
    assert status == 2 and output.splitlines()[-1].startswith("run_baseline.sh: error: .venv could not be set up")
    assert len(launch("run_baseline.sh")[1]) == 4


def test_old_python_is_refused_before_anything_is_installed(launch):
    status, found, output = launch("run_baseline.sh", CHECK="1")
    assert status == 2 and not found
    assert output == f"run_baseline.sh: error: {launch.stub} is older than Python 3.10: set PYTHON\n"


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_python_of_ones_own_is_used_as_it_is(launch, launcher):
    own = launch.directory.parent / "own python"
    shutil.copy(launch.stub, own)
    status, found, _ = launch(launcher, "--epochs", "1", TRAIN_PYTHON=str(own), PYTHON="/nowhere")
    assert status == 0 and not (launch.directory / ".venv").exists()
    assert found[-1].endswith(f"{launch.directory}/{LAUNCHERS[launcher]} --epochs 1")

    for python, error in (
        (bare_python(own.parent), "No package metadata was found for torch"),
        ("/nowhere", "No such file"),
    ):
        status, found, output = launch(launcher, TRAIN_PYTHON=python)
        assert status == 2 and not found
        assert output.startswith(f"{launcher}: error: TRAIN_PYTHON={python}: ") and error in output
        assert output.count("\n") == 1


def test_linked_and_copied_launchers(launch):
    link, copy = launch.directory.parent / "link.sh", launch.directory.parent / "run_ddp.sh"
    link.symlink_to(launch.directory / "run_baseline.sh")
    assert launch(link)[:2] == (0, [*installation(launch.directory), f"{launch.directory}/baseline.py"])
    shutil.copy(launch.directory / "run_ddp.sh", copy)
    status, found, output = launch(copy)
    assert status == 2 and not found
    assert output == f"run_ddp.sh: error: {copy.parent} is not the project: submit run_ddp.sh from its directory\n"


def test_ddp_on_this_machine(launch):
    script, cpus = f"{launch.directory}/distributed.py", len(os.sched_getaffinity(0))
    torchrun = "-m torch.distributed.run --standalone"
    launch("run_ddp.sh", "--prepare")
    start = launch.start("run_ddp.sh", "--epochs", "1", OMP_NUM_THREADS="7")
    (prepared, _), (started, where) = calls(start.communicate(timeout=120)[0])
    assert prepared == f"{script} --prepare --epochs 1"
    assert started == f"{torchrun} --nproc-per-node=2 {script} --epochs 1"
    assert where["threads"] == str(max(1, cpus // 2))

    status, found, _ = launch("run_ddp.sh", GPUS="3", TRAIN="exit 3")
    assert status == 3 and found[-1] == f"{torchrun} --nproc-per-node=3 {script}"
    assert launch("run_ddp.sh", PREPARE="2")[:2] == (2, [f"{script} --prepare"])
    for alone in "--report", "--help", "--prepare":
        assert launch("run_ddp.sh", "--output-dir", "x", alone)[:2] == (0, [f"{script} --output-dir x {alone}"])
