"""The scaling report: on constructed records, whose figures are known, on real runs, and as a user starts it."""

import argparse
import contextlib
import copy
import json
import math
import os
import re
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from torch.utils.tensorboard import SummaryWriter

import distributed
from conftest import ROOT, cut_sample, run_script
from ranks import Run, run_ranks

RECORD = {
    "schema": 3, "run_name": "base", "started": "2026-01-01T00:00:00+00:00", "resumed": 0, "readings": 40,
    "workers": {"world_size": 1, "nodes": 1, "threads": 8},
    "settings": {
        "script": "baseline", "world_size": 1, "gradients": None, "model": "google-bert/bert-base", "model_sha256": "c",
        "parameters": 110_000_000, "train_sha256": "a", "dev_sha256": "b", "train_questions": 900,
        "train_impossible": 300, "train_features": 1000, "train_out_of_reach": 0, "dev_questions": 90,
        "dev_impossible": 45, "dev_features": 100, "dev_out_of_reach": 0, "train_file": None, "dev_file": None,
        "sample": False, "epochs": 2, "batch_size": 48, "micro_batch_size": None, "lr": 5e-5, "warmup": 0.1,
        "weight_decay": 0.01, "max_grad_norm": 1.0, "max_length": 384, "doc_stride": 128, "dropout": 0.1,
        "precision": "fp32", "compile": False, "seed": 42, "max_steps": None, "random_init": False, "steps": 40,
        "trained_features": 2000, "trained_tokens": 300_000,
    },
    "environment": {
        "device": "EPYC", "hosts": ["node1"], "torch": "2.13.0", "cuda": None, "transformers": "5.0.0", "nccl": None,
        "python": "3.12.1", "slurm_job_id": None, "git_commit": "4cbd570" + "0" * 33,
        "variables": {},
    },
    "seconds": {
        "train": 800.0, "exchange": None, "waiting": None, "cpu": 790.0, "device_wait": 0.0, "data": 5.0,
        "warm_up": 5.0, "evaluate": 20.0, "checkpoint": 0.0, "total": 900.0,
    },
    "throughput": {"features_per_s": 2.5, "tokens_per_s": 375.0}, "memory": {"peak_bytes": 10**9},
    "quality": {
        "train_loss": 1.0, "dev_loss": 1.1, "exact": 70.0, "f1": 75.0, "best_f1": 75.5, "best_f1_threshold": 0.1,
        "has_answer_exact": 68.0, "has_answer_f1": 74.0, "no_answer_accuracy": 76.0, "best_span_exact": 78.0,
        "best_span_f1": 80.0,
    },
}  # fmt: skip
SECTIONS = ["workers", "settings", "environment", "seconds", "quality"]
GPU = {"device": "NVIDIA H200", "nccl": "2.28.9", "cpu": 0.0, "readings": 2}
PARTS = ["useful", "exchange", "waiting", "preempted", "other"]
ONCE = "one run each is not enough to look for a cause"


def change(made, **values):
    """Give keys of any section of a record, or of the record itself, other values; return it."""
    for key, value in values.items():
        sections = [section for section in (made, *(made[name] for name in SECTIONS)) if key in section]
        assert sections, key
        for section in sections:
            section[key] = value
    return made


def record(name, workers=0, train=800.0, **changed):
    """Return a baseline's record or, with a number of workers, one of distributed.py; with other values of any keys.

    A worker computes whenever it neither exchanges nor waits.
    """
    made = change(copy.deepcopy(RECORD), run_name=name, train=train, total=train + 100)
    if workers:
        change(made, script="distributed", world_size=workers, gradients="fp32", exchange=0.0, waiting=0.0)
    change(made, **{key: value for key, value in changed.items() if key != "cpu"})
    seconds = made["seconds"]
    if made["environment"]["nccl"] is None:
        waits = [seconds[name] for name in ("exchange", "waiting") if isinstance(seconds[name], float)]
        seconds["cpu"] = train - sum(waits)
    return change(made, **{key: value for key, value in changed.items() if key == "cpu"})


def repeat(name, *arguments, **changed):
    """Return three equal records that differ by a thousandth."""
    workers, train = (arguments + (0, 800.0)[len(arguments) :])[:2]
    return [record(f"{name}-{number}", workers, train * (1 + number / 1000), **changed) for number in (-1, 0, 1)]


def write_records(directory, records):
    results = directory / "results"
    results.mkdir(exist_ok=True)
    for one in records:
        (results / f"{one['run_name']}.json").write_text(json.dumps(one))
    return results


class Report:
    """What a report prints and writes, for a directory with these records."""

    def __init__(self, directory, records, capsys):
        results = write_records(directory, records)
        capsys.readouterr()
        distributed.report(argparse.Namespace(output_dir=str(directory)))
        self.lines = capsys.readouterr().out.splitlines()
        # As text, however the lines are wrapped.
        self.text = " ".join(" ".join(self.lines).split())
        constants = {"parse_constant": lambda name: pytest.fail(f"{name} is not JSON")}
        self.rows = json.loads((results / "speedup.json").read_text(), **constants)
        self.of = {run: row for row in self.rows for run in row["run_name"]}
        self.figures = sorted(path.name for path in results.glob("speedup*") if path.suffix != ".json")

    def table(self, number=1):
        """Return the headings, and {heading: cell} of each row, of a printed table."""
        count = len([row for row in self.rows if row["table"] == number])
        starts = [place for place, line in enumerate(self.lines) if line.split()[:2] == ["mode", "workers"]]
        header, *lines = (line.strip(" \\") for line in self.lines[starts[number - 1] :][: count + 1])
        headings = re.findall(r"(?:train|range) s|span F1|\S+", header)
        # Only the mode has spaces.
        rows = [line.rsplit(maxsplit=len(headings) - 1) for line in lines]
        return headings, [dict(zip(headings, row, strict=True)) for row in rows]


@pytest.fixture
def report(tmp_path, capsys, monkeypatch):
    """Return a function that returns the report on some records, with an empty figure, which takes less time."""
    monkeypatch.setattr(distributed, "draw", lambda table: Figure(figsize=(1, 1)))
    return lambda *records: Report(tmp_path, records, capsys)


# figures --------------------------------------------------------------------------------------------------------------


