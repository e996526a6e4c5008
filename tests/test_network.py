"""Two workers on a slow network: the exchange of gradients takes the time that the link needs for their bytes."""

import json
import os

import pytest

import benchmark
from conftest import TINY, cut_sample, write_model
from ranks import run_ranks

pytestmark = pytest.mark.alone  # other programs would make an exchange slower
STEPS = 5
SLOW = "200mbit"


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """Return the records of the same few steps over a slow link, and within this machine."""
    if reason := benchmark.why_no_network():
        pytest.skip(reason)
    files = tmp_path_factory.mktemp("files")
    options = {"train_file": cut_sample("train", 60, files / "train.json"), "threads": 1, "max_steps": STEPS}
    options |= {"dev_file": cut_sample("dev", 20, files / "dev.json"), "batch_size": 12}
    options |= {"model": write_model(files, **TINY), "random_init": True, "precision": "fp32"}
    with benchmark.joined_namespaces(SLOW) as launch:
        slow = benchmark.run(launch, **options)
    directory = tmp_path_factory.mktemp("fast")
    run_ranks("distributed.py", benchmark.to_arguments(options | {"run_name": "r"}), directory, 2)
    return slow, json.loads((directory / "results/r.json").read_text())


def test_a_slow_link_changes_the_time_and_not_the_training(records):
    slow, fast = records
    assert (slow["workers"]["nodes"], fast["workers"]["nodes"]) == (2, 1)
    assert slow["quality"] == fast["quality"]


def test_the_exchange_takes_what_the_link_needs_for_the_gradients(records):
    slow, fast = records
    assert 0.4 < benchmark.exchange_over_rate(slow, SLOW) < 2
    assert slow["seconds"]["exchange"] > 3 * fast["seconds"]["exchange"]


def test_nothing_is_left_of_the_namespaces(records):
    assert str(os.getpid()) not in benchmark.ip("netns", "list")
