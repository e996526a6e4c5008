"""Two workers on a slow network: the exchange of gradients takes the time that the link needs for their bytes."""

import os

import pytest

import benchmark
from conftest import TINY, cut_sample, write_model

STEPS = 5


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """Return {link: record} of the same few steps."""
    if reason := benchmark.why_no_network():
        pytest.skip(reason)
    files = tmp_path_factory.mktemp("files")
    options = {"train_file": cut_sample("train", 60, files / "train.json"), "threads": 1, "max_steps": STEPS}
    options |= {"dev_file": cut_sample("dev", 20, files / "dev.json"), "batch_size": 12}
    options |= {"model": write_model(files, **TINY), "random_init": True, "precision": "fp32"}
    made = {}
    for link in ("unshaped", "200mbit"):
        with benchmark.joined_namespaces(link) as launch:
            made[link] = benchmark.run(launch, **options)
    return made


def test_a_slow_link_changes_the_time_and_not_the_training(records):
    assert {record["workers"]["nodes"] for record in records.values()} == {2}
    assert records["200mbit"]["quality"] == records["unshaped"]["quality"]


def test_the_exchange_takes_what_the_link_needs_for_the_gradients(records):
    assert 0.4 < benchmark.exchange_over_rate(records["200mbit"], "200mbit") < 2
    shaped, unshaped = (records[link]["seconds"]["exchange"] / STEPS for link in ("200mbit", "unshaped"))
    assert shaped > 3 * unshaped


def test_nothing_is_left_of_the_namespaces(records):
    assert str(os.getpid()) not in benchmark.ip("netns", "list")