def test_figures_by_hand(report):
    made = report(record("base"), record("one", 1, 820), record("four", 4, 250, total=400, exchange=25.0))
    base, one, four = made.of["base"], made.of["one"], made.of["four"]
    assert (base["mode"], base["speedup"], base["useful"]) == ("baseline", 1, 1)
    assert one["speedup"] == pytest.approx(800 / 820) and one["mode"] == "one worker"
    assert (four["mode"], four["n"], four["base"]) == ("strong", 1, ["base"])
    assert four["speedup"] == pytest.approx(3.2) and four["useful"] == pytest.approx(0.8)
    assert four["serial_fraction"] == pytest.approx((1 / 3.2 - 1 / 4) / (1 - 1 / 4)) == pytest.approx(1 / 12)
    assert four["end_to_end_speedup"] == pytest.approx((900 - 5) / (400 - 5))
    assert four["worker_hours"] == pytest.approx(1000 / 3600)
    assert four["features_per_s"] == 8 and four["exchange"] == pytest.approx(0.1)


# name: (workers, seconds, other values; useful, exchange, waiting, preempted, other)
KNOWN = {
    "one-worker": (1, 1000, {"exchange": 20.0}, [0.8, 0.02, 0, 0, 0.18]),
    "two": (2, 500, {"exchange": 50.0, "waiting": 10.0}, [0.8, 0.1, 0.02, 0, 0.08]),
    "sixteen": (16, 100, {"exchange": 25.0, "waiting": 5.0, "nodes": 4}, [0.5, 0.25, 0.05, 0, 0.2]),
    "weak": (4, 250, {"exchange": 25.0, "batch_size": 192}, [0.8, 0.1, 0, 0, 0.1]),
    "bf16": (4, 250, {"exchange": 12.5, "gradients": "bf16"}, [0.8, 0.05, 0, 0, 0.15]),
    "slower": (2, 1600, {"exchange": 1040.0, "waiting": 80.0}, [0.25, 0.65, 0.05, 0, 0.05]),
    "above": (4, 160, {"exchange": 16.0}, [1.25, 0.1, 0, 0, -0.35]),
    # Of 500 s, it computes 440 and has its cores for 240.
    "preempted": (2, 500, {"exchange": 50.0, "waiting": 10.0, "cpu": 240.0}, [0.8, 0.1, 0.02, 0.4, -0.32]),
}


@pytest.mark.parametrize("name", KNOWN)
def test_the_parts_of_the_time_add_up(report, name):
    workers, train, changed, parts = KNOWN[name]
    made = report(record("base"), record("p", workers, train, **changed))
    row = made.of["p"]
    assert [row[part] for part in PARTS] == pytest.approx(parts)
    assert sum(row[part] for part in PARTS) == pytest.approx(1)
    shown = made.table()[1][1]
    columns = ["eff.", "exch.", "wait", "preempted", "other"]
    assert [shown.get(column, "0%") for column in columns] == [f"{part:.0%}" for part in parts]
    said = "+ exch. + wait + preempted + other = 100% of the workers' time"
    assert made.text.count(said) == 1


@settings(max_examples=50, deadline=None)
@given(
    workers=st.integers(2, 1024),
    base=st.floats(1, 1e5),
    seconds=st.floats(1, 1e5),
    shares=st.tuples(st.floats(0, 0.49), st.floats(0, 0.49), st.floats(0, 1)),
)
def test_identities(tmp_path_factory, workers, base, seconds, shares):
    """Efficiency times workers is the speedup, the parts add up, and Amdahl's law with e gives the speedup back."""
    exchange, waiting, cpu = (share * seconds for share in shares)
    one = record("p", workers, seconds, exchange=exchange, waiting=waiting, cpu=cpu)
    results = write_records(tmp_path_factory.mktemp("records"), [record("base", train=base), one])
    runs = distributed.read_records(results)
    baseline, row = (distributed.make_row(equal) for _, equal in runs.groupby("row", sort=False))
    if row.script == "baseline":
        baseline, row = row, baseline
    distributed.compare(row, [baseline])
    assert row.useful * workers == pytest.approx(row.speedup) == pytest.approx(base / seconds)
    assert sum(getattr(row, part) for part in PARTS) == pytest.approx(1)
    assert (row.serial_fraction is None) == (not 1 < row.speedup <= workers)
    if row.serial_fraction is not None:
        e = row.serial_fraction
        assert 0 <= e < 1 and 1 / (e + (1 - e) / workers) == pytest.approx(row.speedup, rel=1e-6)


def test_repetitions_are_one_row_and_a_rate_is_work_over_the_median(report):
    """The mean of the rates 2000 / 200 and 2000 / 600 is 6.67; the work over the median of 400 s is 5."""
    bases = [record(f"b{number}", train=seconds) for number, seconds in enumerate((790, 800, 840))]
    row = report(*bases, record("d0", 2, 200), record("d1", 2, 600, seed=1)).of["d0"]
    assert (row["run_name"], row["n"], row["train"], row["train_range"]) == (["d0", "d1"], 2, 400, [200, 600])
    assert row["features_per_s"] == 5 and row["speedup"] == pytest.approx(2)
    assert row["speedup_range"] == pytest.approx([790 / 600, 840 / 200])


def test_one_run_has_no_range(report):
    made = report(record("base"), record("p", 4, 250))
    assert made.of["p"]["train_range"] is None and made.of["p"]["speedup_range"] is None
    headings, (_, row) = made.table()
    assert "range s" not in headings and row["n"] == "1"
    made = report(*repeat("more"), *repeat("q", 2, 410), record("once", 4, 260))
    headings, rows = made.table()
    shown = {(row["workers"], row["n"]): row["range s"] for row in rows}
    assert shown["2", "3"] == "409.6-410.4" and shown["4", "2"] == "250.0-260.0"


def test_a_single_baseline_is_not_enough(report):
    made = report(record("base"), *repeat("p", 4, 250))
    assert made.of["p-0"]["speedup_range"] is None and ONCE in made.of["p-0"]["remark"]


@pytest.mark.parametrize("seconds", [800, 1000, 90])
def test_no_serial_fraction_without_a_speedup_or_beyond_the_ideal(report, seconds):
    assert report(record("base"), record("p", 4, seconds)).of["p"]["serial_fraction"] is None


# which baseline -------------------------------------------------------------------------------------------------------


