"""The scaling report on constructed records, whose figures are known, and as a user starts it."""

import copy
import itertools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import distributed
from conftest import read_scalars, run_script

RECORD = {
    "schema": 1, "script": "baseline", "run": "base", "started": "2026-01-01T00:00:00+00:00",
    "workers": {"world_size": 1, "nodes": 1, "threads": 8},
    "work": {
        "model": "bert", "parameters": 100, "random_init": False, "sha256": "a", "dev_sha256": "b", "features": 1000,
        "trained_features": 2000, "epochs": 2, "max_length": 384, "doc_stride": 128, "precision": "bf16",
        "questions": 900, "seed": 42, "steps": 40,
        "compile": False, "dropout": 0.1, "optimizer": "AdamW", "global_batch_size": 48,
        "micro_batch_size": None, "lr": 5e-5,
    },
    "environment": {"device": "EPYC", "torch": "2.13.0", "nccl": None},
    "seconds": {"train": 800.0, "measure": 20.0, "total": 920.0},
    "step": {"compute": 18.0, "imbalance": 0.0, "communication": 0.0, "input": 0.5},
    "throughput": {"features_per_s": 2.5},
    "restarts": {"resumed": 0, "steps_repeated": 0},
    "quality": {"train_loss": 1.0, "dev_loss": 1.1, "exact": 70.0, "f1": 75.0},
}  # fmt: skip


def record(run, workers=1, train=800.0, total=None, script="distributed", **changed):
    """Return RECORD with another time and, as section__key=value, other fields."""
    made = copy.deepcopy(RECORD) | {"run": run, "script": script}
    made["workers"]["world_size"] = workers
    made["seconds"] = {"train": train, "measure": 20.0, "total": (total or train + 100) + 20}
    made["throughput"]["features_per_s"] = 2000 / train
    for name, value in changed.items():
        section, key = name.split("__")
        made[section][key] = value
    return made


def scale(records, directory):
    """Return (rows, excluded) of the records, written to and read from the directory as the report does."""
    for one in records:
        (directory / f"{one['run']}.json").write_text(json.dumps(one))
    return distributed.scaling_rows(distributed.group_records(distributed.read_records(directory)))


def row_of(rows, run):
    return next(row for row in rows if run in row["runs"])


def test_figures_by_hand(tmp_path):
    rows, excluded = scale(
        [record("base", script="baseline"), record("one", 1, 820), record("four", 4, 250, 400)], tmp_path
    )
    assert excluded == []
    base, one, four = (row_of(rows, run) for run in ("base", "one", "four"))
    assert (base["mode"], base["speedup"], base["efficiency"], base["serial_fraction"]) == ("baseline", 1, 1, None)
    assert one["speedup"] == pytest.approx(800 / 820)
    assert four["mode"] == "DDP strong"
    assert four["speedup"] == pytest.approx(3.2) and four["efficiency"] == pytest.approx(0.8)
    assert four["serial_fraction"] == pytest.approx((1 / 3.2 - 1 / 4) / (1 - 1 / 4)) == pytest.approx(1 / 12)
    assert four["end_to_end_speedup"] == pytest.approx(900 / 400)
    assert four["worker_hours"] == pytest.approx(1000 / 3600)
    assert four["n"] == 1 and four["features_per_s"] == 8


def test_amdahls_serial_fraction_is_found_again(tmp_path):
    """5 % serial work on 16 processors: S = 9.14 by Amdahl's law."""
    speedup = 1 / (0.05 + 0.95 / 16)
    rows, _ = scale([record("base", script="baseline"), record("p", 16, 800 / speedup)], tmp_path)
    assert row_of(rows, "p")["serial_fraction"] == pytest.approx(0.05)


