"""Real torchrun and gloo: any number of workers does the mathematics of the baseline."""

import json
import math

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

import baseline
from conftest import ENCODER, ROOT, TINY, cut_sample, read_scalars, run_script, write_model


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    """Small real work: several windows for a context, a batch no world size divides, and a last one of one feature."""
    directory = tmp_path_factory.mktemp("data")
    files = cut_sample("train", 24, directory / "train.json"), cut_sample("dev", 20, directory / "dev.json")
    arguments = ["--model", ENCODER, "--train-file", files[0], "--dev-file", files[1], "--threads", 1, "--dropout", 0]
    return [*arguments, "--batch-size", 17, "--max-length", 128, "--doc-stride", 32, "--lr", 5e-4, "--epochs", 1]


@pytest.fixture(scope="module")
def train(arguments, tmp_path_factory):
    """Return a function that runs a script once for its arguments and returns what it left behind."""
    runs = {}

    def train(script, world_size=None, *more):
        key = script, world_size, *more
        if key not in runs:
            directory = tmp_path_factory.mktemp("run")
            extra = ["--run", "r", "--predictions", "answers.json", *more]
            process = run_script(script, [*arguments, *extra], directory, world_size)
            assert process.returncode == 0, process.stderr
            runs[key] = {
                "output": process.stdout,
                "record": json.loads((directory / "results/r.json").read_text()),
                "scalars": read_scalars(directory / "logs/r"),
                "weights": load_file(directory / "checkpoints/r/model/model.safetensors"),
                "answers": json.loads((directory / "answers.json").read_text()),
                "no_answer_scores": json.loads((directory / "answers-na.json").read_text()),
                "directory": directory,
            }
        return runs[key]

    return train


# The softmax does not see a constant added to all logits or to all of a query's scores: the gradient of these is zero
# but for rounding, which AdamW scales up to full steps.
WITHOUT_GRADIENT = {"qa_outputs.bias", "bert.encoder.layer.5.output.LayerNorm.bias"}
WITHOUT_GRADIENT |= {f"bert.encoder.layer.{layer}.attention.self.key.bias" for layer in range(6)}


def relative_difference(values, reference):
    return max(abs(value - wanted) / abs(wanted) for value, wanted in zip(values, reference, strict=True))


def check_same(run, base):
    assert list(run["scalars"]["train/loss"]) == list(base["scalars"]["train/loss"])
    losses = (list(run["scalars"]["train/loss"].values()), list(base["scalars"]["train/loss"].values()))
    assert relative_difference(*losses) < 1e-4
    for name, weights in base["weights"].items():
        assert name in WITHOUT_GRADIENT or (run["weights"][name] - weights).abs().max() < 1e-4, name
    quality, wanted = run["record"]["quality"], base["record"]["quality"]
    assert quality["dev_loss"] == pytest.approx(wanted["dev_loss"], rel=1e-4)
    assert {name: quality[name] for name in ("exact", "f1")} == {name: wanted[name] for name in ("exact", "f1")}
    assert list(run["answers"]) == list(base["answers"])  # the union over the ranks: each question once, in order
    assert run["answers"] == base["answers"]
    assert quality["best_span_f1"] == pytest.approx(wanted["best_span_f1"])
    assert run["no_answer_scores"] == pytest.approx(base["no_answer_scores"], rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_every_world_does_the_mathematics_of_the_baseline(train, world_size):
    base, run = train("baseline.py"), train("distributed.py", world_size)
    work = base["record"]["work"]
    assert work["features"] % work["global_batch_size"] == 1  # one rank alone has a share of the last batch
    assert work["features"] > work["questions"] and work["steps"] == 4
    check_same(run, base)
    # 1e-4 is little beside how far the weights went.
    start = load_file(f"{ENCODER}/model.safetensors")["encoder.layer.0.output.dense.weight"]
    assert (base["weights"]["bert.encoder.layer.0.output.dense.weight"] - start).abs().median() > 5e-4
    assert run["record"]["workers"] == {"world_size": world_size, "nodes": 1, "threads": 1}
    assert sum(line.startswith("rank ") for line in run["output"].splitlines()) == world_size


def test_micro_batches_add_up(train):
    check_same(train("distributed.py", 2, "--micro-batch-size", "2"), train("baseline.py"))
    check_same(train("baseline.py", None, "--micro-batch-size", "3"), train("baseline.py"))


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        # The mean of local means, as DDP gives by itself.
        ('weight = dist.get_world_size() / batch_size if batch_size > RANK else 0.0',
         'weight = 1 / sum(len(inputs["input_ids"]) for inputs in passes)'),
        # Examples repeated until the ranks have equally many, as DistributedSampler does.
        ('return batch[RANK :: dist.get_world_size()] if len(batch) > RANK else batch[:1]',
         'return np.resize(batch, -(-len(batch) // dist.get_world_size()) * dist.get_world_size())'
         '[RANK :: dist.get_world_size()]'),
    ],
    ids=["local means", "repeated examples"],
)  # fmt: skip
def test_the_common_mistakes_do_not_pass(train, arguments, tmp_path, right, wrong):
    source = (ROOT / "distributed.py").read_text()
    assert source.count(right) == 1
    (tmp_path / "distributed.py").write_text(source.replace(right, wrong))
    process = run_script(tmp_path / "distributed.py", [*arguments, "--run", "r"], tmp_path, 2)
    assert process.returncode == 0, process.stderr
    losses = list(read_scalars(tmp_path / "logs/r")["train/loss"].values())
    assert relative_difference(losses, train("baseline.py")["scalars"]["train/loss"].values()) > 1e-4