def test_the_base_is_the_fastest_of_the_same_batch(report):
    bases = [record("slow", train=1000), record("fast", train=800, micro_batch_size=12)]
    made = report(*bases, record("other", train=500, batch_size=24), record("p", 2, 500))
    assert (made.of["p"]["base"], made.of["p"]["mode"]) == (["fast"], "strong")
    assert made.of["p"]["speedup"] == pytest.approx(1.6)
    assert made.of["slow"]["speedup"] == pytest.approx(0.8) and made.of["slow"]["remark"] is None


def test_else_of_the_same_batch_per_worker_else_any(report):
    bases = [record("b48", train=800), record("b24", train=700, batch_size=24)]
    rows = report(*bases, record("weak", 4, 220, batch_size=192), record("any", 4, 250, batch_size=100)).of
    assert (rows["weak"]["mode"], rows["weak"]["base"]) == ("weak", ["b48"])
    assert rows["weak"]["speedup"] == pytest.approx(800 / 220)
    assert (rows["any"]["mode"], rows["any"]["base"]) == ("other batch", ["b24"])
    assert rows["weak"]["serial_fraction"] is None and rows["any"]["serial_fraction"] is None


def test_an_interrupted_baseline_is_the_base_only_where_there_is_no_other(report):
    made = report(record("resumed", train=700, resumed=1), record("p", 2, 500))
    assert made.of["p"]["base"] == ["resumed"]
    made = report(record("whole", train=800))
    assert made.of["p"]["base"] == ["whole"]
    # It is a column where it varies.
    assert sorted(row["resumed"] for row in made.table()[1]) == ["0", "0", "1"]


@pytest.mark.parametrize("gradients", ["fp32", "bf16"])
@pytest.mark.parametrize(("workers", "batch", "mode"), [(1, 48, "one worker"), (4, 48, "strong"), (4, 192, "weak")])
def test_modes(report, gradients, workers, batch, mode):
    row = report(record("base"), record("p", workers, 700 / workers, batch_size=batch, gradients=gradients)).of["p"]
    assert row["mode"] == (f"{mode} bf16" if gradients == "bf16" else mode)


# kinds of work --------------------------------------------------------------------------------------------------------

OTHER_WORK = {
    "model_sha256": "z", "parameters": 7, "random_init": True, "train_sha256": "z", "dev_sha256": "z",
    "max_length": 256, "doc_stride": 64, "precision": "tf32", "compile": True, "dropout": 0.0, "weight_decay": 0.1,
    "warmup": 0.2, "max_grad_norm": 2.0, "device": "Xeon", "torch": "2.12.0", "transformers": "5.1.0", "threads": 4,
}  # fmt: skip


def test_every_kind_of_other_work_is_tested():
    assert {*OTHER_WORK, "cpu_threads", "trained_features", "trained_tokens"} == {*distributed.SAME_WORK, "threads"}


def test_rows_without_a_baseline_still_tell_their_gradients(report):
    made = report(record("p", 4, 250), record("q", 4, 200, gradients="bf16"))
    assert (made.of["p"]["mode"], made.of["q"]["mode"]) == ("distributed", "distributed bf16")


@pytest.mark.parametrize("name", OTHER_WORK)
def test_other_work_is_another_table_without_ratios(report, name):
    made = report(record("base"), record("p", 4, 250, **{name: OTHER_WORK[name]}))
    row = made.of["p"]
    assert (made.of["base"]["table"], row["table"]) == (1, 2)
    assert [row[key] for key in ("base", "speedup", "useful", "other", "serial_fraction")] == [None] * 5
    assert row["mode"] == "distributed" and made.figures == []
    usual = next(RECORD[section][name] for section in SECTIONS if name in RECORD[section])
    label = {"threads": "cpu_threads", **distributed.READ_FROM}.get(name, name)
    values = {"model": ["google-bert/bert-base"] * 2, "train_file": ["SQuAD 2.0"] * 2, "dev_file": ["SQuAD 2.0"] * 2}
    there, here = values.get(label, [usual, OTHER_WORK[name]])
    assert f"the nearest baseline differs in {label} {there} (here: {here})" in made.text
    assert "sha256" not in made.text


@pytest.mark.parametrize(
    ("of_baseline", "of_run", "named"),
    [
        # Under --max-steps, a batch of another size or order holds other features.
        (
            {"max_steps": 40},
            {"max_steps": 40, "batch_size": 96, "trained_features": 3840, "trained_tokens": 500_000},
            "batch_size 48 (here: 96)",
        ),
        (
            {"max_steps": 40},
            {"max_steps": 40, "seed": 1, "trained_tokens": 310_000},
            "seed 42 (here: 1)",
        ),
        ({}, {"max_steps": 2, "trained_features": 96, "trained_tokens": 9_000}, "max_steps None (here: 2)"),
        ({}, {"epochs": 1, "trained_features": 1000, "trained_tokens": 150_000}, "epochs 2 (here: 1)"),
        (
            {},
            {"train_sha256": "z", "train_file": "data/sample/train.json", "trained_tokens": 7_000},
            "train_file SQuAD 2.0 (here: sample/train.json)",
        ),
    ],
)
def test_what_makes_the_trained_tokens_differ_is_named(report, of_baseline, of_run, named):
    text = report(record("base", **of_baseline), record("p", 4, 250, **of_run)).text
    assert f"the nearest baseline differs in {named} " in f"{text} "
    assert "trained_tokens" not in text[text.index("no speedup") :]


def test_the_nearest_baseline_is_that_with_the_fewest_differences(report):
    far = record("far", dropout=0.0, precision="bf16", started="2025-01-01")
    made = report(far, record("near", precision="bf16"), record("p", 4, 250))
    assert "differs in precision bf16 (here: fp32) " in made.text


