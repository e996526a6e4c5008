"""The launchers: under a real Slurm of two nodes (tests/slurm.py), and without one."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

import slurm
from conftest import ENCODER, ROOT, TINY, cut_sample, read_scalars, write_model

pytestmark = pytest.mark.alone  # there can be one toy cluster
LAUNCHERS = {"run_baseline.sh": "baseline.py", "run_ddp.sh": "distributed.py"}
CHOICES = ["PYTHON", "TRAIN_PYTHON", "PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "MASTER_ADDR", "MASTER_PORT"]
CHOICES += ["OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "HF_HUB_OFFLINE"]
SIGNALS = "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
# OpenMP would bind all threads, of all workers, to the first core.
BINDING = {"OMP_PROC_BIND": "true", "OMP_PLACES": "{0}", "GOMP_CPU_AFFINITY": "0", "KMP_AFFINITY": "compact"}

# Stands for Python: says how it was called, and where. What is not here it takes from its environment: CHECK, the exit
# status of the launchers' own questions; PREPARE, that of --prepare; TRAIN, a command in place of the training.
STUB = r"""#!/bin/bash
if [[ $1 == -c && $2 != *distributed.run* ]]; then
    [[ $2 != *device_count* ]] || echo "${GPUS:-2} $(nproc)"
    exit "${CHECK:-0}"
fi
bound=${OMP_PROC_BIND:-}${OMP_PLACES:-}${GOMP_CPU_AFFINITY:-}${KMP_AFFINITY:-}
where="node=${SLURMD_NODENAME:-} gpus=${CUDA_VISIBLE_DEVICES:-} threads=${OMP_NUM_THREADS:-} bound=$bound"
[[ $2 != *distributed.run* ]] || set -- torchrun "${@:3}"
echo "called: $* | ${0##*/} $where offline=${HF_HUB_OFFLINE:-}" >&2
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
    shutil.copy(directory / "requirements.txt", directory / ".venv/installed-requirements.txt")


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
    starts = [call for call in calls(output) if call[0].startswith("torchrun ")]
    return {where["node"]: int(re.search(r"--nproc-per-node=(\d+)", arguments)[1]) for arguments, where in starts}


@pytest.fixture(scope="module")
def jobs(project, submit, finish):
    """Run one baseline and three data-parallel jobs of equal work, all at once."""
    data = project.parent / "some data"
    data.mkdir()
    train, dev = (cut_sample(split, 40, data / f"{split}.json") for split in ("train", "dev"))
    work = ["--model", ENCODER, "--train-file", train, "--dev-file", dev, "--device", "cpu", "--threads", "1"]
    work += ["--epochs", "1", "--max-steps", "3", "--batch-size", "12", "--dropout", "0"]
    elsewhere = project.parent / "another directory"
    elsewhere.mkdir()
    uneven = ["--gres=none", "--gpus=a100:3", f"--chdir={project}", "../the project/run_ddp.sh", *work]
    submitted = {  # from where, where the output goes, and how
        "baseline": (project, project, ["run_baseline.sh", *work]),
        "2x2": (project, elsewhere, [f"--chdir={elsewhere}", "run_ddp.sh", *work]),
        "2+1": (elsewhere, project, [*uneven, "--run-name", "mine"]),
        "1x2": (project, project, ["--nodes=1", "run_ddp.sh", *work, "--output-dir=my output", "--run-name=mine"]),
    }
    records = {"2+1": "results/mine.json", "1x2": "my output/results/mine.json"}
    numbers = {name: submit(directory, *arguments) for name, (directory, _, arguments) in submitted.items()}
    return {name: finish(submitted[name][1], number, records.get(name)) for name, number in numbers.items()}


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
        (error,) = [line for line in job.output.splitlines() if not line.startswith("srun: ")]
        assert error.startswith(f"{LAUNCHERS[launcher]}: error: ") and "--epochs" in error