def test_repetitions_are_grouped(tmp_path):
    bases = [record(f"b{i}", script="baseline", train=seconds) for i, seconds in enumerate((790, 800, 840))]
    rows, _ = scale([*bases, record("d0", 2, 400), record("d1", 2, 420)], tmp_path)
    row = row_of(rows, "d0")
    assert (row["n"], row["train_seconds"], row["train_seconds_spread"]) == (2, 410, [400, 420])
    assert row["speedup"] == pytest.approx(800 / 410)
    assert row["speedup_spread"] == pytest.approx([790 / 420, 840 / 400])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("work__precision", "fp32"), ("work__model", "other"), ("work__random_init", True), ("work__sha256", "z"),
        ("work__dev_sha256", "z"), ("work__epochs", 1), ("work__max_length", 256), ("work__doc_stride", 64),
        ("work__questions", 7), ("work__compile", True), ("work__dropout", 0.0), ("work__trained_features", 48),
        ("workers__threads", 4),
        ("environment__device", "A100"), ("environment__torch", "2.12.0"), ("work__optimizer", "SGD"),
    ],
)  # fmt: skip
def test_differing_work_has_no_ratio(tmp_path, field, value):
    rows, excluded = scale([record("base", script="baseline"), record("p", 4, 250, **{field: value})], tmp_path)
    assert "speedup" not in row_of(rows, "p")
    section, key = field.split("__")
    assert excluded == [{"runs": ["p"], "differs": {field.replace("__", "."): [RECORD[section][key], value]}}]


def test_threads_do_not_matter_where_a_worker_is_a_gpu(tmp_path):
    gpu = {"environment__device": "A100", "environment__nccl": "2.28.9"}
    records = [record("base", script="baseline", **gpu), record("p", 4, 250, workers__threads=4, **gpu)]
    rows, excluded = scale(records, tmp_path)
    assert excluded == [] and row_of(rows, "p")["speedup"] == pytest.approx(3.2)


def test_the_confounded_case_this_project_was_born_from(tmp_path, capsys):
    """An FP32 baseline of batch 8 against TF32 on four GPUs with batch 32 was reported as a speedup of 7.94."""
    base = record("base", script="baseline", train=3828, work__precision="fp32", work__global_batch_size=8)
    four = record("four", 4, 482, work__precision="tf32", work__global_batch_size=32)
    rows, excluded = scale([base, four], tmp_path)
    assert "speedup" not in row_of(rows, "four")
    assert excluded[0]["differs"] == {"work.precision": ["fp32", "tf32"]}


def test_another_batch_is_weak_scaling(tmp_path):
    rows, _ = scale([record("base", script="baseline"), record("w", 4, 220, work__global_batch_size=192)], tmp_path)
    assert row_of(rows, "w")["mode"] == "DDP weak" and row_of(rows, "w")["speedup"] == pytest.approx(800 / 220)


def test_the_base_is_the_fastest_of_the_same_batch(tmp_path):
    slow = record("slow", script="baseline", train=1000)
    fast = record("fast", script="baseline", train=800, work__micro_batch_size=12)
    other = record("other", script="baseline", train=500, work__global_batch_size=96)
    rows, _ = scale([slow, fast, other, record("p", 2, 500)], tmp_path)
    assert row_of(rows, "p")["base_runs"] == ["fast"] and row_of(rows, "p")["speedup"] == pytest.approx(1.6)


def test_where_efficiency_is_lost(tmp_path):
    """800 s on one worker, 250 s on four: 20 % of the workers' time is lost, by hand here in its parts.

    Of 250 s, 40 steps of 4.8 s compute (the base's 720 s / 4 = 180 s: 12 s more), 0.3 s communicate (12 s), 0.1 s wait
    for the slowest (4 s), 0.2 s wait for input (8 s; of the base's 20 s / 4 = 5 s: 3 s more). The base's rest is
    60 s / 4 = 15 s, theirs 34 s: 19 s more. 12 + 12 + 4 + 3 + 19 = 50 s of 250 s.
    """
    four = record("four", 4, 250)
    four["step"] = {"compute": 4.8, "communication": 0.3, "imbalance": 0.1, "input": 0.2}
    rows, _ = scale([record("base", script="baseline"), four], tmp_path)
    lost = row_of(rows, "four")["lost"]
    expected = {"communication": 12, "imbalance": 4, "smaller batches": 12, "input": 3, "rest": 19}
    assert lost == pytest.approx({name: seconds / 250 for name, seconds in expected.items()})
    assert sum(lost.values()) == pytest.approx(1 - row_of(rows, "four")["efficiency"]) == pytest.approx(0.2)
    assert set(row_of(rows, "base")["lost"].values()) == {0.0}


