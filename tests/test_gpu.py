"""What only a GPU shows; skipped where there is none."""

import json
import os
import shutil
import subprocess

import pytest

from conftest import ENCODER, GPUS, ROOT, cut_sample, read_scalars, run_script

pytestmark = pytest.mark.skipif(shutil.which("nvidia-smi") is None, reason="no NVIDIA GPU on this machine")
STEPS = 4
# For code that imports a script as a module.
ENVIRONMENT = {"CUDA_VISIBLE_DEVICES": GPUS, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}


def ask_driver(question):
    """Return nvidia-smi's answers for the GPUs to be used."""
    query = ["nvidia-smi", f"--query-gpu=index,uuid,{question}", "--format=csv,noheader"]
    lines = subprocess.run(query, capture_output=True, text=True).stdout.splitlines()
    names = set(GPUS.replace(" ", "").split(","))
    answers = [answer for *gpu, answer in (line.split(", ", 2) for line in lines) if names & set(gpu)]
    return answers or pytest.skip(f"CUDA_VISIBLE_DEVICES={GPUS} names no GPU")


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    """Train some steps without dropout in a directory of its own; return (losses by step, record)."""
    files = tmp_path_factory.mktemp("questions")
    arguments = ["--train-file", cut_sample("train", 60, files / "train.json"), "--model", ENCODER, "--run-name", "r"]
    arguments += ["--dev-file", cut_sample("dev", 20, files / "dev.json"), "--dropout", 0, "--max-steps", STEPS]

    def run(device, *options, script="baseline.py", world_size=None):
        directory = tmp_path_factory.mktemp("run")
        environment = {"CUDA_VISIBLE_DEVICES": device}
        process = run_script(script, [*arguments, "--batch-size", 12, *options], directory, world_size, environment)
        assert process.returncode == 0, process.stderr
        return read_scalars(directory / "logs/r")["loss/train"], json.loads((directory / "results/r.json").read_text())

    return run


@pytest.fixture(scope="module")
def cpu_losses(train):
    return train("", "--precision", "fp32")[0]


@pytest.mark.parametrize(
    ("options", "tolerance"),
    [
        (["--precision", "fp32"], 1e-3),
        (["--precision", "tf32"], 1e-2),
        (["--precision", "bf16"], 3e-2),
        (["--precision", "bf16", "--compile", "--micro-batch-size", 5], 3e-2),
    ],
)
def test_a_gpu_gives_the_losses_of_the_cpu(train, cpu_losses, options, tolerance):
    if options[1] != "fp32" and min(map(float, ask_driver("compute_cap"))) < 8:
        pytest.skip("older than the A100: neither tf32 nor bf16")
    losses, record = train(GPUS, *options)
    assert losses == pytest.approx(cpu_losses, rel=tolerance)
    assert record["environment"]["cuda"] and record["memory"]["peak_bytes"] > 100e6
    assert record["settings"]["precision"] == options[1]
    assert 0 < record["seconds"]["device_wait"] < record["seconds"]["train"]


@pytest.mark.parametrize("world_size", [1, 2])
def test_ranks_over_nccl_give_the_losses_of_the_cpu(train, cpu_losses, world_size):
    if len(ask_driver("name")) < world_size:
        pytest.skip(f"no {world_size} GPUs on this machine")
    losses, record = train(GPUS, "--precision", "fp32", script="distributed.py", world_size=world_size)
    assert losses == pytest.approx(cpu_losses, rel=1e-3)
    assert record["workers"]["world_size"] == world_size and record["environment"]["nccl"]
    assert 0 < record["seconds"]["exchange"] + record["seconds"]["waiting"] < record["seconds"]["train"]


def test_bf16_gradients_over_nccl(train, cpu_losses):
    options = ["--precision", "fp32", "--gradients", "bf16"]
    losses, record = train(GPUS, *options, script="distributed.py", world_size=min(2, len(ask_driver("name"))))
    assert losses == pytest.approx(cpu_losses, rel=3e-2)
    assert record["settings"]["gradients"] == "bf16"


