"""The launchers: under a real Slurm of two nodes (tests/slurm.py), and without one."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import slurm
from conftest import ENCODER, ROOT, TINY, cut_sample, read_scalars, write_model

MARK = "installed-requirements.txt"  # in .venv, written by run_baseline.sh
RANK_LINE = r"^rank (\d+) of (\d+): host (\S+), cpu$"


def copy_project(directory):
    """Copy what the launchers and scripts need into the directory; return it."""
    directory.mkdir()
    for name in ("baseline.py", "distributed.py", "run_baseline.sh", "run_ddp.sh", "requirements.txt"):
        shutil.copy(ROOT / name, directory)
    shutil.copytree(ROOT / "sample", directory / "sample")
    return directory


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
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH"))}
        yield clean | json.loads(booted)
    finally:
        cluster.stdin.close()
        assert cluster.wait(timeout=90) == 0


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """Return a committed copy of the project, in a path with a space, with this interpreter's environment as .venv."""
    directory = copy_project(tmp_path_factory.mktemp("slurm") / "the project")
    venv = directory / ".venv"
    venv.mkdir()
    for entry in Path(sys.prefix).iterdir():
        if entry.name != MARK:
            (venv / entry.name).symlink_to(entry)
    (venv / MARK).write_text("".join((directory / name / "requirements.txt").read_text() for name in ("", "sample")))
    (directory / ".gitignore").write_text("*\n!*.py\n")
    git = ["git", "-C", directory, "-c", "user.name=test", "-c", "user.email=test@localhost"]
    for command in ["init"], ["add", "."], ["commit", "--message=test"]:
        subprocess.run(git + command, check=True, capture_output=True)
    return directory


@pytest.fixture(scope="module")
def submit(environment):
    """Return a function that runs sbatch in a directory and gives the job's number."""

    def submit(directory, *arguments):
        directory.mkdir(exist_ok=True)
        command = ["timeout", "30", "sbatch", "--parsable", *map(str, arguments)]
        run = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        return run.stdout.strip()

    return submit


@pytest.fixture(scope="module")
def finish(environment):
    """Return a function that waits for a job's end and gives its fields from Slurm, its output and its record."""

    def show(number):
        command = ["scontrol", "--oneliner", "show", "job", number]
        output = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30, check=True).stdout
        return dict(field.partition("=")[::2] for field in output.split() if "=" in field)

    def finish(directory, number, run=None, seconds=300):
        active = {"PENDING", "CONFIGURING", "RUNNING", "COMPLETING"}
        slurm.wait_until(lambda: show(number)["JobState"] not in active, seconds, f"the end of job {number}")
        fields = show(number)
        log = directory / f"{fields['JobName']}-{number}.out"
        run = run or log.stem
        record = directory / f"results/{run}.json"
        return SimpleNamespace(
            number=number,
            run=run,
            directory=directory,
            fields=fields,
            state=fields["JobState"],
            exit_code=fields["ExitCode"],
            output=log.read_bytes().decode(),
            record=json.loads(record.read_text()) if record.exists() else None,
        )

    return finish


@pytest.fixture(scope="module")
def jobs(project, submit, finish):
    """Run one baseline and three data-parallel jobs of equal work, all at once."""
    data = project.parent / "some data"
    data.mkdir()
    train, dev = (cut_sample(split, 40, data / f"{split}.json") for split in ("train", "dev"))
    work = ["--model", ENCODER, "--train-file", train, "--dev-file", dev]
    work += ["--epochs", "1", "--max-steps", "3", "--batch-size", "10", "--dropout", "0"]
    elsewhere = project.parent / "another directory"
    submitted = {
        "baseline": (project, ["--cpus-per-task=2", "run_baseline.sh", *work]),
        # As it stands, but for the 16 threads of each worker, which are many here.
        "2x2": (elsewhere, [project / "run_ddp.sh", *work, "--threads", "1"]),
        "2x1": (
            elsewhere,
            ["--gres=gpu:a100:1", "--cpus-per-task=1", "../the project/run_ddp.sh", *work, "--run", "mine"],
        ),
        "1x2": (project, ["--nodes=1", "--gres=gpu:2", "--cpus-per-task=4", "run_ddp.sh", *work]),
    }
    numbers = {name: submit(directory, *arguments) for name, (directory, arguments) in submitted.items()}
    runs = {"2x1": "mine"}
    return {name: finish(submitted[name][0], number, runs.get(name)) for name, number in numbers.items()}