@pytest.fixture(scope="module")
def small_work(project):
    """Return arguments for some dozens of quick steps."""
    directory = project.parent / "small"
    directory.mkdir()
    files = [cut_sample(split, 60, directory / f"{split}.json") for split in ("train", "dev")]
    work = ["--model", write_model(directory / "model", **TINY), "--random-init", "--train-file", files[0]]
    return [*work, "--dev-file", files[1], "--batch-size", 12, "--epochs", 12, "--threads", 1, "--device", "cpu"]


@pytest.fixture(scope="module")
def train_some_steps(submit, show):
    """Return a function that submits jobs at once, and gives them when their training is stopped after some steps."""

    def train_some_steps(directory, commands, variables=()):
        variables = dict(variables)
        jobs = {}
        for name, command in commands.items():
            number = submit(directory, *command, **variables.get(name, {}))
            script = LAUNCHERS[next(word for word in command if word in LAUNCHERS)]
            output = directory / f"{Path(script).stem}-{number}.out"
            jobs[name] = SimpleNamespace(number=number, output=output, pattern=running(script), processes={})

        def all_stopped():
            for job in jobs.values():
                if not job.processes and job.output.exists() and "\nstep " in job.output.read_text():
                    job.processes = slurm.processes("SLURM_JOB_ID", job.number, job.pattern)
                    signal_all(job.processes, signal.SIGSTOP)
            return all(job.processes for job in jobs.values())

        slurm.wait_until(all_stopped, 600, f"the first steps of {list(commands)}")
        return jobs

    return train_some_steps


def running(script):
    """Return a regular expression for the command line of a process that runs this script."""
    return re.compile(rf"[^\0]*python[^\0]*\0(-u\0)?[^\0]*/{script}\0")


@pytest.fixture(scope="module")
def control(environment):
    """Return a function that runs one of Slurm's commands."""

    def control(*command):
        subprocess.run(command, env=environment, check=True, capture_output=True, timeout=60)

    return control


def signal_all(processes, number):
    for process in processes:
        os.kill(process, number)


def has_signal(process, field, number):
    """Look a signal up in one of the kernel's masks: ShdPnd, sent but not taken yet, or SigCgt, with a handler."""
    mask = re.search(rf"^{field}:\s*(\w+)", Path(f"/proc/{process}/status").read_text(), re.MULTILINE)[1]
    return bool(int(mask, 16) >> (number - 1) & 1)


def is_warned(process):
    try:
        return has_signal(process, "ShdPnd", signal.SIGUSR1)
    except FileNotFoundError:  # some versions of Slurm also have a stopped process go on, and this one has ended
        return True


def check_resumed(job):
    assert job.state == "COMPLETED", job.output
    assert job.fields["Restarts"] == "1" and job.record["resumed"] == 1
    last = job.record["settings"]["steps"]
    assert list(read_scalars(job.outputs / "logs" / job.run)["loss/train"]) == list(range(1, last + 1))
    assert job.output.count("resuming after step") == 1


def weights(job):
    return (job.outputs / f"checkpoints/{job.run}/model/model.safetensors").read_bytes()