# From the first step of the loop on, PyTorch raises an error where the host waits for the device, but not from the
# reading of the losses to the next step: what happens then, such as an evaluation, may wait.
WATCH = """
import torch, {script} as script
from torch.cuda import set_sync_debug_mode
tolist, train_step, warm_up, seen = torch.Tensor.tolist, script.train_step, script.warm_up, []
load_split, make_inputs = script.load_split, script.make_inputs

def watched_load_split(*given):
    split = load_split(*given)
    assert split.ids.is_cuda and split.numbers.is_cuda
    return split

def watched_make_inputs(*given):
    inputs = make_inputs(*given)
    assert all(tensor.is_cuda for tensor in inputs.values())
    return inputs

def watched_tolist(tensor):
    if tensor.device.type == "cuda":
        set_sync_debug_mode("default")
        seen.append("reading")
    return tolist(tensor)

def watched_train_step(*given):
    set_sync_debug_mode("error")
    seen.append("step")
    return train_step(*given)

def free_warm_up(*given):
    warm_up(*given)
    script.train_step = watched_train_step

torch.Tensor.tolist, script.warm_up = watched_tolist, free_warm_up
script.load_split, script.make_inputs = watched_load_split, watched_make_inputs
script.main()
assert seen == ["step"] * {steps} + ["reading"] * seen.count("reading") and "reading" in seen, seen
"""


@pytest.mark.parametrize(("script", "world_size"), [("baseline", None), ("distributed", 1)])
def test_training_waits_for_the_gpu_only_to_read_losses(tmp_path, script, world_size):
    ask_driver("name")
    (tmp_path / "watched.py").write_text(WATCH.format(script=script, steps=STEPS))
    arguments = ["--sample", "--max-steps", STEPS, "--epochs", 1]
    process = run_script(tmp_path / "watched.py", arguments, tmp_path, world_size, ENVIRONMENT)
    assert process.returncode == 0, process.stderr


# Slurm warns a run, here in its 27th step: the first three are the warm-up's.
WARN = """
import os, signal, {script} as script
train_step, count = script.train_step, 0

def warned_train_step(*given):
    global count
    count += 1
    if count == 30:
        os.kill(os.getpid(), signal.SIGUSR1)
    return train_step(*given)

script.train_step = warned_train_step
try:
    script.main()
except script.ScriptError as error:
    script.fail(error, error.status)
"""


@pytest.mark.parametrize(("script", "world_size"), [("baseline", None), ("distributed", 1)])
def test_a_warned_run_goes_on_and_ends_like_one_left_alone(tmp_path, monkeypatch, script, world_size):
    """The losses are read every 20 steps on a GPU, so the run saves after step 40."""
    ask_driver("name")
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)  # or it would requeue the job that these tests run in
    (tmp_path / "warned.py").write_text(WARN.format(script=script))
    (tmp_path / "alone").mkdir()
    arguments = ["--sample", "--max-steps", 60, "--dropout", 0.1, "--precision", "fp32", "--run-name", "r"]
    alone = run_script(f"{script}.py", arguments, tmp_path / "alone", world_size, ENVIRONMENT)
    assert alone.returncode == 0, alone.stderr
    warned = run_script(tmp_path / "warned.py", arguments, tmp_path, world_size, ENVIRONMENT)
    assert warned.returncode != 0
    assert "stopped as asked after step 40; resume with the same command" in warned.stderr
    resumed = run_script(f"{script}.py", arguments, tmp_path, world_size, ENVIRONMENT)
    assert resumed.returncode == 0, resumed.stderr
    record = json.loads((tmp_path / "results/r.json").read_text())
    assert record["resumed"] == 1
    losses = read_scalars(tmp_path / "logs/r")["loss/train"]
    assert len(losses) == 60
    assert losses == pytest.approx(read_scalars(tmp_path / "alone/logs/r")["loss/train"], rel=1e-2)