@settings(max_examples=50, deadline=None)
@given(workers=st.integers(1, 64), seconds=st.floats(1, 1e4), parts=st.lists(st.floats(0, 10), min_size=8, max_size=8))
def test_the_parts_add_up_whatever_was_measured(workers, seconds, parts):
    names = ["compute", "communication", "imbalance", "input"]
    base, other = record("base", script="baseline"), record("p", workers, seconds, work__steps=17)
    for one, values in ((base, parts[:4]), (other, parts[4:])):
        one["step"] = dict(zip(names, values, strict=True))
    row = distributed.scaling_row([distributed.flatten(other)], [distributed.flatten(base)])
    assert sum(row["lost"].values()) == pytest.approx(1 - row["efficiency"], rel=1e-6, abs=1e-6)


def spread(values):
    return distributed.spread([{"seconds.train": value} for value in values])


# The interval leaves out as many values on each side as the sign test's critical value, which every table of statistics
# has (two-sided, 5 %): 0 for n = 6 to 8, 1 for 9 to 11, ...
CRITICAL = {6: 0, 7: 0, 8: 0, 9: 1, 10: 1, 11: 1, 12: 2, 15: 3, 17: 4, 20: 5, 25: 7, 30: 9, 50: 17}


@pytest.mark.parametrize("n", CRITICAL)
def test_the_interval_is_that_of_the_table(n):
    values = [10.0 * rank for rank in range(n)]
    assert spread(reversed(values)) == [10 * CRITICAL[n], 10 * (n - 1 - CRITICAL[n])]


@pytest.mark.parametrize("n", [6, 9, 12])
def test_the_interval_holds_the_median_as_often_as_it_says(n):
    """By counting: each of n values is below or above the median, all 2 ** n ways alike."""
    low, high = spread(range(n))
    below = [sum(way) for way in itertools.product((0, 1), repeat=n)]
    covered = sum(low < count <= high for count in below) / 2**n
    narrower = sum(low + 1 < count <= high - 1 for count in below) / 2**n
    assert narrower < 0.95 <= covered


def test_fewer_than_six_have_a_range():
    assert spread([3, 1, 2]) == [1, 3] and spread([7]) == [7, 7]


def test_the_interval_is_carried_through_the_ratio(tmp_path):
    bases = [record(f"b{i}", script="baseline", train=seconds) for i, seconds in enumerate(range(800, 900, 10))]
    rows, _ = scale([*bases, *(record(f"d{i}", 2, 400 + i) for i in range(10))], tmp_path)
    row = row_of(rows, "d0")
    assert row["n"] == 10 and row["train_seconds_spread"] == [401, 408]
    assert row["speedup_spread"] == pytest.approx([810 / 408, 880 / 401])


def test_amdahl_is_drawn_on(tmp_path):
    """e = 1/12 from 3.2 on 4 workers: 5.05 on 8, 7.11 on 16, never more than 12; with 3 on 4, e = 1/9."""
    rows, _ = scale([record("base", script="baseline"), record("two", 2, 410), record("four", 4, 250)], tmp_path)
    prediction = distributed.predict_speedup(rows)
    assert prediction.pop("bound_spread") == pytest.approx([12, 12])
    assert (prediction.pop("nodes"), prediction.pop("precision")) == (1, "bf16")
    assert prediction == pytest.approx({"workers": 4, "e": 1 / 12, "bound": 12})
    assert [distributed.amdahl(1 / 12, workers) for workers in (4, 8, 16)] == pytest.approx([3.2, 96 / 19, 64 / 9])
    rows, _ = scale([record("slower", 4, 800 / 3)], tmp_path)
    low, high = distributed.predict_speedup(rows)["bound_spread"]
    assert (low, high) == pytest.approx((9, 12))
    # Where the largest run is superlinear, a smaller one says nothing about it.
    rows, _ = scale([record("eight", 8, 90)], tmp_path)
    assert distributed.predict_speedup(rows) is None


def test_quality_against_the_noise_of_seeds(tmp_path):
    records = [record("base", script="baseline"), record("near", 2, 400, quality__f1=75.3)]
    rows, _ = scale([*records, record("far", 4, 250, quality__f1=74.5)], tmp_path)
    assert row_of(rows, "near")["f1_difference"] == pytest.approx(0.3) and row_of(rows, "near")["f1_within_noise"]
    assert row_of(rows, "far")["f1_difference"] == pytest.approx(-0.5) and not row_of(rows, "far")["f1_within_noise"]
    # Three seeds of the base with a standard deviation of 1: now 0.5 is little.
    seeds = [record(f"s{i}", script="baseline", work__seed=i, quality__f1=75 + i) for i in (-1, 1)]
    rows, _ = scale(seeds, tmp_path)
    assert row_of(rows, "base")["n"] == 3 and row_of(rows, "far")["f1_within_noise"]