def test_warned_jobs_come_back_and_end_with_the_same_weights(
    project, train_some_steps, submit, finish, show, control, small_work
):
    """Two are warned by Slurm, since their time limit is lowered while they stand still; of an array, one by hand."""
    commands = {
        "baseline": ["run_baseline.sh"],
        "ddp": ["--gres=gpu:1", "run_ddp.sh"],
        "task": ["--array=1-2", "run_baseline.sh"],  # the last task has the number of the array
    }
    jobs = train_some_steps(project, {name: [*command, *small_work] for name, command in commands.items()})
    undisturbed = submit(project, "--gres=gpu:1", "run_ddp.sh", *small_work)
    task = jobs["task"].number + "_2"
    control("scancel", "--signal=USR1", task)
    by_slurm = [jobs["baseline"].number, jobs["ddp"].number]
    for number in by_slurm:
        hours, minutes, _ = show(number)["RunTime"].split(":")
        control("scontrol", "update", f"JobId={number}", f"TimeLimit={int(hours) * 60 + int(minutes) + 2}")

    for name, job in jobs.items():
        slurm.wait_until(lambda job=job: all(map(is_warned, job.processes)), 120, f"the warning of {name}")
        with contextlib.suppress(ProcessLookupError):
            signal_all(job.processes, signal.SIGCONT)
    for number in [*by_slurm, task]:
        slurm.wait_until(lambda number=number: show(number)["Restarts"] == "1", 120, f"the restart of {number}")
    for number in by_slurm:
        control("scontrol", "update", f"JobId={number}", "TimeLimit=120")

    expected = {
        "run_baseline.sh": finish(project, jobs["task"].number + "_1"),
        "run_ddp.sh": finish(project, undisturbed),
    }
    for number, launcher in zip([*by_slurm, task], ["run_baseline.sh", "run_ddp.sh", "run_baseline.sh"], strict=True):
        job = finish(project, number)
        check_resumed(job)
        assert job.output.count("stopped as asked after step") == 1
        assert job.output.count("has been requeued") == 1 and "Traceback" not in job.output
        reference = expected[launcher]
        assert reference.state == "COMPLETED" and reference.fields["Restarts"] == "0", reference.output
        assert weights(job) == weights(reference), number


# Renaming a checkpoint waits for a file of the test's.
SLOW_CHECKPOINTS = """
import os, time

replace = os.replace

def slow_replace(source, target):
    if str(target).endswith("last.pt"):
        print("saving", flush=True)
        while not os.path.exists("saved"):
            time.sleep(0.1)
    replace(source, target)

os.replace = slow_replace
"""


def test_warned_again_or_cancelled_while_it_saves(
    project, tmp_path, train_some_steps, finish, show, control, small_work
):
    (tmp_path / "sitecustomize.py").write_text(SLOW_CHECKPOINTS)
    # A busy Slurm takes its time; meanwhile no part of the job may end, since the others would be killed.
    (tmp_path / "scontrol").write_text(
        f'#!/bin/bash\n[[ $1 != requeue ]] || sleep 5\nexec {shutil.which("scontrol")} "$@"\n'
    )
    (tmp_path / "scontrol").chmod(0o755)
    commands = {
        "baseline": ["run_baseline.sh"],
        "ddp": ["--gres=gpu:1", "run_ddp.sh"],
        "cancelled": ["run_baseline.sh"],
    }
    variables = {"PYTHONPATH": str(tmp_path), "PATH": f"{tmp_path}:{slurm.SEARCH_PATH}"}
    commands = {name: [*command, *small_work] for name, command in commands.items()}
    jobs = train_some_steps(project, commands, dict.fromkeys(commands, variables))
    for job in jobs.values():
        control("scancel", "--signal=USR1", job.number)
        signal_all(job.processes, signal.SIGCONT)
    for name, job in jobs.items():
        slurm.wait_until(lambda job=job: "\nsaving\n" in job.output.read_text(), 60, f"the checkpoint of {name}")
        control("scancel", *([] if name == "cancelled" else ["--signal=USR1"]), job.number)
    time.sleep(2)  # until torchrun has handed the signals on
    (project / "saved").touch()
    for name in "baseline", "ddp":
        job = jobs[name]
        slurm.wait_until(lambda job=job: "\nresuming after" in job.output.read_text(), 120, f"the restart of {name}")
        assert show(job.number)["Restarts"] == "1"
        control("scancel", job.number)
    cancelled = finish(project, jobs["cancelled"].number)
    assert cancelled.state == "CANCELLED" and cancelled.fields["Restarts"] == "0"
    assert f"resume with the same command and --run-name {cancelled.run}" in cancelled.output