def test_each_table_has_a_heading_and_its_own_ratios(report):
    """The sample, a try of two steps, and a run on all of SQuAD in one directory."""
    sample = {"train_sha256": "s", "dev_sha256": "s", "sample": True, "trained_features": 800, "trained_tokens": 60_000}
    sample |= {"train_file": "/home/me/project/sample/train.json", "batch_size": 12, "started": "2025-01-01"}
    try_ = {"max_steps": 2, "steps": 2, "trained_features": 96, "trained_tokens": 9_000, "started": "2025-01-02"}
    made = report(
        record("s1", train=30, **sample), record("s2", 2, 18, **sample), record("try", 2, 1.5, **try_),
        record("base"), record("four", 4, 250),
    )  # fmt: skip
    assert {run: row["table"] for run, row in made.of.items()} == {"s1": 1, "s2": 1, "try": 2, "base": 3, "four": 3}
    assert made.of["s2"]["speedup"] == pytest.approx(30 / 18) and made.of["four"]["speedup"] == pytest.approx(3.2)
    for number, file, features in [(1, "sample/train.json", 800), (2, "SQuAD 2.0", 96), (3, "SQuAD 2.0", 2000)]:
        assert (
            f"Table {number}: model google-bert/bert-base, precision fp32, device EPYC, train_file {file}, "
            f"trained_features {features}"
        ) in made.text
    assert made.text.count("no speedup without") == 1 and "max_steps None (here: 2)" in made.text
    assert made.figures == ["speedup-1.png", "speedup-1.svg", "speedup-3.png", "speedup-3.svg"]
    assert [made.table(number)[0][-1] for number in (1, 2, 3)] == ["span F1", "F1", "F1"]
    assert max(map(len, made.lines)) <= 100


def test_figures_of_tables_that_are_no_more_are_removed(tmp_path, report):
    assert report(record("base"), record("p", 4, 250)).figures == ["speedup-1.png", "speedup-1.svg"]
    (tmp_path / "results/base.json").unlink()
    assert report().figures == []


def test_threads_do_not_matter_where_a_worker_is_a_gpu(report):
    made = report(record("base", **GPU), record("p", 4, 250, threads=4, **GPU))
    assert made.of["p"]["speedup"] == pytest.approx(3.2)
    assert [row["threads"] for row in made.table()[1]] == ["8", "4"]


def test_the_confounded_case_that_was_reported_as_7_94(report):
    """An fp32 baseline of batch 8 against TF32 on four GPUs with batch 32."""
    base = record("base", train=3828, batch_size=8, **GPU)
    made = report(base, record("four", 4, 482, precision="tf32", batch_size=32, **GPU))
    assert base["seconds"]["train"] / made.of["four"]["train"] == pytest.approx(7.94, abs=0.005)
    assert made.of["four"]["speedup"] is None and "differs in precision fp32 (here: tf32)" in made.text


@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [
        ("lr", 1e-4, ["5e-05", "5e-05", "0.0001"]), ("micro_batch_size", 6, ["-", "-", "6"]),
        ("resumed", 1, ["0", "0", "1"]),
        ("git_commit", f"4cbd570{0:033}-dirty", ["4cbd570000", "4cbd570000", "4cbd570000-dirty"]),
        ("git_commit", None, ["4cbd570000", "4cbd570000", "unknown"]),
    ],
)  # fmt: skip
def test_settings_that_may_differ_within_a_table_are_columns_where_they_do(report, name, value, shown):
    made = report(record("base"), record("a", 4, 250), record("b", 4, 260, **{name: value}))
    heading = name if name in distributed.MAY_VARY else "commit"
    assert sorted(row[heading] for row in made.table()[1]) == sorted(shown)
    assert made.of["b"]["base"] == ["base"] and made.of["b"]["n"] == 1
    assert f"nodes 1, batch 48, {heading} {shown[-1]}: " in made.text
    assert heading not in report(record("b", 4, 260)).table()[0]


# why it is not more ---------------------------------------------------------------------------------------------------


def remark(report, workers=4, train=250, base=None, **changed):
    """Return the sentence on four workers that take 250 s (efficiency 80 %), 6.25 s for each of the 40 steps."""
    return report(record("base", **(base or {})), record("p", workers, train, **changed)).of["p"]["remark"]


def test_exchange(report):
    text = remark(report, exchange=40.0)
    assert text.startswith("16% of the time (1 s per step) is spent exchanging 440 MB of gradients; ")
    assert "--gradients bf16" in text and "--batch-size" in text and "repeat" not in text
    assert text.endswith(f"; without exchange and waiting the speedup would be {3.2 / 0.84:.2f}")


def test_exchange_in_bf16_does_not_advise_bf16(report):
    text = remark(report, exchange=40.0, gradients="bf16")
    assert "exchanging 220 MB" in text and "--gradients" not in text and "--batch-size" in text


@pytest.mark.parametrize("gradients", ["fp32", "bf16"])
def test_a_larger_batch_is_no_advice_where_the_batch_is_what_grew(report, gradients):
    text = remark(report, exchange=40.0, batch_size=192, gradients=gradients)
    assert "exchanging" in text and "batch" not in text and ("--gradients bf16" in text) == (gradients == "fp32")


@pytest.mark.parametrize("nodes", [1, 2])
def test_a_faster_network_is_advice_for_several_nodes_only(report, nodes):
    text = remark(report, exchange=40.0, nodes=nodes)
    assert ("network" in text) == ("NCCL" in text) == (nodes == 2)


def test_waiting(report):
    text = remark(report, waiting=30.0, exchange=10.0)
    assert text.startswith("12% of the time (0.75 s per step) is spent waiting for slower ranks; ")
    assert text.endswith(f"; without exchange and waiting the speedup would be {3.2 / 0.84:.2f}")


def test_without_exchange_and_waiting_is_said_only_where_one_of_them_is_the_cause(report):
    assert "without exchange and waiting" in remark(report, waiting=30.0, exchange=10.0)
    assert "without exchange and waiting" not in remark(report, waiting=10.0, exchange=10.0)


@pytest.mark.parametrize("machine", [{}, GPU | {"device_wait": 100.0}])
@pytest.mark.parametrize(("workers", "train", "batch"), [(4, 250, 48), (4, 250, 192), (4, 250, 100), (1, 1000, 48)])
def test_what_is_not_measured_is_not_guessed_from_one_run_each(report, machine, workers, train, batch):
    made = report(record("base", **machine), record("p", workers, train, batch_size=batch, **machine))
    text = made.of["p"]["remark"]
    seconds = "6.25" if workers == 4 else "5"
    assert text == f"20% of the time ({seconds} s per step) is not explained by what a run measures; {ONCE}".replace(
        "6.25", "1.25"
    )
    assert "for n in 1 2 3; do bash run_baseline.sh" in made.text and "sbatch --array=1-3 run_ddp.sh" in made.text