def test_what_a_run_leaves_behind(train):
    run = train("distributed.py", 2)
    record, scalars = run["record"], run["scalars"]
    assert set(scalars) >= {
        "train/loss",
        "train/lr",
        "train/features_per_s",
        "epoch/dev_loss",
        "epoch/exact",
        "epoch/f1",
    }
    steps = record["work"]["steps"]
    assert list(scalars["train/loss"]) == list(range(1, steps + 1))
    assert list(scalars["train/lr"].values()) == pytest.approx([5e-4 * rate for rate in (1, 3 / 4, 2 / 4, 1 / 4)])
    assert scalars["epoch/f1"] == {steps: pytest.approx(record["quality"]["f1"])}
    assert set(run["no_answer_scores"]) == set(run["answers"])
    answered = {id_ for id_, score in run["no_answer_scores"].items() if score <= 0}
    assert answered == {id_ for id_, text in run["answers"].items() if text}
    seconds = record["seconds"]
    assert seconds["train"] == sum(seconds["train_epochs"])
    parts = ("setup", "warm_up", "data", "train", "evaluate", "measure")
    assert 0 < sum(seconds[part] for part in parts) <= seconds["total"]
    assert record["throughput"]["features_per_s"] == record["work"]["features"] / seconds["train"]
    assert 0 < record["step"]["compute"] < seconds["train"] and record["throughput"]["mfu"] is None
    assert record["step"]["imbalance"] >= 0 and train("baseline.py")["record"]["step"]["communication"] == 0
    keys = "schema script run started workers work environment seconds step throughput memory quality restarts"
    assert list(record) == keys.split()
    base = train("baseline.py")["record"]
    assert {part: list(base[part]) for part in record if isinstance(record[part], dict)} == {
        part: list(record[part]) for part in record if isinstance(record[part], dict)
    }
    # Only the finished record lies there: it was written aside and renamed.
    names = sorted(path.name for path in (run["directory"] / "results").iterdir())
    assert names == ["r.json", "speedup.json"]  # no figure without a baseline


def test_the_saved_model_gives_the_same_answers(train, arguments, monkeypatch, tmp_path):
    run = train("baseline.py")
    path = str(run["directory"] / "checkpoints/r/model")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["baseline.py", *map(str, arguments), "--model", path])
    options = baseline.parse_options(baseline.build_parser())
    options.precision = "fp32"
    _, _, dev, _ = baseline.load_data(options)
    model = transformers.BertForQuestionAnswering.from_pretrained(path)
    quality, answers = baseline.evaluate(model, *dev, options, torch.device("cpu"))
    assert quality["dev_loss"] == pytest.approx(run["record"]["quality"]["dev_loss"], rel=1e-5)
    assert {id_: score for _, id_, _, score, *_ in answers} == pytest.approx(
        run["no_answer_scores"], rel=1e-4, abs=1e-4
    )