def test_a_killed_rank_ends_the_job(project, train_some_steps, finish, small_work):
    job = train_some_steps(project, {"killed": ["--gres=gpu:1", "run_ddp.sh", *small_work]})["killed"]
    ranks = {of["SLURMD_NODENAME"]: process for process, of in job.processes.items()}
    assert sorted(ranks) == slurm.NODES
    os.kill(ranks["n2"], signal.SIGKILL)
    os.kill(ranks["n1"], signal.SIGCONT)
    ended = finish(project, job.number)
    assert ended.state == "FAILED" and ended.fields["Restarts"] == "0" and ended.record is None, ended.output
    slurm.wait_until(lambda: not slurm.processes("SLURM_JOB_ID", job.number), 60, "the end of the job's processes")


def test_stopped_for_good(project, tmp_path, train_some_steps, submit, finish, control, small_work):
    """A job that is cancelled, terminated or killed, or warned where there is no scontrol, does not come back."""
    container = tmp_path / "container"
    container.write_text(f'#!/bin/sh\nPATH={tmp_path} exec "{project}/.venv/bin/python" "$@"\n')
    container.chmod(0o755)
    commands = {name: ["run_baseline.sh", *small_work] for name in ("cancelled", "killed", "container")}
    commands["terminated"] = ["--gres=gpu:1", "run_ddp.sh", *small_work]
    jobs = train_some_steps(project, commands, {"container": {"TRAIN_PYTHON": str(container)}})
    control("scancel", jobs["cancelled"].number)
    control("scancel", "--signal=TERM", jobs["terminated"].number)
    control("scancel", "--signal=USR1", jobs["container"].number)
    signal_all(jobs["killed"].processes, signal.SIGTERM)
    for job in jobs.values():
        signal_all(job.processes, signal.SIGCONT)
    for name, job in jobs.items():
        ended = finish(project, job.number)
        assert ended.state == ("CANCELLED" if name == "cancelled" else "FAILED"), ended.output
        # Of two nodes, the status may be torchrun's.
        assert ended.exit_code in ("143:0", "1:0" if name == "terminated" else "143:0")
        assert ended.fields["Restarts"] == "0"
        assert f"; resume with the same command and --run-name {ended.run}\n" in ended.output
        assert ("cannot be requeued" in ended.output) == (name == "container") and ended.record is None
        assert "Traceback" not in ended.output
        jobs[name].checkpoint = project / f"checkpoints/{ended.run}/last.pt"

    # Without progress since it was resumed, a job is not requeued.
    before = jobs["killed"].checkpoint.read_bytes()
    run = jobs["killed"].checkpoint.parent.name
    number = submit(project, "run_baseline.sh", *small_work, "--run-name", run)

    def can_be_warned():
        found = slurm.processes("SLURM_JOB_ID", number, running("baseline.py"))
        return any(has_signal(process, "SigCgt", signal.SIGUSR1) for process in found)

    slurm.wait_until(can_be_warned, 60, "the start of the script")
    control("scancel", "--signal=USR1", number)
    ended = finish(project, number, f"results/{run}.json")
    assert (ended.state, ended.exit_code) == ("FAILED", "143:0") and ended.fields["Restarts"] == "0", ended.output
    assert ended.output.count("not requeued") == 1 and "resuming after step" in ended.output
    assert jobs["killed"].checkpoint.read_bytes() == before


