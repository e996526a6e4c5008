"""What only a GPU shows; skipped where there is none."""

import json
import shutil
import subprocess

import pytest

from conftest import ENCODER, GPUS, ROOT, cut_sample, read_scalars, run_script

pytestmark = pytest.mark.skipif(shutil.which("nvidia-smi") is None, reason="no NVIDIA GPU on this machine")
STEPS = 4


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
    arguments = ["--train-file", cut_sample("train", 60, files / "train.json"), "--model", ENCODER, "--run", "r"]
    arguments += ["--dev-file", cut_sample("dev", 20, files / "dev.json"), "--dropout", 0, "--max-steps", STEPS]

    def run(device, *options, script="baseline.py", world_size=None):
        directory = tmp_path_factory.mktemp("run")
        environment = {"CUDA_VISIBLE_DEVICES": device}
        process = run_script(script, [*arguments, "--batch-size", 12, *options], directory, world_size, environment)
        assert process.returncode == 0, process.stderr
        return read_scalars(directory / "logs/r")["train/loss"], json.loads((directory / "results/r.json").read_text())

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
    assert record["work"]["precision"] == options[1]


@pytest.mark.parametrize("world_size", [1, 2])
def test_ranks_over_nccl_give_the_losses_of_the_cpu(train, cpu_losses, world_size):
    if len(ask_driver("name")) < world_size:
        pytest.skip(f"no {world_size} GPUs on this machine")
    losses, record = train(GPUS, "--precision", "fp32", script="distributed.py", world_size=world_size)
    assert losses == pytest.approx(cpu_losses, rel=1e-3)
    assert record["workers"]["world_size"] == world_size and record["environment"]["nccl"]


def test_training_waits_for_the_gpu_only_to_read_losses(tmp_path):
    """PyTorch itself raises an error where the host waits for the device, from the first step to the last."""
    script = tmp_path / "watched.py"
    script.write_text(f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import torch, baseline
from torch.cuda import set_sync_debug_mode
optimize, read_losses = baseline.optimize, baseline.read_losses

def watched_read(*arguments):
    set_sync_debug_mode("default")
    try:
        return read_losses(*arguments)
    finally:
        set_sync_debug_mode("error")

def watched_optimize(*arguments):
    steps = optimize(*arguments)
    while True:
        set_sync_debug_mode("error")
        step = next(steps, None)
        set_sync_debug_mode("default")
        if step is None:
            return
        yield step

baseline.read_losses, baseline.optimize = watched_read, watched_optimize
baseline.synchronize = lambda device: None
baseline.main()
""")
    arguments = ["--sample", "--batch-size", 12, "--max-steps", STEPS, "--epochs", 1]
    process = run_script(script, arguments, tmp_path, environment={"CUDA_VISIBLE_DEVICES": GPUS})
    assert process.returncode == 0, process.stderr