def test_nothing_is_compiled_once_training_has_begun(arguments, tmp_path, monkeypatch):
    """Not for a length that equals the model's width, not for a pass of one feature."""
    model = write_model(tmp_path, **TINY | {"hidden_size": 64})
    monkeypatch.chdir(tmp_path)
    options = ["--model", model, "--random-init", "--compile", "--precision", "fp32", "--batch-size", 9]
    options += ["--micro-batch-size", 4, "--max-length", 64, "--doc-stride", 16]
    monkeypatch.setattr("sys.argv", ["baseline.py", *map(str, [*arguments, *options])])
    options, device = baseline.parse_options(baseline.build_parser()), torch.device("cpu")
    _, features, _, _ = baseline.load_data(options)
    model, lengths = baseline.load_model(options, device), np.array(features["length"][:])
    (batches,) = baseline.plan_epochs(lengths, options)
    baseline.warm_up(model, features, lengths, batches, options, device)
    shapes = set()
    with torch.compiler.set_stance("fail_on_recompile"):
        for batch, passes in zip(batches, baseline.load_passes(batches, features, options, device), strict=True):
            baseline.backward(model, passes, len(batch), options, device)
            shapes |= {inputs["input_ids"].shape for inputs in passes}
    assert {1, 4} <= {count for count, _ in shapes} and 64 in {length for _, length in shapes} and len(shapes) > 5


def test_prepare_fetches_the_weights_too(arguments, tmp_path, monkeypatch):
    loaded = []
    load = transformers.BertForQuestionAnswering.from_pretrained
    monkeypatch.setattr(
        transformers.BertForQuestionAnswering, "from_pretrained", lambda *a, **k: loaded.append(a) or load(*a, **k)
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["baseline.py", *map(str, arguments), "--prepare", "--run", "p"])
    baseline.main()
    assert loaded == [(ENCODER,)]
    assert not list(tmp_path.glob("results/*")) and not list(tmp_path.glob("logs/*"))


def test_a_finished_run_is_left_alone(train, arguments):
    directory = train("baseline.py")["directory"]
    before = (directory / "results/r.json").read_bytes()
    process = run_script("baseline.py", [*arguments, "--run", "r"], directory)
    assert process.returncode == 0 and "is finished" in process.stdout
    assert (directory / "results/r.json").read_bytes() == before


@pytest.mark.parametrize(("script", "world_size"), [("baseline.py", None), ("distributed.py", 2)])
def test_a_loss_that_is_not_finite_stops_the_run(arguments, tmp_path, script, world_size):
    model = transformers.BertForQuestionAnswering.from_pretrained(ENCODER)
    torch.nn.init.constant_(model.qa_outputs.weight, math.inf)
    model.save_pretrained(tmp_path / "model")
    transformers.AutoTokenizer.from_pretrained(ENCODER).save_pretrained(tmp_path / "model")
    process = run_script(script, [*arguments, "--model", tmp_path / "model", "--run", "r"], tmp_path, world_size)
    assert process.returncode == 1
    lines = [line for line in process.stderr.splitlines() if line.startswith(script)]
    assert lines == [f"{script}: error: stopped: the loss is nan at step 1"]
    assert not (tmp_path / "results/r.json").exists() and not (tmp_path / "checkpoints/r/model").exists()


def test_the_loss_does_not_see_padding():
    """A feature has the same loss beside short ones and beside long ones; the model's own loss does not."""
    import transformers

    model = transformers.BertForQuestionAnswering.from_pretrained(ENCODER).eval()
    options = baseline.build_parser().parse_args(["--precision", "fp32"])
    pad = torch.nn.functional.pad
    ids, losses, own = torch.randint(1000, 2000, (1, 30)), [], []
    for padding in (0, 50):
        mask = pad(torch.ones_like(ids), (0, padding))
        inputs = {"input_ids": pad(ids, (0, padding)), "attention_mask": mask, "token_type_ids": mask}
        inputs |= {"start_positions": torch.tensor([3]), "end_positions": torch.tensor([5])}
        losses.append(baseline.forward(model, dict(inputs), options, torch.device("cpu"))[0].item())
        own.append(model(**inputs).loss.item())
        logits = baseline.forward(model, dict(inputs), options, torch.device("cpu"))[1][:, :30]
        assert torch.allclose(logits, model(**inputs).start_logits[:, :30], atol=1e-5)  # the mask is the model's own
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) == pytest.approx(own[0], rel=1e-5)
    assert abs(own[1] - own[0]) > 0.1