def test_requeued_and_on_a_lost_node(project, train_some_steps, finish, control, small_work, environment):
    """One job is queued again from outside; another one loses its node, the daemon too."""
    options = {"requeued": [], "lost": ["--checkpoint-every", 1]}
    commands = {name: ["run_baseline.sh", *small_work, *option] for name, option in options.items()}
    jobs = train_some_steps(project, commands)
    control("scontrol", "requeue", jobs["requeued"].number)
    signal_all(jobs["requeued"].processes, signal.SIGCONT)
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
def started(quick, submit, finish, environment):
    """Run jobs with all kinds of sbatch's options at once; return {name: job}."""
    elsewhere = quick.parent / "elsewhere"
    elsewhere.mkdir()
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
        "GPUs of a task": ["--gres=none", "--gpus-per-task=2"],
        "another directory": [f"--chdir={elsewhere}", f"--output={quick}/%x-%j.out"],
    }
    numbers = {
        name: (quick, submit(quick, *options, "run_ddp.sh", "two words", **BINDING)) for name, options in ddp.items()
    }
    numbers["project by --chdir"] = (
        elsewhere,
        submit(elsewhere, f"--chdir={quick}", f"--output={elsewhere}/%x-%j.out", quick / "run_ddp.sh", "two words"),
    )
    # From the shell of another job, whose variables sbatch hands on.
    for name, outer in {
        "from salloc": ["salloc", "--mem=2G", "--ntasks=3"],
        "from srun": ["srun", "--mem=2G", "--cpus-per-task=3"],
    }.items():
        command = ["timeout", "60", *outer, "sbatch", "--parsable", "--mem-per-cpu=1G", "run_ddp.sh", "two words"]
        run = subprocess.run(command, cwd=quick, env=environment, capture_output=True, text=True, check=True)
        numbers[name] = (quick, run.stdout.strip())
    numbers["array 1"] = (
        quick,
        submit(quick, "--array=1-2", "--gres=gpu:a100:1", "run_baseline.sh", "two words", **BINDING) + "_1",
    )
    numbers["array 2"] = (quick, numbers["array 1"][1][:-1] + "2")
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
        ("GPUs of a task", {"n1": 2, "n2": 2}, {"8"}),
        ("another directory", {"n1": 2, "n2": 2}, {"8"}),
        ("project by --chdir", {"n1": 2, "n2": 2}, {"8"}),
        ("from salloc", {"n1": 2, "n2": 2}, {"8"}),
        ("from srun", {"n1": 2, "n2": 2}, {"8"}),
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
        assert where["bound"] == "" and where["offline"] == "1"
        assert arguments == (
            f"torchrun --nproc-per-node={count} --node-rank={rank} {SIGNALS} --nnodes=2 "
            f"--master-addr=n1 --master-port={10000 + int(job.number)} --rdzv-conf=timeout=300 "
            f"{quick}/distributed.py two words"
        )


def test_other_ways_to_submit_the_baseline(started, quick):
    for name, arguments in ("array 1", " two words"), ("array 2", " two words"), ("standard input", ""):
        job = started[name]
        assert (job.state, job.exit_code) == ("COMPLETED", "0:0"), job.output
        ((call, where),) = calls(job.output)
        assert call == f"{quick}/baseline.py{arguments}"
        assert where["node"] in slurm.NODES and len(where["gpus"]) == 1 and where["threads"] == "8"
        assert where["bound"] == "" and where["offline"] == "1"
    job = started["standard input elsewhere"]
    assert (job.state, job.exit_code) == ("FAILED", "2:0")
    assert job.output == "run_baseline.sh: error: no baseline.py here: call sbatch in its directory\n"


@pytest.mark.parametrize("launcher", LAUNCHERS)
@pytest.mark.parametrize("option", ["--cpus-per-gpu=4", "--gpus-per-node=a100:4", "--gpus=3"])
def test_what_sbatch_itself_refuses(quick, environment, launcher, option):
    command = ["timeout", "60", "sbatch", option, launcher]
    run = subprocess.run(command, cwd=quick, env=environment, capture_output=True, text=True)
    assert run.returncode == 1 and run.stderr.startswith("sbatch: error: ") and run.stderr.count("\n") <= 2