def test_nobody_is_told_to_repeat_what_was_repeated(report):
    made = report(*repeat("base"), *repeat("p", 4, 250))
    text = made.of["p-0"]["remark"]
    assert text.startswith("20% of the time (1.25 s per step) is not explained by what a run measures; likely, ")
    assert "two baselines side by side" in text and "repeat" not in text and "run_baseline.sh" not in made.text


def test_rows_have_the_likely_causes_of_their_mode(report):
    strong = report(*repeat("base"), *repeat("p", 4, 250)).of["p-0"]["remark"]
    weak = report(*repeat("w", 4, 251, batch_size=192)).of["w-0"]["remark"]
    alone = report(*repeat("one", 1, 1000)).of["one-0"]["remark"]
    assert "smaller share" in strong and "smaller share" not in weak + alone
    assert "batch" not in weak and "DDP" in alone and "batch" not in alone


# Of an NVIDIA H200: seconds of 300, 300 and 80 steps, and of each wait for the device, once in 20 steps.
H200 = {"b48": (8.267, 300, 0.009), "b48c": (9.82, 300, 0.0005), "b192": (5.815, 80, 0.06)}


@pytest.mark.parametrize("gradients", ["fp32", "bf16"])
@pytest.mark.parametrize(("name", "is_host"), [("b48", True), ("b48c", True), ("b192", False)])
def test_a_gpu_that_waits_for_its_host(report, name, is_host, gradients):
    """One worker under DDP took a fifth longer than the baseline; the queue of the GPU was nearly empty, or was not."""
    train, steps, wait = H200[name]
    work = GPU | {"steps": steps, "readings": steps // 20, "device_wait": wait * steps / 20, "compile": name == "b48c"}
    made = report(
        record("base", train=train, **work), record("p", 1, 1.21 * train, exchange=0.2, gradients=gradients, **work)
    )
    text = made.of["p"]["remark"]
    assert ("the GPU waits for its host" in text) == is_host
    assert ("a larger batch" in text) == is_host and text.endswith(ONCE)
    assert "not explained" not in text or not is_host


def test_a_gpu_that_waits_for_its_host_in_weak_scaling(report):
    work = GPU | {"steps": 10, "readings": 1, "device_wait": 0.1}
    text = report(*repeat("base", **work), *repeat("p", 4, 400, batch_size=192, **work)).of["p-0"]["remark"]
    assert "waits for its host" in text and "a larger batch per worker, also in the baseline" in text
    assert "repeat" not in text


def test_other_programs(report):
    """Of 400 s, workers that neither exchange nor wait have their cores for 240."""
    text = remark(report, 4, 400, cpu=240.0)
    assert text.startswith(
        "40% of the time (4 s per step) is lost to other programs, or other workers, on the same cores"
    )
    assert "batch" not in text and "not explained" not in text
    # Nor do they need the same machine to be busy twice.
    busy = [record(f"p{number}", 4, 300 + 100 * number, cpu=240.0, batch_size=192) for number in range(3)]
    assert "lost to other programs" in report(*busy).of["p0"]["remark"]


def test_waiting_for_ranks_whose_cores_are_taken_is_not_a_cause_of_its_own(report):
    assert "lost to other programs" in remark(report, 4, 400, waiting=120.0, cpu=220.0)
    assert "lost to other programs" not in remark(report, 4, 400, waiting=120.0, cpu=270.0)


def test_a_baseline_beside_other_programs_is_named(report):
    """It got 600 of 800 s, as did the workers: to the speedup, nothing of this is lost."""
    made = report(record("base", cpu=600.0), record("p", 4, 250, cpu=187.5))
    assert made.of["base"]["lost_cpu"] == pytest.approx(0.25) and made.of["base"]["preempted"] == 0
    assert made.of["p"]["preempted"] == pytest.approx(0.25 - 0.8 * 0.25)
    assert made.of["base"]["remark"].startswith("25% of the time was lost to other programs")
    # Nobody can tell what limits a speedup that is too high.
    assert made.of["p"]["remark"].startswith("the baseline was slowed down by other programs; repeat both")


def test_a_gpu_needs_no_cpu_time(report):
    assert "preempted" not in report(record("base", **GPU), record("p", 4, 250, **GPU)).table()[0]


def test_below_the_scatter_no_cause_is_named(report):
    assert remark(report, 4, 204, exchange=4.0) is None
    made = report(*repeat("more", micro_batch_size=6), *repeat("q", 2, 420, exchange=20.0))
    assert made.of["q-0"]["useful"] == pytest.approx(800 / 840) and "exchanging" in made.of["q-0"]["remark"]


@pytest.mark.parametrize("exchange", [0.0, 40.0])
def test_equal_runs_that_differ_by_more_than_what_is_lost(report, exchange):
    """A slow fourth run among three: the median does not show it."""
    runs = [record(f"p{number}", 4, train, exchange=exchange) for number, train in enumerate((250, 251, 252, 600))]
    made = report(*repeat("base"), *runs)
    assert made.of["p0"]["useful"] == pytest.approx(0.8, abs=0.01)
    text = "equal runs took 250.0 to 600.0 s, and differ by more than the loss to be explained;"
    assert made.of["p0"]["remark"].startswith(text)
    assert "250.0-600.0" in made.text


def test_what_is_measured_within_a_run_is_named_where_equal_runs_differ_less_than_what_is_lost(report):
    """Of 20 % that are lost, 10 % are exchange: that the baselines differ by 7.5 % does not make it uncertain."""
    bases = [record(f"b{number}", train=train) for number, train in enumerate((780, 800, 840))]
    parts = {"exchange": 25.0, "waiting": 12.5, "cpu": 210.0}
    assert "10% of the time" in report(*bases, *repeat("p", 4, 250, **parts)).of["p-0"]["remark"]
    # The rest is what equal runs must agree on.
    text = report(*repeat("p", 4, 205)).of["p-0"]["remark"]
    assert text.startswith("equal runs took 780.0 to 840.0 s")


def test_a_baseline_that_scatters(report):
    bases = [record(f"b{number}", train=train) for number, train in enumerate((790, 800, 1200))]
    assert "took 790.0 to 1200.0 s" in report(*bases, *repeat("p", 4, 250)).of["p-0"]["remark"]


def test_an_efficiency_above_100_percent(report):
    assert remark(report, 4, 196) is None  # 102 %: within the scatter
    text = remark(report, 4, 150)
    assert text.startswith("efficiency above 100%; likely causes: ")
    assert all(cause in text for cause in ("baseline", "cache", "other programs"))


# ugly records ---------------------------------------------------------------------------------------------------------


def test_null_figures(report):
    empty = dict.fromkeys(["has_answer_exact", "has_answer_f1", "f1", "best_span_f1", "best_f1", "exact"])
    made = report(record("base"), record("p", 4, 250, **empty))
    assert [row["F1"] for row in made.table()[1]] == ["75.0", "-"]
    assert made.of["p"]["f1"] is None
    assert not re.search(r"\b(nan|None|inf)\b", "\n".join(made.lines))


PREDICTIONS = {"5ad3d560604f3c001a3ff2c7": "", "5ad3d560604f3c001a3ff2c8": "in 1066"}
DAMAGED = {
    "truncated": '{"schema": 3, "run_n',
    "empty": "",
    "binary": b"\xff\xfe\x00",
    "deep": "[" * 100_000,
    **{
        name: json.dumps({key: value for key, value in RECORD.items() if key != name})
        for name in ("seconds", "started", "resumed", "readings", "quality")
    },
    "null-section": json.dumps(RECORD | {"settings": None}),
    "list-section": json.dumps(RECORD | {"settings": [1]}),
    **{
        name: json.dumps(change(record("p", 4, 250), **values))
        for name, values in {
            "string": {"train": "fast"}, "zero": {"train": 0}, "negative": {"train": -1.0},
            "infinite": {"total": math.inf}, "nan": {"train": math.nan}, "no-train": {"train": None},
            "total-too-small": {"total": 1.0}, "negative-exchange": {"exchange": -1.0},
            "no-exchange": {"exchange": None}, "too-much-exchange": {"exchange": 250.0}, "no-cpu": {"cpu": None},
            "null-world": {"world_size": None}, "zero-world": {"world_size": 0}, "string-world": {"world_size": "2"},
            "no-steps": {"steps": 0}, "null-batch": {"batch_size": None}, "string-f1": {"f1": "good"},
            "null-features": {"trained_features": None}, "other-script": {"script": "train"},
            "list-script": {"script": ["baseline"]}, "commit": {"git_commit": ["a"]}, "file": {"train_file": 7},
        }.items()
    },
}  # fmt: skip
OTHER_FILES = {
    "predictions": (PREDICTIONS, "not a timing record, but other JSON, such as predictions"),
    "predictions-na": (
        dict.fromkeys(PREDICTIONS, -1.5),
        "not a timing record, but other JSON, such as predictions",
    ),
    "a-list": ([1, 2], "not a timing record, but other JSON, such as predictions"),
    "a-number": (7, "not a timing record, but other JSON, such as predictions"),
    "schema-1": ({"schema": 1, "script": "baseline", "work": {}}, "a timing record of schema 1, not 3; repeat the run"),
    "schema-2": (RECORD | {"schema": 2}, "a timing record of schema 2, not 3; repeat the run"),
}


@pytest.mark.parametrize("name", [*DAMAGED, *OTHER_FILES])
def test_what_is_no_record_is_named_for_what_it_is_and_skipped(tmp_path, report, name):
    if name in DAMAGED:
        content, said = DAMAGED[name], "damaged"
    else:
        content, said = OTHER_FILES[name]
        content = json.dumps(content)
    path = write_records(tmp_path, []) / f"{name}.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    made = report(record("base"), record("two", 2, 410))
    (line,) = [line for line in made.lines if line.startswith(f"{path}: skipped, ")]
    assert said in line and ("damaged" in line) == (name in DAMAGED)
    assert ("repeat the run" in line) == (said != "not a timing record, but other JSON, such as predictions")
    assert [row["run_name"] for row in made.rows] == [["base"], ["two"]]


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_whatever_one_record_holds_the_others_are_reported(tmp_path_factory, data):
    """Replace any one value of a record by any other."""
    # Its batch is its own: whatever its number of workers becomes, it is no repetition of the run of two.
    damaged = record("damaged", 4, 250, batch_size=96)
    section = data.draw(st.sampled_from([damaged, *(damaged[name] for name in SECTIONS)]))
    name = data.draw(st.sampled_from(sorted(set(section) - {"run_name", "schema"})))
    values = st.none() | st.integers(-2, 2) | st.floats() | st.text(max_size=3) | st.just([]) | st.just({})
    section[name] = data.draw(values)
    directory = tmp_path_factory.mktemp("damaged")
    results = write_records(directory, [record("base"), record("two", 2, 400), damaged])
    with pytest.MonkeyPatch.context() as patch:
        # Three files of one figure take most of the time; that it can be laid out is enough.
        patch.setattr(Figure, "savefig", lambda figure, *_, **__: figure.draw_without_rendering())
        patch.setattr(SummaryWriter, "add_figure", lambda *_: None)
        distributed.report(argparse.Namespace(output_dir=str(directory)))
    rows = json.loads((results / "speedup.json").read_text())
    (row,) = [row for row in rows if row["run_name"] == ["two"]]
    assert row["speedup"] == pytest.approx(2)


# what is shown --------------------------------------------------------------------------------------------------------


def test_the_table(report):
    made = report(record("base"), record("p", 4, 250, exchange=25.0, waiting=2.5, nodes=2))
    headings, (base, row) = made.table()
    assert headings == ["mode", "workers", "nodes", "batch", "n", "train s", "feat./s", "speedup", "eff.", "exch.",
                        "wait", "other", "F1"]  # fmt: skip
    shown = ["baseline", "1", "1", "48", "1", "800.0", "2.5", "1.00", "100%", "0%", "0%", "0%", "75.0"]
    assert list(base.values()) == shown
    shown = ["strong", "4", "2", "48", "1", "250.0", "8.0", "3.20", "80%", "10%", "1%", "9%", "75.0"]
    assert list(row.values()) == shown


def test_every_key_of_speedup_json_is_described(report):
    described = (ROOT / "results/README.md").read_text()
    keys = set(report(record("base"), record("p", 4, 250)).rows[0])
    assert keys == set(re.findall(r"^\| `(\w+)`", described, re.MULTILINE))
    assert {key for key, *_ in distributed.COLUMNS.items()} <= keys


@pytest.mark.parametrize("sample", [False, True])
def test_no_line_has_more_than_100_characters(report, sample):
    wide = {"nodes": 128, "batch_size": 98304, "gradients": "bf16", "trained_features": 10_539_000, "sample": sample}
    bases = repeat("base", 0, 999999.9, trained_features=10_539_000, sample=sample)
    runs = [record(f"w{number}", 1024, 123456.7 + number, cpu=60000.0, **wide) for number in range(12)]
    runs += [record("x", 1024, 123456.7, lr=1e-3, **wide), record("y", 1024, 234.5, lr=1e-4, **wide)]
    made = report(*bases, *runs)
    assert max(map(len, made.lines)) <= 100
    headings, rows = made.table()
    assert [row["mode"] for row in rows] == ["baseline", *["other batch bf16"] * 3]
    assert "123462.2" in made.text and "preempted" in made.text
    # What found no space in the first lines comes below them.
    last = "span F1" if sample else "F1"
    assert last not in headings and any(line.split()[-1:] == ["commit"] or last in line for line in made.lines)


@pytest.mark.parametrize("gradients", ["fp32", "bf16"])
def test_ranges_two_nodes_and_bf16_fit_on_one_line(report, gradients):
    runs = repeat("p", 2, 82.0, nodes=2, gradients=gradients, sample=True, batch_size=12)
    headings, _ = report(*repeat("base", 0, 95.0, sample=True, batch_size=12), *runs).table()
    assert headings[-1] == "span F1"


def test_the_files_of_the_figure(tmp_path, capsys):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    Report(tmp_path, [record("base"), record("p", 4, 250)], capsys)
    png = (tmp_path / "results/speedup-1.png").read_bytes()
    assert png.startswith(b"\x89PNG") and struct.unpack(">I", png[16:20])[0] == 3.5 * 300
    assert (tmp_path / "results/speedup-1.svg").read_text().startswith("<?xml")
    events = EventAccumulator(str(tmp_path / "logs/scaling"))
    events.Reload()
    assert events.Tags()["images"] == ["speedup-1"] and not events.Tags()["scalars"]


@pytest.fixture
def draw(tmp_path, capsys, monkeypatch):
    """Return a function that returns the figure of a report on some records, laid out."""
    figures = []
    draw = distributed.draw
    monkeypatch.setattr(distributed, "draw", lambda table: figures.append(draw(table)) or figures[-1])

    def make(*records):
        Report(tmp_path, records, capsys)
        return figures[-1]

    return make


def nine_rows():
    runs = [record(f"s{p}", p, 900 / p, nodes=nodes) for p, nodes in ((2, 1), (4, 1), (8, 2), (16, 4))]
    runs += [record(f"b{p}", p, 850 / p, nodes=nodes, gradients="bf16") for p, nodes in ((4, 1), (8, 2))]
    runs += [record(f"w{p}", p, 830 / p, nodes=nodes, batch_size=48 * p) for p, nodes in ((4, 1), (8, 2))]
    return [record("base"), *runs, record("other", 4, 220, batch_size=96, lr=1e-4)]


@pytest.mark.parametrize("count", [2, 3, 10])
def test_the_figure_hides_and_clips_nothing(draw, count):
    figure = draw(*nine_rows()[:count])
    top, bottom = figure.axes
    for artist in (*figure.legends, top, bottom):
        box, page = artist.get_tightbbox(), figure.bbox
        assert page.x0 <= box.x0 and box.x1 <= page.x1 and page.y0 <= box.y0 and box.y1 <= page.y1
        others = {*figure.legends, top, bottom} - {artist}
        assert not any(box.overlaps(other.get_tightbbox()) for other in others)
    series = [bars.lines[0] for bars in top.containers]
    assert len({line.get_marker() for line in series}) == len(series)
    (low, high), (left, right) = top.get_ylim(), top.get_xlim()
    for line in series:
        assert all(low < y < high for y in line.get_ydata()) and all(left < x < right for x in line.get_xdata())


@pytest.mark.parametrize("name", KNOWN)
def test_the_bars_add_up_to_100_percent(draw, name):
    workers, train, changed, parts = KNOWN[name]
    _, bottom = draw(record("base"), record("p", workers, train, **changed)).axes
    assert [bars.get_label() for bars in bottom.containers] == PARTS
    bars = [container[1] for container in bottom.containers]
    assert [bar.get_width() for bar in bars] == pytest.approx(parts)
    # They follow each other without a gap, those below zero to the left of it.
    right = 0
    for bar in bars:
        assert bar.get_x() == pytest.approx(right if bar.get_width() > 0 else 0) or bar.get_width() == 0
        right += max(0, bar.get_width())
    # Told apart without a color.
    assert len({bar.get_hatch() for bar in bars if bar is not bars[0]}) == 4


def test_ranges_and_ticks_of_the_figure(draw):
    runs = [record("d0", 4, 200), record("d1", 4, 250), record("d2", 4, 400)]
    top, _ = draw(*repeat("base"), *runs, record("slow", 2, 4000, gradients="bf16")).axes
    bars = {bars.get_label(): bars for bars in top.containers}
    (path,) = bars["strong"].lines[2][0].get_paths()
    assert sorted(path.vertices[:, 1]) == pytest.approx([0.999 * 2, 1.001 * 4])
    # One run has no range.
    assert all(math.isnan(y) for path in bars["strong bf16"].lines[2][0].get_paths() for y in path.vertices[:, 1])
    shown = [float(label.get_text()) for label in top.get_yticklabels()]
    assert shown == [0.125, 0.25, 0.5, 1, 2, 4]
    assert [label.get_text() for label in top.get_xticklabels()] == ["1", "2", "4"]


# real runs ------------------------------------------------------------------------------------------------------------


TICKS = os.sysconf("SC_CLK_TCK")


def read_busy_seconds():
    """Return the CPU time that all programs, and other virtual machines, have used so far."""
    user, nice, system, _, _, *rest = map(int, Path("/proc/stat").read_text().split()[1:9])
    return (user + nice + system + sum(rest)) / TICKS


class Trained:
    """A run on a few steps of the sample; `others` is how many cores' worth of time other programs took meanwhile."""

    def __init__(self, directory, name, world_size=None, cores=(), base=None):
        directory.mkdir()
        script = "distributed.py" if world_size else "baseline.py"
        arguments = ["--sample", "--max-steps", 8, "--run-name", name]
        arguments += ["--dev-file", cut_sample("dev", 20, directory / "dev.json")]  # to be evaluated quickly
        before, start = read_busy_seconds(), time.monotonic()
        run = Run(script, arguments, directory, world_size, before=f"import os; os.sched_setaffinity(0, {[*cores]})")
        own = {}
        while run.is_alive():
            for process in run.processes:
                with contextlib.suppress(OSError, IndexError):
                    fields = Path(f"/proc/{process.pid}/stat").read_text().rsplit(")", 1)[1].split()
                    own[process.pid] = (int(fields[11]) + int(fields[12])) / TICKS
            time.sleep(0.05)
        assert not any(run.wait().statuses), run.error
        taken = read_busy_seconds() - before - sum(own.values())
        self.others = taken / (time.monotonic() - start)
        self.record = json.loads((directory / f"results/{name}.json").read_text())
        if base is not None:
            write_records(directory, [base.record])
            distributed.report(argparse.Namespace(output_dir=str(directory)))
            rows = json.loads((directory / "results/speedup.json").read_text())
            (self.row,) = [row for row in rows if row["run_name"] == [name]]


@pytest.mark.alone
def test_workers_beside_other_programs(tmp_path):
    """Two ranks on two cores: alone, beside two busy loops, and bound to one of the cores."""
    cores = sorted(os.sched_getaffinity(0))[:2]
    if len(cores) < 2:
        pytest.skip("needs two cores")
    # Its server, from which ranks are forked, starts with imports that would count as another program.
    Run("baseline.py", ["--help"], tmp_path).wait()
    base = Trained(tmp_path / "base", "base", cores=cores)
    alone = Trained(tmp_path / "alone", "alone", 2, cores, base)
    if base.others + alone.others > 0.1:
        pytest.skip(f"other programs used {base.others:.0%} and {alone.others:.0%} of a core: too busy to tell")
    assert alone.row["lost_cpu"] == alone.row["preempted"] == 0
    assert "other programs" not in (alone.row["remark"] or "")

    loops = [subprocess.Popen(["taskset", "-c", str(core), sys.executable, "-c", "while True: pass"]) for core in cores]
    try:
        busy = Trained(tmp_path / "busy", "busy", 2, cores, base)
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()
    bound = Trained(tmp_path / "bound", "bound", 2, cores[:1], base)
    for run in (busy, bound):
        assert "lost to other programs, or other workers, on the same cores" in run.row["remark"]
        assert "batch" not in run.row["remark"] and run.row["preempted"] > 0.1


# as a user starts it --------------------------------------------------------------------------------------------------


def test_report_as_a_user_starts_it(tmp_path):
    results = write_records(tmp_path, [record("base"), record("two", 2, 410), record("four", 4, 250)])
    (results / "damaged.json").write_text('{"schema": 3')
    process = run_script("distributed.py", ["--report"], tmp_path, environment={"MPLBACKEND": "nonsense"})
    assert process.returncode == 0 and process.stderr == "", process.stderr
    lines = process.stdout.splitlines()
    assert lines[0].startswith("results/damaged.json: skipped, damaged")
    assert "results/speedup-1.png and .svg, also in TensorBoard" in lines
    rows = json.loads((results / "speedup.json").read_text())
    assert [row["speedup"] for row in rows] == pytest.approx([1, 800 / 410, 3.2])
    again = run_ranks("distributed.py", ["--report"], tmp_path)
    assert again.output == process.stdout  # its own files are no records


def test_without_a_baseline_there_are_times_and_no_ratios(report):
    made = report(record("two", 2, 390), record("four", 4, 250))
    advice = "make one with run_baseline.sh (for weak scaling, leave out --max-steps: it needs whole epochs)"
    assert f"no speedup without a baseline of the same work; {advice}" in " ".join(made.text.split())
    assert made.text.count("no speedup without") == 1
    columns = ["train s", "feat./s", "speedup", "eff.", "exch.", "wait", "other"]
    assert [[row[column] for column in columns] for row in made.table()[1]] == [
        ["390.0", "5.1", "-", "-", "0%", "0%", "-"],
        ["250.0", "8.0", "-", "-", "0%", "0%", "-"],
    ]
    assert made.figures == [] and made.of["two"]["speedup"] is None and "100%" not in made.text


def test_a_baseline_alone_is_a_table_without_a_figure(report):
    made = report(record("base"))
    assert len(made.table()[1]) == 1 and made.figures == []


def test_without_records(tmp_path):
    run = Run("distributed.py", ["--report"], tmp_path).wait()
    assert run.status == 2 and run.output == ""
    advice = "results: no timing records; make some with run_baseline.sh and run_ddp.sh"
    assert run.error == f"distributed.py: error: {advice}\n"


def test_with_records_of_an_older_schema_only(tmp_path):
    (write_records(tmp_path, []) / "old.json").write_text(json.dumps(RECORD | {"schema": 2}))
    run = Run("distributed.py", ["--report"], tmp_path).wait()
    assert run.status == 2 and len(run.error.splitlines()) == 1
    assert run.output == "results/old.json: skipped, a timing record of schema 2, not 3; repeat the run\n"


def test_reports_of_jobs_that_end_together(tmp_path):
    """Each prints all there is, and leaves the files complete."""
    results = write_records(tmp_path, [record("base"), record("p", 4, 250)])
    reports = [Run("distributed.py", ["--report"], tmp_path) for _ in range(4)]
    for one in reports:
        assert one.wait().statuses == [0] and one.error == "", one.error
    assert len({one.output for one in reports}) == 1
    assert [row["run_name"] for row in json.loads((results / "speedup.json").read_text())] == [["base"], ["p"]]


def test_a_hundred_records_take_seconds(tmp_path, capsys):
    """CPU time, so that a busy machine takes no longer; far more than the second that it takes."""
    records = [record(f"base{number}") for number in range(4)]
    for workers in (2, 4, 8, 16):
        for batch in (48, 48 * workers):
            for gradients in ("fp32", "bf16"):
                name = f"{workers}-{batch}-{gradients}"
                values = {"batch_size": batch, "gradients": gradients}
                records += [record(f"{name}-{n}", workers, 820 / workers + n, **values) for n in range(6)]
    assert len(records) == 100
    start = time.process_time()
    Report(tmp_path, records, capsys)
    assert time.process_time() - start < 6