def test_interrupted_runs_count_only_where_there_are_no_others(tmp_path):
    resumed = record("resumed", 2, 500)
    resumed["restarts"] = {"resumed": 1, "steps_repeated": 3}
    rows, _ = scale([record("base", script="baseline"), resumed], tmp_path)
    assert row_of(rows, "resumed")["resumed"] == ["resumed"] and row_of(rows, "resumed")["speedup"] == 1.6
    rows, _ = scale([record("whole", 2, 400)], tmp_path)
    assert row_of(rows, "whole")["runs"] == ["whole"] and row_of(rows, "whole")["speedup"] == 2


@settings(max_examples=50, deadline=None)
@given(workers=st.integers(2, 1024), base=st.floats(1, 1e5), time=st.floats(1, 1e5))
def test_identities(workers, base, time):
    records = [record("base", script="baseline", train=base), record("p", workers, time)]
    rows, _ = distributed.scaling_rows([[distributed.flatten(one)] for one in records])
    row = row_of(rows, "p")
    assert row["efficiency"] * workers == pytest.approx(row["speedup"]) == pytest.approx(base / time)
    # Amdahl's law with the serial fraction gives the speedup back.
    e = row["serial_fraction"]
    assert 1 / (e + (1 - e) / workers) == pytest.approx(row["speedup"], rel=1e-6)


def report(directory):
    return run_script("distributed.py", ["--report"], directory)


def test_report_as_a_user_starts_it(tmp_path):
    results = tmp_path / "results"
    results.mkdir()
    records = [record("base", script="baseline"), record("two", 2, 390), record("four", 4, 250)]
    records += [record("fp32", 4, 300, work__precision="fp32")]
    for one in records:
        (results / f"{one['run']}.json").write_text(json.dumps(one))
    (results / "damaged.json").write_text('{"schema": 1')
    (results / "other.json").write_text('{"schema": 7}')
    (results / "unscored.json").write_text(json.dumps(record("unscored", 2, 390, quality__f1=None)))
    process = report(tmp_path)
    assert process.returncode == 0, process.stderr
    assert [line.split(":")[0] for line in process.stderr.splitlines()] == [
        "results/damaged.json",
        "results/other.json",
        "results/unscored.json",
    ]
    lines = process.stdout.splitlines()
    assert "3.20" in next(line for line in lines if "DDP strong" in line and line.split()[0] == "4")
    assert "no ratio for fp32: work.precision 'fp32' (baseline: 'bf16')" in lines
    assert any(line.startswith("n = 1") for line in lines)
    assert (
        "2 workers on 1 nodes, DDP strong, bf16: efficiency above 100 %: the baseline is not the best sequential run"
        in lines
    )
    written = json.loads((results / "speedup.json").read_text())
    assert written["schema"] == 3 and len(written["rows"]) == 4 and len(written["excluded"]) == 1
    assert (results / "speedup.png").read_bytes().startswith(b"\x89PNG")
    assert (results / "speedup.svg").read_text().startswith("<?xml")
    curve = read_scalars(tmp_path / "logs/scaling/DDP-strong-bf16")
    assert curve["scaling/speedup"] == {2: pytest.approx(800 / 390), 4: pytest.approx(3.2)}
    assert report(tmp_path).stdout == process.stdout  # its own files are no records


def test_without_a_baseline_there_are_times_and_no_ratios(tmp_path):
    (tmp_path / "results").mkdir()
    (tmp_path / "results/two.json").write_text(json.dumps(record("two", 2, 390)))
    process = report(tmp_path)
    assert process.returncode == 0
    assert "390.0" in process.stdout and "no record of baseline.py" in process.stdout
    assert not (tmp_path / "results/speedup.png").exists()


def test_without_records(tmp_path):
    process = report(tmp_path)
    assert process.returncode == 2
    assert process.stderr == "distributed.py: error: results: no timing records to report on\n"