def test_what_cannot_work_ends_the_job_in_one_line(quick, tmp_path, submit, finish):
    bare = copy_project(tmp_path / "bare")
    python = bare_python(bare)
    jobs = {
        "Unable to create step": (quick, submit(quick, "--gpus-per-node=4", "run_baseline.sh")),
        "No package metadata was found for torch": (bare, submit(bare, "run_ddp.sh", TRAIN_PYTHON=python)),
    }
    for error, (directory, number) in jobs.items():
        job = finish(directory, number)
        assert job.state == "FAILED" and not calls(job.output), job.output
        assert error in job.output.splitlines()[-1], job.output
        assert job.output.count("error") <= 2, job.output


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
    *_, (arguments, where) = calls(run.stderr)
    assert where["node"] in slurm.NODES and arguments.endswith(f"/{LAUNCHERS[launcher]} --seed 1")
    assert where["threads"] == (threads or where["threads"])
    assert expected is None or workers(run.stderr) == expected


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


# without Slurm --------------------------------------------------------------------------------------------------------


def small_run(run_name):
    return ["--sample", "--max-steps", "2", "--device", "cpu", "--run-name", run_name]


def test_a_machine_whose_name_does_not_resolve(tmp_path):
    if os.geteuid() != 0:
        pytest.skip("only root can change the name, in a namespace")
    renamed = 'hostname nowhere.invalid && exec bash "$0" "$@"'
    command = ["unshare", "--uts", "bash", "-c", renamed, ROOT / "run_ddp.sh", *small_run("r")]
    environment = without_choices() | {"TRAIN_PYTHON": sys.executable}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    run = subprocess.run(command, cwd=tmp_path, env=environment, timeout=300, **streams)
    assert run.returncode == 0 and (tmp_path / "results/r.json").exists(), run.stdout