@pytest.mark.parametrize(
    ("name", "hosts", "workers", "threads"),
    [("baseline", 1, 1, 2), ("1x2", 1, 2, 2), ("2x1", 2, 2, 1), ("2x2", 2, 4, 1)],
)
def test_job(jobs, project, name, hosts, workers, threads):
    job = jobs[name]
    assert (job.state, job.exit_code) == ("COMPLETED", "0:0"), job.output
    assert job.record["workers"] == {"world_size": workers, "nodes": hosts, "threads": threads}
    assert job.record["environment"]["slurm_job_id"] == job.number
    names = job.record["environment"]["hosts"]
    assert len(names) == hosts and set(names) <= set(slurm.NODES)

    commit = subprocess.check_output(["git", "-C", project, "rev-parse", "HEAD"], text=True).strip()
    head = rf"job {job.number} started 20\d\d-\d\d-\d\dT\d\d:\d\d:\d\dZ, commit {commit}, hosts {' '.join(names)}\n"
    assert re.match(head, job.output), job.output
    assert "\r" not in job.output and "Traceback" not in job.output
    assert len(re.findall("^step 1/3 ", job.output, re.MULTILINE)) == 1
    ranks = re.findall(RANK_LINE, job.output, re.MULTILINE)
    if name != "baseline":
        # Each once, in the order of the nodes.
        per_node = workers // hosts
        assert sorted(ranks) == [(str(rank), str(workers), names[rank // per_node]) for rank in range(workers)]

    assert (job.directory / "checkpoints" / job.run).is_dir()
    if job.directory != project:
        assert not (project / "results" / f"{job.run}.json").exists()


def test_losses_are_equal(jobs):
    losses = {name: read_scalars(job.directory / "logs" / job.run)["train/loss"] for name, job in jobs.items()}
    assert list(losses["baseline"]) == [1, 2, 3]
    for name, job in jobs.items():
        assert losses[name] == pytest.approx(losses["baseline"], rel=1e-4), name
        expected = jobs["baseline"].record["quality"]["train_loss"]
        assert job.record["quality"]["train_loss"] == pytest.approx(expected, rel=1e-4), name


def test_two_jobs_at_once_on_the_same_nodes(jobs):
    one, other = jobs["2x2"].fields, jobs["2x1"].fields
    assert one["NodeList"] == other["NodeList"] == "n[1-2]"
    assert max(one["StartTime"], other["StartTime"]) < min(one["EndTime"], other["EndTime"])


@pytest.mark.parametrize("launcher", ["run_baseline.sh", "run_ddp.sh"])
def test_wrong_argument_ends_the_job_in_one_line(project, submit, finish, launcher):
    job = finish(project, submit(project, launcher, "--sample", "--epochs", "none"))
    assert (job.state, job.exit_code) == ("FAILED", "2:0")
    head, error = job.output.splitlines()
    assert head.startswith(f"job {job.number} started")
    assert error.startswith("baseline.py: error: ") and "--epochs" in error


def test_killed_rank_ends_the_job(project, submit, finish):
    number = submit(project, "--gres=gpu:1", "--cpus-per-task=1", "run_ddp.sh", "--sample", "--epochs", "3")
    output = project / f"distributed-{number}.out"

    def find_ranks():
        found = slurm.processes("SLURM_JOB_ID", number)
        return {process: of["SLURMD_NODENAME"] for process, of in found.items() if "RANK" in of}

    slurm.wait_until(lambda: output.exists() and "\nstep 2/" in output.read_text(), 180, "the second step")
    ranks = find_ranks()
    assert sorted(ranks.values()) == slurm.NODES
    os.kill(next(process for process, node in ranks.items() if node == "n2"), 9)
    job = finish(project, number, seconds=60)
    assert job.state == "FAILED", job.output
    assert job.record is None
    slurm.wait_until(lambda: not slurm.processes("SLURM_JOB_ID", number), 10, "the end of the job's processes")


def test_head_that_does_not_resolve_ends_the_job(project, submit, finish):
    slurm.set_hosts_line(False)
    try:
        job = finish(project, submit(project, "--gres=gpu:1", "--cpus-per-task=1", "run_ddp.sh", "--sample"))
    finally:
        slurm.set_hosts_line(True)
    assert (job.state, job.exit_code) == ("FAILED", "1:0")
    error = job.output.splitlines()[-1]
    assert error.startswith("run_ddp.sh: error: the nodes cannot meet at n1:")
    assert "n1: " in error and "n2: " in error and job.output.count("error") == 1


@pytest.fixture(scope="module")
def small_work(project):
    """Return arguments for a minute of quick steps."""
    directory = project.parent / "small"
    directory.mkdir()
    files = [cut_sample(split, 60, directory / f"{split}.json") for split in ("train", "dev")]
    work = ["--model", write_model(directory / "model", **TINY), "--random-init", "--train-file", files[0]]
    return [*work, "--dev-file", files[1], "--batch-size", 12, "--epochs", 60, "--threads", 1]


def train_until(submit, project, slurm_options, launcher, work):
    """Submit a job; return its number and a function that waits until its output has a pattern `count` times."""
    number = submit(project, *slurm_options, launcher, *work)
    output = project / f"{'baseline' if 'baseline' in launcher else 'distributed'}-{number}.out"

    def wait_for(pattern, count=1):
        def found():
            return output.exists() and len(re.findall(pattern, output.read_text(), re.MULTILINE)) >= count

        slurm.wait_until(found, 180, f"{pattern} in {output}")

    return number, wait_for


def check_resumed(job, most_repeated=0):
    assert job.state == "COMPLETED", job.output
    restarts = job.record["restarts"]
    assert restarts["resumed"] == 1 and restarts["steps_repeated"] <= most_repeated
    assert job.record["environment"]["slurm_restarts"] == 1
    losses = read_scalars(job.directory / "logs" / job.run)["train/loss"]
    assert list(losses) == list(range(1, job.record["work"]["steps"] + 1))
    assert job.output.count("resumed after step") == 1 and job.output.count(f"job {job.number} started") == 2


def test_warned_before_its_time_is_over_a_job_goes_on_later(project, submit, finish, environment, small_work):
    """Slurm's warning, sent by hand as #SBATCH --signal=B:USR1 has it sent: to the batch shell alone."""
    options = {"run_baseline.sh": [], "run_ddp.sh": ["--gres=gpu:1", "--cpus-per-task=1"]}
    jobs = [train_until(submit, project, options[launcher], launcher, small_work) for launcher in options]
    for number, wait_for in jobs:
        wait_for("^step ", 5)
        command = ["scancel", "--batch", "--signal=USR1", number]
        subprocess.run(command, env=environment, check=True, capture_output=True, timeout=30)
    for number, _ in jobs:
        job = finish(project, number)
        check_resumed(job)
        assert job.output.count("stopped as asked, after step") == 1


def test_requeued_and_preempted_jobs_go_on(project, submit, finish, environment, small_work):
    number, wait_for = train_until(submit, project, [], "run_baseline.sh", small_work)
    wait_for("^step ", 5)
    subprocess.run(["scontrol", "requeue", number], env=environment, check=True, timeout=30)
    check_resumed(finish(project, number))


def test_a_lost_node(project, submit, finish, environment, small_work):
    """All of a node's processes die at once, its daemon too: Slurm queues the job again, on the other node."""
    number, wait_for = train_until(submit, project, [], "run_baseline.sh", [*small_work, "--checkpoint-every", 20])
    wait_for("^step ", 12)
    (lost,) = {of["SLURMD_NODENAME"] for of in slurm.processes("SLURM_JOB_ID", number).values()}
    daemon = ["slurmd", "-D", "-N", lost]
    pattern = rf"{' '.join(daemon)}|slurmstepd: \[{number}\."
    subprocess.run(["pkill", "--signal", "KILL", "--full", pattern], check=True)
    for process in slurm.processes("SLURM_JOB_ID", number):
        os.kill(process, 9)
    try:
        job = finish(project, number)
    finally:
        command = [shutil.which(daemon[0], path=slurm.SEARCH_PATH), *daemon[1:]]
        subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    check_resumed(job, most_repeated=40)
    assert job.record["environment"]["hosts"] == [node for node in slurm.NODES if node != lost]


def test_a_cancelled_job_stays_cancelled(project, submit, finish, environment, small_work):
    number, wait_for = train_until(submit, project, [], "run_baseline.sh", small_work)
    wait_for("^step ", 5)
    subprocess.run(["scancel", number], env=environment, check=True, timeout=30)
    job = finish(project, number)
    assert job.state == "CANCELLED" and job.record is None
    assert (project / f"checkpoints/{job.run}/last.pt").exists()


# without Slurm --------------------------------------------------------------------------------------------------------

# It stands for the interpreter that makes .venv, and for what it puts there: it notes its calls.
STUB = """\
#!/bin/bash
if [[ $1 == -m && $2 == venv ]]; then
    mkdir -p "$3/bin"
    cp "$0" "$3/bin/python"
    cp "$0" "$3/bin/torchrun"
fi
echo "${0##*/} threads=${OMP_NUM_THREADS:-} $*" >> "$CALLS"
sleep 0.5
[[ $* != *pip* && $* == *--prepare* ]] && exit "${PREPARE_STATUS:-0}"
exit "${STATUS:-0}"
"""


@pytest.fixture
def launch(tmp_path):
    """Return a function that starts a launcher of a copy of the project with a stub for Python."""
    directory = copy_project(tmp_path / "the project")
    stub = tmp_path / "stub"
    stub.write_text(STUB)
    stub.chmod(0o755)
    calls = tmp_path / "calls"

    def launch(name, *arguments, **variables):
        calls.write_text("")
        environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
        for variable in ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES"):
            environment.pop(variable, None)
        environment |= {"PYTHON": str(stub), "CALLS": str(calls)} | variables
        return subprocess.Popen(["bash", directory / name, *arguments], cwd=tmp_path, env=environment)

    launch.directory = directory
    launch.calls = lambda: [line.rstrip() for line in calls.read_text().splitlines()]
    return launch


def test_two_starts_at_once_install_once(launch):
    launchers = [launch("run_baseline.sh", "--run", str(number)) for number in range(2)]
    assert [launcher.wait(timeout=60) for launcher in launchers] == [0, 0]
    calls = launch.calls()
    assert sum("-m venv" in call for call in calls) == 1
    installs = [call.split("-m pip install ")[1] for call in calls if "-m pip" in call]
    root = launch.directory
    assert installs == [
        f"-r {root}/requirements.txt",
        f"--no-deps --require-hashes -r {root}/sample/requirements.txt",
    ]
    assert sorted(calls[-2:]) == [f"python threads= {root}/baseline.py --run {number}" for number in range(2)]


def test_complete_environment_is_left_alone(launch):
    assert launch("run_baseline.sh").wait(timeout=60) == 0
    assert launch("run_baseline.sh", "two words", STATUS="2").wait(timeout=60) == 2
    assert launch.calls() == [f"python threads= {launch.directory}/baseline.py two words"]
    with open(launch.directory / "requirements.txt", "a") as requirements:
        requirements.write("# another\n")
    assert launch("run_baseline.sh").wait(timeout=60) == 0
    assert len(launch.calls()) == 4


def test_failed_installation_is_not_complete(launch, capfd):
    assert launch("run_baseline.sh", STATUS="1").wait(timeout=60) == 1
    assert capfd.readouterr().err.startswith("run_baseline.sh: error: .venv could not be set up")
    assert launch("run_baseline.sh").wait(timeout=60) == 0
    assert len(launch.calls()) == 4


def test_ddp_on_this_machine(launch):
    assert launch("run_ddp.sh", "--epochs", "1", CUDA_VISIBLE_DEVICES="").wait(timeout=60) == 0
    *_, prepared, started = launch.calls()
    script, preparation = launch.directory / "distributed.py", launch.directory / "baseline.py"
    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    assert prepared == f"python threads= {preparation} --prepare --epochs 1"
    assert started == f"torchrun threads={threads} --standalone --nproc-per-node=2 -- {script} --epochs 1"

    assert launch("run_ddp.sh", CUDA_VISIBLE_DEVICES="0,2,5", STATUS="3").wait(timeout=60) == 3
    assert "--nproc-per-node=3 " in launch.calls()[-1]
    assert launch("run_ddp.sh", PREPARE_STATUS="2").wait(timeout=60) == 2
    assert len(launch.calls()) == 1
    for alone in ("--report", "--help", "--prepare"):
        assert launch("run_ddp.sh", "--results", "x", alone).wait(timeout=60) == 0
        script = launch.directory / ("baseline.py" if alone == "--prepare" else "distributed.py")
        assert launch.calls() == [f"python threads= {script} --results x {alone}"]