def test_a_class(tmp_path):
    """A teacher prepares. Students can only read the project and the cache, and use a Python that is there."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount a directory, and become another user")
    project = copy_project(tmp_path / "teacher/project")
    home = tmp_path / "teacher/home"
    environment = without_choices() | {"TRAIN_PYTHON": sys.executable, "HF_HOME": str(home)}
    del environment["HF_DATASETS_CACHE"]  # that of the tests
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    prepare = ["bash", project / "run_baseline.sh", "--prepare", "--sample"]
    run = subprocess.run(prepare, cwd=project, env=environment, umask=0o022, timeout=300, **streams)
    assert run.returncode == 0, run.stdout
    assert list(home.glob("datasets/squad-features/*.arrow"))
    assert all(path.stat().st_mode & 0o444 == 0o444 for path in home.rglob("*"))

    before = sorted((tmp_path / "teacher").rglob("*"))
    # As the user nobody, who may pass through the directories that lead to Python and to the files, but write nothing.
    student = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--inh-caps=+dac_read_search"]
    student += ["--ambient-caps=+dac_read_search", "bash", project / "run_ddp.sh", *small_run("r")]
    read_only = 'mount --bind "$1" "$1" && mount -o remount,bind,ro "$1" && shift && exec "$@"'
    command = ["unshare", "--mount", "bash", "-c", read_only, "bash", tmp_path / "teacher", *student]
    own = tmp_path / "student"
    own.mkdir()
    os.chown(own, 65534, 65534)
    run = subprocess.run(command, cwd=own, env=environment, timeout=300, **streams)
    assert run.returncode == 0, run.stdout
    assert (own / "results/r.json").stat().st_uid == 65534
    assert sorted((tmp_path / "teacher").rglob("*")) == before


@pytest.fixture
def launch(tmp_path):
    """Return a function that runs a launcher of a copy of the project with the stub as PYTHON."""
    directory = copy_project(tmp_path / "the project")
    stub = write_stub(tmp_path / "stub")

    def start(path, *arguments, **variables):
        command = ["bash", launch.directory / path, *arguments]
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen(
            command, cwd=tmp_path, env=without_choices() | {"PYTHON": str(stub)} | variables, **streams
        )

    def launch(path, *arguments, **variables):
        process = start(path, *arguments, **variables)
        output, _ = process.communicate(timeout=120)
        return process.returncode, [arguments for arguments, _ in calls(output)], output

    launch.directory, launch.start, launch.stub = directory, start, stub
    return launch


def installation(directory):
    return [
        f"-m venv --clear {directory}/.venv",
        f"-m pip install -r {directory}/requirements.txt",
        f"-m pip install --no-deps --require-hashes -r {directory}/sample/requirements.txt",
    ]


def test_the_launchers_are_short_and_set_up_alike():
    def set_up(launcher, script):
        text = (ROOT / launcher).read_text()
        first, last = text.index("\nfail() {"), text.index('fail "$python: ${problem')
        return text[first:last].replace(launcher, "LAUNCHER").replace(script, "SCRIPT")

    assert set_up("run_baseline.sh", "baseline.py") == set_up("run_ddp.sh", "distributed.py")
    for launcher, most in {"run_baseline.sh": 55, "run_ddp.sh": 80}.items():
        lines = (ROOT / launcher).read_text().splitlines()
        assert len(lines) <= most and max(map(len, lines)) <= 100


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


def test_a_complete_environment_is_left_alone(launch):
    script = f"{launch.directory}/baseline.py"
    assert launch("run_baseline.sh")[:2] == (0, [*installation(launch.directory), script])
    assert launch("run_baseline.sh", "two words", TRAIN="exit 2")[:2] == (2, [f"{script} two words"])
    with open(launch.directory / "requirements.txt", "a") as requirements:
        requirements.write("another==1\n")
    for arguments in [], ["--prepare"]:  # another run may be using the old one
        status, found, output = launch("run_baseline.sh", *arguments)
        assert status == 2 and not found and output.count("\n") == 1
        assert output.startswith("run_baseline.sh: error: .venv does not match ") and "remove it" in output
    shutil.rmtree(launch.directory / ".venv")
    assert launch("run_baseline.sh", "--prepare")[1] == [*installation(launch.directory), f"{script} --prepare"]


def torchrun(workers):
    """Return how a worker for each of so many GPUs is started on this machine."""
    return f"torchrun --nproc-per-node={workers} --node-rank=0 {SIGNALS} --standalone --local-addr=localhost"


def test_moved_project(launch):
    assert launch("run_ddp.sh")[0] == 0
    launch.directory = launch.directory.rename(launch.directory.parent / "moved")
    status, found, _ = launch("run_ddp.sh")
    script = f"{launch.directory}/distributed.py"
    assert status == 0
    assert found == [f"{script} --prepare", f"{torchrun(2)} {script}"]


def test_failed_installation_is_not_complete(launch):
    failing = launch.stub.with_name("failing")
    failing.write_text(f'[[ "$*" != *pip* ]] || exit 1\n{STUB}')
    failing.chmod(0o755)
    status, _, output = launch("run_baseline.sh", PYTHON=str(failing))
    assert status == 2 and output.splitlines()[-1].startswith("run_baseline.sh: error: .venv needs ")
    assert len(launch("run_baseline.sh")[1]) == 4


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_python_of_ones_own_is_used_as_it_is(launch, launcher):
    own = launch.directory.parent / "own python"
    shutil.copy(launch.stub, own)
    status, found, _ = launch(launcher, "--epochs", "1", TRAIN_PYTHON=str(own), PYTHON="/nowhere")
    assert status == 0 and not list(launch.directory.glob(".venv*"))
    assert found[-1].endswith(f"{launch.directory}/{LAUNCHERS[launcher]} --epochs 1")


@pytest.mark.parametrize(
    ("packages", "error"),
    [
        ({"torch": "2.11.0a0+site", "transformers": "5.17.0"}, None),
        ({"transformers": "4.51.0"}, "transformers 4.51.0 is older than 5.17"),
        ({"torch": "2.9.1+cu128"}, "torch 2.9.1+cu128 is older than 2.11"),
        ("-S", "No package metadata was found for torch"),
        (None, "No such file or directory"),
    ],
)
def test_the_versions_of_a_python_of_ones_own(launch, packages, error):
    """Directories with nothing but versions come before this Python's own packages, and no script is run."""
    own = launch.directory.parent / "own"
    own.mkdir()
    versions = packages if isinstance(packages, dict) else {}
    for name, version in versions.items():
        (own / f"{name}-{version}.dist-info").mkdir()
        (own / f"{name}-{version}.dist-info/METADATA").write_text(f"Name: {name}\nVersion: {version}\n")
    option = packages if isinstance(packages, str) else ""
    if packages is not None:
        (own / "python").write_text(
            f'#!/bin/bash\n[[ $1 == -c ]] || exec "{launch.stub}" "$@"\n'
            f'PYTHONPATH="{own}" exec {sys.executable} {option} "$@"\n'
        )
        (own / "python").chmod(0o755)
    for launcher, script in LAUNCHERS.items():
        status, found, output = launch(launcher, "--prepare", TRAIN_PYTHON=f"{own}/python")
        if error is None:
            assert (status, found) == (0, [f"{launch.directory}/{script} --prepare"]), output
        else:
            assert status == 2 and not found and output.count("\n") == 1
            assert output.startswith(f"{launcher}: error: {own}/python: ") and error in output


def test_parts_of_slurm(launch):
    launch("run_baseline.sh", "--prepare")
    bare = launch.directory.parent / "commands"
    bare.mkdir()
    for command in "bash", "dirname", "readlink", "cmp", "nproc", "head":
        (bare / command).symlink_to(shutil.which(command))
    job = {"SLURM_JOB_ID": "1", "SLURM_JOB_NODELIST": "n1", "SLURM_JOB_NUM_NODES": "1"}
    job["SLURM_JOB_CPUS_PER_NODE"] = "8"
    for launcher, script in LAUNCHERS.items():
        status, found, _ = launch(launcher, SLURM_JOB_ID="1")  # nothing but the number: as without Slurm
        assert status == 0 and found[-1].endswith(f"{launch.directory}/{script}") and "--nnodes" not in found[-1]
        status, found, output = launch(launcher, PATH=str(bare), MASTER_ADDR="n1", **job)
        assert status == 127 and output.splitlines()[-1].endswith("srun: not found"), output


def test_linked_and_copied_launchers(launch):
    link, copy = launch.directory.parent / "link.sh", launch.directory.parent / "run_ddp.sh"
    link.symlink_to(launch.directory / "run_baseline.sh")
    assert launch(link)[:2] == (0, [*installation(launch.directory), f"{launch.directory}/baseline.py"])
    shutil.copy(launch.directory / "run_ddp.sh", copy)
    status, found, output = launch(copy)
    assert status == 2 and not found
    assert output == "run_ddp.sh: error: no distributed.py here: call sbatch in its directory\n"


def test_ddp_on_this_machine(launch):
    script, cpus = f"{launch.directory}/distributed.py", len(os.sched_getaffinity(0))
    launch("run_ddp.sh", "--prepare")
    start = launch.start("run_ddp.sh", "--epochs", "1", OMP_NUM_THREADS="7", **BINDING)
    (prepared, _), (started, where) = calls(start.communicate(timeout=120)[0])
    assert prepared == f"{script} --prepare --epochs 1"
    assert started == f"{torchrun(2)} {script} --epochs 1"
    assert where["threads"] == str(max(1, cpus // 2)) and where["bound"] == where["offline"] == ""

    status, found, _ = launch("run_ddp.sh", GPUS="3", TRAIN="exit 3")
    assert status == 3 and found[-1] == f"{torchrun(3)} {script}"
    assert launch("run_ddp.sh", PREPARE="2")[:2] == (2, [f"{script} --prepare"])
    for alone in "--report", "--help", "--prepare":
        assert launch("run_ddp.sh", "--output-dir", "x", alone)[:2] == (0, [f"{script} --output-dir x {alone}"])
