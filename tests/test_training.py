"""Real ranks over gloo: any number of workers does the mathematics of the baseline, and what a run leaves behind."""

import collections
import json
import math
import re
import string
import sys

import pytest
import torch
import transformers
from safetensors.torch import load_file

import baseline
from conftest import ENCODER, ROOT, TINY, cut_sample, read_scalars, run_script, write_model
from ranks import Run, errors_of_ranks, run_ranks

WORLDS = [("baseline.py", None), ("distributed.py", 2)]
STEPS = 8


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Small real work: a model of two narrow layers, and questions whose contexts fill several windows."""
    directory = tmp_path_factory.mktemp("data")
    cut_sample("train", 28, directory / "train.json")
    cut_sample("dev", 20, directory / "dev.json")
    write_model(directory / "model", **TINY)
    return directory


@pytest.fixture(scope="module")
def data(files):
    """Short windows, in batches of 29, which no world size divides; the last of an epoch has one feature."""
    data = ["--train-file", files / "train.json", "--dev-file", files / "dev.json", "--threads", 1, "--dropout", 0]
    return [*data, "--batch-size", 29, "--max-length", 64, "--doc-stride", 16, "--run-name", "r"]


@pytest.fixture(scope="module")
def arguments(files, data):
    return [*data, "--model", files / "model", "--random-init", "--lr", 5e-4]


def left_behind(directory):
    """Return what a finished run left in its directory."""
    return {
        "directory": directory,
        "record": json.loads((directory / "results/r.json").read_text()),
        "scalars": read_scalars(directory / "logs/r"),
        "weights": load_file(directory / "checkpoints/r/model/model.safetensors"),
        "answers": json.loads((directory / "answers.json").read_text()),
        "no_answer_scores": json.loads((directory / "answers-na.json").read_text()),
        "spans": json.loads((directory / "answers-spans.json").read_text()),
    }


@pytest.fixture(scope="module")
def train(arguments, tmp_path_factory):
    """Return a function that runs a script once for its arguments and returns what it left behind."""
    runs = {}

    def train(script, world_size=None, *more):
        key = script, world_size, *more
        if key not in runs:
            directory = tmp_path_factory.mktemp("run")
            run_ranks(script, [*arguments, "--predictions", "answers.json", *more], directory, world_size)
            runs[key] = left_behind(directory)
        return runs[key]

    return train


def change(directory, *changes, before=""):
    """Write distributed.py with (right, wrong) pieces exchanged, and with some lines before all others."""
    source = (ROOT / "distributed.py").read_text()
    for right, wrong in changes:
        assert source.count(right) == 1, right
        source = source.replace(right, wrong)
    (directory / "distributed.py").write_text(before + source)
    return directory / "distributed.py"


def relative_difference(values, reference):
    return max(abs(value - wanted) / abs(wanted) for value, wanted in zip(values, reference, strict=True))


def without_gradient(layers):
    """Name the weights whose gradient is zero but for rounding, which AdamW scales up to full steps.

    The softmax does not see a constant added to all logits or to all of a query's scores.
    """
    names = {f"bert.encoder.layer.{layer}.attention.self.key.bias" for layer in range(layers)}
    return names | {"qa_outputs.bias", f"bert.encoder.layer.{layers - 1}.output.LayerNorm.bias"}


def check_same(run, base, layers=2):
    assert list(run["scalars"]["loss/train"]) == list(base["scalars"]["loss/train"])
    losses = (list(run["scalars"]["loss/train"].values()), list(base["scalars"]["loss/train"].values()))
    assert relative_difference(*losses) < 1e-4
    for name, weights in base["weights"].items():
        assert name in without_gradient(layers) or (run["weights"][name] - weights).abs().max() < 1e-4, name
    quality, wanted = run["record"]["quality"], base["record"]["quality"]
    assert quality["dev_loss"] == pytest.approx(wanted["dev_loss"], rel=1e-4)
    assert {name: quality[name] for name in ("exact", "f1")} == {name: wanted[name] for name in ("exact", "f1")}
    assert list(run["answers"]) == list(base["answers"])  # the union over the ranks: each question once, in order
    assert run["answers"] == base["answers"] and run["spans"] == base["spans"]
    assert quality["best_span_f1"] == pytest.approx(wanted["best_span_f1"])
    assert run["no_answer_scores"] == pytest.approx(base["no_answer_scores"], rel=1e-3, abs=1e-3)


# the mathematics ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_every_world_does_the_mathematics_of_the_baseline(train, world_size):
    base, run = train("baseline.py"), train("distributed.py", world_size)
    settings = base["record"]["settings"]
    assert settings["train_features"] % settings["batch_size"] == 1  # one rank alone has a share of the last batch
    assert settings["train_features"] > settings["train_questions"] and settings["steps"] == STEPS
    check_same(run, base)
    assert run["record"]["workers"] == {"world_size": world_size, "nodes": 1, "threads": 1}
    assert run["record"]["settings"]["world_size"] == world_size


def test_the_weights_went_far(train):
    """Beside how far they went, the 1e-4 by which weights may differ is little."""
    first = train("baseline.py", None, "--max-steps", "1")["weights"]
    for name, weights in train("baseline.py")["weights"].items():
        if weights.ndim == 2 and "embeddings" not in name:
            assert (weights - first[name]).abs().median() > 5e-4, name


@pytest.mark.parametrize("world_size", [2, 5])
def test_micro_batches_add_up(train, world_size):
    check_same(train("distributed.py", world_size, "--micro-batch-size", "2"), train("baseline.py"))
    check_same(train("baseline.py", None, "--micro-batch-size", "3"), train("baseline.py"))


WEIGHT = "    weight = WORLD_SIZE / len(indices)\n"
PADDED = """
    padded = np.resize(np.arange(len(indices)), -(-len(indices) // WORLD_SIZE) * WORLD_SIZE)
    indices = indices[padded]
    lengths = lengths[padded]
"""
MISTAKES = {
    # As DDP does by itself.
    "local means": (WEIGHT, "    weight = 1 / max(1, len(indices[RANK::WORLD_SIZE]))\n"),
    # As DistributedSampler does, until the ranks have equally many.
    "repeated examples": (WEIGHT, PADDED + WEIGHT),
    "a surplus feature that counts": ("        weight = 0.0\n", ""),
    "the loss of one rank": ("dist.all_reduce(sums)", "sums *= WORLD_SIZE"),
    "one micro-batch exchanged": ("start + size >= len(indices)", "start == 0"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_common_mistakes_do_not_pass(train, arguments, tmp_path, mistake):
    script = change(tmp_path, MISTAKES[mistake])
    run_ranks(script, [*arguments, "--micro-batch-size", 2], tmp_path, 2)
    losses = list(read_scalars(tmp_path / "logs/r")["loss/train"].values())
    assert relative_difference(losses, train("baseline.py")["scalars"]["loss/train"].values()) > 1e-4


@pytest.fixture(scope="module")
def encoder_runs(data, tmp_path_factory):
    """Train the packaged encoder for two steps, with both scripts; with two workers, as a user starts them."""
    arguments = [*data, "--model", ENCODER, "--lr", 5e-4, "--max-steps", 2, "--batch-size", 7]
    arguments += ["--predictions", "answers.json"]
    directories = [tmp_path_factory.mktemp("encoder") for _ in WORLDS]
    base = run_ranks("baseline.py", arguments, directories[0])
    process = run_script("distributed.py", arguments, directories[1], 2)
    assert process.returncode == 0, process.stderr
    outputs = [base.output, process.stdout]
    return [left_behind(directory) | {"output": output} for directory, output in zip(directories, outputs, strict=True)]


def test_the_packaged_encoder(encoder_runs):
    base, run = encoder_runs
    check_same(run, base, layers=6)
    assert base["record"]["settings"]["model_sha256"] == run["record"]["settings"]["model_sha256"] is not None
    for output in (base["output"], run["output"]):  # rank 0 alone speaks
        lines = output.splitlines()
        assert sum(line.startswith("step ") for line in lines) == 2 and sum("dev set" in line for line in lines) == 1


def test_the_loss_does_not_see_padding(files, arguments):
    """A feature has the same loss beside short ones and beside long ones; the model's own loss does not."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.from_pretrained(files / "model", num_labels=2)
    model = transformers.BertForQuestionAnswering(config).eval()
    args = baseline.build_parser().parse_args(["--precision", "fp32"])
    args.device = torch.device("cpu")
    ids = torch.randint(1000, 2000, (1, 30))
    losses = []
    own = []
    labels = {"start_position": torch.tensor([13]), "end_position": torch.tensor([15])}
    with torch.no_grad():
        for padding in (0, 50):
            padded = torch.nn.functional.pad(ids, (0, padding))
            position = torch.arange(30 + padding)[None]
            is_token = position < 30
            token_types = (is_token & (position >= 9)).int()
            inputs = {"input_ids": padded, "is_token": is_token, "token_types": token_types, **labels}
            loss, start_logits, _ = baseline.forward(model, inputs, args)
            losses.append(loss.item())
            theirs = model(
                padded,
                attention_mask=is_token.long(),
                token_type_ids=token_types,
                start_positions=labels["start_position"],
                end_positions=labels["end_position"],
            )
            own.append(theirs.loss.item())
            assert torch.allclose(start_logits[:, :30], theirs.start_logits[:, :30], atol=1e-5)
            assert start_logits[:, 30:].eq(-math.inf).all()
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) == pytest.approx(own[0], rel=1e-5)
    assert abs(own[1] - own[0]) > 0.1


def test_nothing_is_compiled_once_training_has_begun(arguments, tmp_path, monkeypatch):
    """Not for a length that equals the model's width, not for a micro-batch of one feature."""
    shapes, warm_up, train_step, evaluate = set(), baseline.warm_up, baseline.train_step, baseline.evaluate

    def watched_warm_up(*given):
        warm_up(*given)
        torch.compiler.set_stance("fail_on_recompile")

    def watched_train_step(model, split, indices, lengths, args):
        for start in range(0, len(indices), args.micro_batch_size):
            micro_batch = lengths[start : start + args.micro_batch_size]
            shapes.add((len(micro_batch), int(micro_batch.max())))
        return train_step(model, split, indices, lengths, args)

    def eager_evaluate(*given):
        with torch.compiler.set_stance("force_eager"):
            return evaluate(*given)

    monkeypatch.setattr(baseline, "warm_up", watched_warm_up)
    monkeypatch.setattr(baseline, "train_step", watched_train_step)
    monkeypatch.setattr(baseline, "evaluate", eager_evaluate)
    options = ["--compile", "--batch-size", 9, "--micro-batch-size", 4]
    start_in_process(monkeypatch, tmp_path, [*arguments, *options])
    try:
        baseline.main()
    finally:
        torch.compiler.set_stance("default")
    assert {1, 4} <= {count for count, _ in shapes} and 64 in {length for _, length in shapes} and len(shapes) > 5
    record = json.loads((tmp_path / "results/r.json").read_text())
    assert record["settings"]["compile"] and record["seconds"]["warm_up"] > 0


# what a run leaves behind ---------------------------------------------------------------------------------------------


def start_in_process(monkeypatch, directory, arguments):
    """Make baseline.main() see these arguments; it may have a signal handler of its own until the test ends."""
    import signal

    monkeypatch.chdir(directory)
    monkeypatch.setattr(sys, "argv", ["baseline.py", *map(str, arguments)])
    monkeypatch.setattr(signal, "signal", lambda *_: None)


RECORD = "schema run_name started resumed readings workers settings environment seconds throughput memory quality"
QUALITY = "train_loss dev_loss exact f1 has_answer_exact has_answer_f1 no_answer_accuracy best_f1 best_f1_threshold"
SECTIONS = {
    "workers": "world_size nodes threads",
    "environment": "device hosts torch cuda nccl transformers python slurm_job_id git_commit variables",
    "seconds": "train exchange waiting cpu device_wait data warm_up evaluate checkpoint total",
    "throughput": "features_per_s tokens_per_s",
    "memory": "peak_bytes",
    "quality": f"{QUALITY} best_span_f1 best_span_exact",
}


@pytest.mark.parametrize(("script", "world_size"), WORLDS)
def test_the_record(train, script, world_size):
    record = train(script, world_size)["record"]
    assert record["schema"] == 3 and list(record) == RECORD.split()
    for section, names in SECTIONS.items():
        assert set(record[section]) == set(names.split()), section
    seconds, settings = record["seconds"], record["settings"]
    assert settings["script"] == script.removesuffix(".py") and record["resumed"] == 0
    parts = [seconds[part] for part in ("warm_up", "data", "train", "evaluate")]
    assert min(parts) > 0 and sum(parts) <= seconds["total"] and seconds["checkpoint"] == 0
    assert settings["train_out_of_reach"] >= 0 and settings["dev_out_of_reach"] >= 0
    commit = record["environment"]["git_commit"]
    assert commit is None or re.fullmatch("[0-9a-f]{40}(-dirty)?", commit)
    assert settings["trained_features"] == 2 * settings["train_features"]
    assert record["throughput"]["features_per_s"] == settings["trained_features"] / seconds["train"]
    assert record["throughput"]["tokens_per_s"] == settings["trained_tokens"] / seconds["train"]
    assert record["memory"]["peak_bytes"] > 100e6 and record["environment"]["python"] == sys.version.split()[0]
    if world_size:
        assert seconds["exchange"] > 0 and seconds["waiting"] >= 0 and settings["gradients"] == "fp32"
        assert seconds["exchange"] + seconds["waiting"] < seconds["train"]
    else:
        assert seconds["exchange"] is None and seconds["waiting"] is None and settings["gradients"] is None


def test_the_records_of_both_scripts_have_the_same_keys(train, encoder_runs):
    for base, run in ((train("baseline.py"), train("distributed.py", 2)), encoder_runs):
        assert set(base["record"]["settings"]) == set(run["record"]["settings"])
        different = {
            name for name, value in base["record"]["settings"].items() if run["record"]["settings"][name] != value
        }
        assert different == {"script", "world_size", "gradients"}


@pytest.mark.parametrize(("script", "world_size"), WORLDS)
def test_tensorboard(train, script, world_size):
    run = train(script, world_size)
    scalars, quality = run["scalars"], run["record"]["quality"]
    dev_tags = {"loss/dev": "dev_loss", "score/exact": "exact", "score/f1": "f1", "score/best_f1": "best_f1"}
    assert set(scalars) == {"loss/train", "speed/features_per_s", "lr", *dev_tags}
    for tag in ("loss/train", "speed/features_per_s", "lr"):
        assert list(scalars[tag]) == list(range(1, STEPS + 1))
    assert list(scalars["lr"].values()) == pytest.approx([5e-4 * (STEPS - step) / STEPS for step in range(STEPS)])
    for tag, name in dev_tags.items():
        assert list(scalars[tag]) == [STEPS // 2, STEPS]
        assert scalars[tag][STEPS] == pytest.approx(quality[name])
    last_epoch = list(scalars["loss/train"].values())[STEPS // 2 :]
    assert quality["train_loss"] == pytest.approx(sum(last_epoch) / len(last_epoch))


@pytest.mark.parametrize(("script", "world_size"), WORLDS)
def test_only_finished_files_lie_there(train, script, world_size):
    directory = train(script, world_size)["directory"]
    assert [path.name for path in (directory / "checkpoints/r").iterdir()] == ["model"]
    assert (directory / "results/r.json").exists() and not list(directory.glob("**/*.partial"))


# predictions ----------------------------------------------------------------------------------------------------------


def official_words(text):
    """Split as the official scorer does: lower case, no punctuation, no articles."""
    text = "".join(" " if character.isspace() else character for character in text.lower())
    words = "".join(character for character in text if character not in string.punctuation).split()
    return [word for word in words if word not in ("a", "an", "the")]


def official_scores(dev_file, predictions):
    """Return {id: (exact, F1)} and {id: whether it has an answer}, as the official scorer counts."""
    scores, has_answer = {}, {}
    articles = json.loads(dev_file.read_text())["data"]
    for question in (qa for article in articles for paragraph in article["paragraphs"] for qa in paragraph["qas"]):
        golds = [words for answer in question["answers"] if (words := official_words(answer["text"]))] or [[]]
        words, pairs = official_words(predictions[question["id"]]), []
        for gold in golds:
            common = sum((collections.Counter(gold) & collections.Counter(words)).values())
            f1 = 2 * common / (len(gold) + len(words)) if gold and words else float(gold == words)
            pairs.append((float(gold == words), f1))
        scores[question["id"]] = max(exact for exact, _ in pairs), max(f1 for _, f1 in pairs)
        has_answer[question["id"]] = bool(question["answers"])
    return scores, has_answer


def official_best_f1(dev_file, predictions, no_answer_scores):
    """Return the best F1 and its threshold: from nothing answered, answer one more question after another."""
    scores, has_answer = official_scores(dev_file, predictions)
    total = sum(not has for has in has_answer.values())
    best, threshold = total, 0.0
    for id_ in sorted(no_answer_scores, key=no_answer_scores.get):
        if has_answer[id_]:
            total += scores[id_][1]
        elif predictions[id_]:
            total -= 1
        if total > best:
            best, threshold = total, no_answer_scores[id_]
    return 100 * best / len(scores), threshold


@pytest.mark.parametrize(("script", "world_size"), WORLDS)
def test_the_official_scorer_finds_the_same_figures(train, files, script, world_size):
    run = train(script, world_size)
    quality = run["record"]["quality"]
    scores, _ = official_scores(files / "dev.json", run["answers"])
    exact, f1 = (100 * sum(values) / len(scores) for values in zip(*scores.values(), strict=True))
    assert (quality["exact"], quality["f1"]) == (pytest.approx(exact), pytest.approx(f1))
    best_f1, _ = official_best_f1(files / "dev.json", run["spans"], run["no_answer_scores"])
    assert quality["best_f1"] == pytest.approx(best_f1)
    assert set(run["answers"]) == set(run["spans"]) == set(run["no_answer_scores"])
    for id_, score in run["no_answer_scores"].items():
        assert run["spans"][id_] and run["answers"][id_] == (run["spans"][id_] if score <= 0 else "")


@pytest.mark.parametrize(("script", "world_size"), WORLDS)
def test_the_spans_are_needed_where_the_best_threshold_is_above_0(arguments, files, tmp_path, script, world_size):
    """Where all questions have an answer and the model gives none, answering all of them is best."""
    content = json.loads((files / "dev.json").read_text())
    for paragraph in (paragraph for article in content["data"] for paragraph in article["paragraphs"]):
        paragraph["qas"] = [qa for qa in paragraph["qas"] if qa["answers"]]
    dev_file = tmp_path / "answerable.json"
    dev_file.write_text(json.dumps(content))
    run_ranks(script, [*arguments, "--dev-file", dev_file, "--predictions", "answers.json"], tmp_path, world_size)
    run = left_behind(tmp_path)
    quality = run["record"]["quality"]
    assert quality["best_f1_threshold"] > 0 and quality["best_f1"] > quality["f1"] + 1
    best_f1, threshold = official_best_f1(dev_file, run["spans"], run["no_answer_scores"])
    assert quality["best_f1"] == pytest.approx(best_f1)
    assert quality["best_f1_threshold"] == pytest.approx(threshold)
    assert official_best_f1(dev_file, run["answers"], run["no_answer_scores"])[0] < best_f1 - 1


def test_the_saved_model_gives_the_same_answers(train, arguments, monkeypatch, tmp_path):
    run = train("baseline.py")
    model = run["directory"] / "checkpoints/r/model"
    options = [option for option in arguments if option != "--random-init"]
    start_in_process(monkeypatch, tmp_path, [*options, "--model", model])
    args = baseline.parse_args()
    baseline.set_up_device(args)
    tokenizer, model, _ = baseline.load_model(args)
    dev = baseline.load_split("validation", args.dev_file, tokenizer, args)
    quality, answers = baseline.evaluate(model, dev, args)
    assert quality["dev_loss"] == pytest.approx(run["record"]["quality"]["dev_loss"], rel=1e-5)
    scores = {answer.id: answer.no_answer_score for answer in answers}
    assert scores == pytest.approx(run["no_answer_scores"], rel=1e-4, abs=1e-4)
    assert {answer.id: answer.text for answer in answers} == run["spans"]


# options --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("script", "world_size"), WORLDS)
def test_evaluations_change_no_weight(arguments, tmp_path, script, world_size):
    """With dropout: an evaluation draws no random number."""
    weights = []
    for name, more in (("few", []), ("many", ["--evaluate-every", 3])):
        run_ranks(script, [*arguments, "--dropout", 0.2, "--run-name", name, *more], tmp_path, world_size)
        weights.append((tmp_path / f"checkpoints/{name}/model/model.safetensors").read_bytes())
    assert weights[0] == weights[1]
    few, many = (read_scalars(tmp_path / f"logs/{name}") for name in ("few", "many"))
    assert few["loss/train"] == many["loss/train"]
    assert list(few["loss/dev"]) == [4, 8] and list(many["loss/dev"]) == list(many["score/f1"]) == [3, 6, 8]
    assert few["loss/dev"][8] == many["loss/dev"][8]


def test_prepare_loads_the_weights_too(data, tmp_path, monkeypatch):
    loaded, load = [], transformers.BertForQuestionAnswering.from_pretrained

    def watched_load(*given, **options):
        loaded.append(given)
        return load(*given, **options)

    monkeypatch.setattr(transformers.BertForQuestionAnswering, "from_pretrained", watched_load)
    start_in_process(monkeypatch, tmp_path, [*data, "--model", ENCODER, "--prepare"])
    baseline.main()
    assert loaded == [(ENCODER,)]
    assert not list(tmp_path.glob("results/*")) and not list(tmp_path.glob("logs/*"))


def contents(directory):
    return {path: path.read_bytes() for path in directory.glob("*/**/*") if path.is_file()}


@pytest.mark.parametrize(("script", "world_size"), WORLDS)
def test_a_finished_run_is_left_alone(train, arguments, script, world_size):
    directory = train(script, world_size)["directory"]
    before = contents(directory)
    arguments = [*arguments, "--predictions", "answers.json"]
    run = Run(script, [*arguments, "--checkpoint-every", 2], directory, world_size).wait()  # which changes no result
    assert run.status == 0 and run.error == ""
    assert "results/r.json: this run is finished; for another one, give another --run-name\n" in run.output
    for more, said in ((["--lr", 0.01], "made with lr 0.0005, not 0.01"), (["--epochs", 3], "epochs 2, not 3")):
        run = Run(script, [*arguments, *more], directory, world_size).wait()
        assert run.status == 2
        for line in errors_of_ranks(run.error, world_size).values():
            assert line.startswith("results/r.json") and said in line
    assert contents(directory) == before


# errors ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def infinite(files):
    """A model whose first loss is not a number: its logits exceed what a float holds."""
    config = transformers.AutoConfig.from_pretrained(files / "model", num_labels=2)
    model = transformers.BertForQuestionAnswering(config)
    torch.nn.init.constant_(model.qa_outputs.weight, 3e38)
    model.save_pretrained(files / "infinite")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (files / "infinite" / name).write_bytes((files / "model" / name).read_bytes())
    return ["--model", files / "infinite"]


NOT_FINITE = "error: stopped: the loss is not finite at step 1; try a lower --lr"


@pytest.mark.parametrize(("script", "world_size"), WORLDS)
def test_a_loss_that_is_not_finite_stops_the_run(data, infinite, tmp_path, script, world_size):
    for _ in range(3 if world_size else 1):  # rank 0 alone says it, whichever rank is faster
        run = Run(script, [*data, *infinite], tmp_path, world_size).wait()
        assert run.status == 1 and run.error == f"{script}: {NOT_FINITE}\n"
    assert not (tmp_path / "results/r.json").exists() and not (tmp_path / "checkpoints/r/model").exists()


# The last update makes the weights NaN, after the last training loss was computed.
NAN_AT_THE_END = """
import torch
step = torch.optim.AdamW.step
count = []
@torch.no_grad()
def last_step(optimizer):
    step(optimizer)
    count.append(1)
    if len(count) == 2:
        for group in optimizer.param_groups:
            for weight in group["params"]:
                weight.fill_(float("nan"))
torch.optim.AdamW.step = last_step
"""


@pytest.mark.parametrize(("script", "world_size"), WORLDS)
def test_weights_that_are_not_finite_in_the_end(arguments, tmp_path, script, world_size):
    run = Run(script, [*arguments, "--max-steps", 2], tmp_path, world_size, before=NAN_AT_THE_END).wait()
    assert run.status == 1 and run.error == f"{script}: {NOT_FINITE.replace('step 1', 'step 2')}\n"
    assert not (tmp_path / "results/r.json").exists()


# Reading the file of questions fails, on the ranks that are named.
UNREADABLE = """
import os, pathlib
read_bytes = pathlib.Path.read_bytes
def fail_to_read(path):
    if path.name == "train.json" and os.environ["RANK"] in "{ranks}":
        raise OSError("no such disk")
    return read_bytes(path)
pathlib.Path.read_bytes = fail_to_read
"""


@pytest.mark.parametrize("failing", ["0123", "2", "13"])
def test_each_rank_prints_its_own_error(arguments, tmp_path, failing):
    before = UNREADABLE.format(ranks=failing)
    run = Run("distributed.py", arguments, tmp_path, 4, {"SLURMD_NODENAME": "node7"}, before).wait()
    errors = errors_of_ranks(run.error, 4)
    assert run.status == 2 and set(errors) <= {int(rank) for rank in failing}
    assert set(errors.values()) == {"no such disk"}
    for rank in set(errors) - {0}:
        assert f"distributed.py: rank {rank} on node7: error: no such disk\n" in run.error


def test_an_error_of_one_rank_under_torchrun(arguments, tmp_path):
    script = change(tmp_path, before=UNREADABLE.format(ranks="1"))
    process = run_script(script, arguments, tmp_path, 2, {"SLURMD_NODENAME": "node7"})
    assert process.returncode == 1  # torchrun's own
    # The script's own lines, and no traceback of a rank; what torchrun adds is torchrun's.
    lines = [line for line in process.stderr.splitlines() if line.startswith("distributed.py")]
    assert lines == ["distributed.py: rank 1 on node7: error: no such disk"]
    assert "[rank" not in process.stderr and 'distributed.py", line' not in process.stderr, process.stderr
    assert not list((tmp_path / "results").iterdir())


# In the third step of the training, the rank that is named is killed, or fails by a mistake in the code.
AT_STEP_3 = """
import os, signal, torch
steps = []
clip = torch.nn.utils.clip_grad_norm_
def watched_clip(*given):
    steps.append(1)
    if len(steps) == 3 and os.environ.get("RANK", "0") == "{rank}":
        {action}
    return clip(*given)
torch.nn.utils.clip_grad_norm_ = watched_clip
"""
LOST = "lost the connection to another rank, which probably failed first"


@pytest.mark.parametrize("rank", [0, 1])
def test_a_lost_peer_is_one_line(arguments, tmp_path, rank):
    before = AT_STEP_3.format(rank=rank, action="os.kill(os.getpid(), signal.SIGKILL)")
    run = Run("distributed.py", arguments, tmp_path, 2, before=before).wait()
    assert run.statuses[rank] == -9 and run.statuses[1 - rank] == 2
    ((survivor, error),) = errors_of_ranks(run.error, 2).items()
    assert survivor == 1 - rank and error.startswith(LOST)


def test_a_mistake_in_the_code_keeps_its_traceback(arguments, tmp_path):
    run = Run("distributed.py", arguments, tmp_path, 2, before=AT_STEP_3.format(rank=1, action="undefined")).wait()
    assert run.status and "NameError: name 'undefined' is not defined" in run.error and "Traceback" in run.error


@pytest.mark.parametrize(("script", "world_size"), WORLDS)
def test_out_of_memory_is_one_line(arguments, tmp_path, script, world_size):
    """A step asks for more than any machine has."""
    before = AT_STEP_3.format(rank=0, action="torch.empty(1 << 55)")
    run = Run(script, arguments, tmp_path, world_size, before=before).wait()
    errors = errors_of_ranks(run.error, world_size)
    assert run.statuses[0] == 2 and errors[0] == "out of memory: set a lower --micro-batch-size"
    assert all(error == errors[0] or error.startswith(LOST) for error in errors.values())


# the disk -------------------------------------------------------------------------------------------------------------

# The kernel refuses to write files beyond a size, as it does on a full disk. The model has 8 MB.
NO_SPACE_FOR_THE_MODEL = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))"
# TensorBoard's files cannot be written any more after some of them were.
NO_SPACE_FOR_TENSORBOARD = """
import errno
from tensorboard.summary.writer.record_writer import RecordWriter
write, written = RecordWriter.write, []
def write_a_few(writer, data):
    written.append(data)
    if len(written) > 8:
        raise OSError(errno.ENOSPC, "No space left on device")
    write(writer, data)
RecordWriter.write = write_a_few
"""


@pytest.mark.parametrize(("script", "world_size"), WORLDS)
def test_a_disk_on_which_the_model_does_not_fit(train, arguments, tmp_path, script, world_size):
    quality = train(script, world_size)["record"]["quality"]
    arguments = [*arguments, "--predictions", "answers.json"]
    run = Run(script, arguments, tmp_path, world_size, before=NO_SPACE_FOR_THE_MODEL).wait()
    (error,) = errors_of_ranks(run.error, 1).values()
    assert run.status == 1 and error.startswith("checkpoints/r/model: cannot be written: ")
    assert error.endswith("; results/r.json is complete")
    assert json.loads((tmp_path / "results/r.json").read_text())["quality"] == quality
    assert (tmp_path / "answers-spans.json").exists()


@pytest.mark.parametrize(("script", "world_size"), WORLDS)
def test_a_disk_that_is_full_for_tensorboard(train, arguments, tmp_path, script, world_size):
    quality = train(script, world_size)["record"]["quality"]
    options = ["--checkpoint-every", 3]
    run = Run(script, [*arguments, *options], tmp_path, world_size, before=NO_SPACE_FOR_TENSORBOARD).wait()
    assert not any(run.statuses) and run.error == ""
    (line,) = [line for line in run.output.splitlines() if line.startswith("logs/r: ")]
    assert "No space left on device" in line and line.endswith("; TensorBoard shows no later steps")
    assert json.loads((tmp_path / "results/r.json").read_text())["quality"] == quality
    assert (tmp_path / "checkpoints/r/model/model.safetensors").exists()


# the clock ------------------------------------------------------------------------------------------------------------

# A clock that the named operations set ahead by 100 s, as if they took so long: a busy machine does not matter.
AHEAD = """
import os, time, torch
from tensorboard.summary.writer.event_file_writer import EventFileWriter
from transformers import BertForQuestionAnswering
perf_counter, ahead = time.perf_counter, []
time.perf_counter = lambda: perf_counter() + 100 * len(ahead)
def set_ahead(owner, name, condition=lambda *given: True):
    operation = getattr(owner, name)
    def slow_operation(*given):
        if condition(*given):
            ahead.append(name)
        return operation(*given)
    setattr(owner, name, slow_operation)
"""
SLOW_WRITING = """
set_ahead(os, "replace", lambda source, target: str(target).endswith("last.pt"))
set_ahead(EventFileWriter, "flush")
set_ahead(BertForQuestionAnswering, "eval")
"""
SLOW_DEVICE = """
set_ahead(torch.Tensor, "tolist")
"""


@pytest.mark.parametrize(("script", "world_size"), WORLDS)
@pytest.mark.parametrize("part", ["checkpoint", "evaluate"])
def test_the_clock_stands_still_while_the_run_saves_or_evaluates(arguments, tmp_path, part, script, world_size):
    """After every second step; and nothing is flushed on the clock after the others."""
    run = Run(script, [*arguments, f"--{part}-every", 2], tmp_path, world_size, before=AHEAD + SLOW_WRITING).wait()
    assert not any(run.statuses), run.error
    seconds = json.loads((tmp_path / "results/r.json").read_text())["seconds"]
    assert seconds[part] > 100 * (STEPS // 2 - 1)
    assert seconds["train"] < 100
    assert sum(seconds[part] for part in ("train", "evaluate", "checkpoint", "data", "warm_up")) < seconds["total"]
    if world_size:
        assert seconds["exchange"] + seconds["waiting"] < seconds["train"]


@pytest.mark.parametrize(("script", "world_size"), WORLDS)
def test_the_wait_for_the_device_is_measured_and_takes_no_cpu_time(arguments, tmp_path, script, world_size):
    run = Run(script, arguments, tmp_path, world_size, before=AHEAD + SLOW_DEVICE).wait()
    assert not any(run.statuses), run.error
    seconds = json.loads((tmp_path / "results/r.json").read_text())["seconds"]
    assert 100 * STEPS < seconds["device_wait"] < seconds["train"] < 100 * (STEPS + 1)
    assert 0 < seconds["cpu"] < 100


# Note the collective operations of a rank in their order: those of our own, and the exchange of gradients.
COLLECTIVES = """
import os, pathlib, torch.distributed as dist
calls = pathlib.Path("collectives-" + os.environ["RANK"])
def watch(name):
    operation = getattr(dist, name)
    def watched(*given, **options):
        is_large = name == "all_reduce" and given[0].numel() > 1000
        with calls.open("a") as file:
            print("gradients" if is_large else name, file=file)
        return operation(*given, **options)
    setattr(dist, name, watched)
for name in ("all_reduce", "all_gather_object", "barrier"):
    watch(name)
"""


@pytest.mark.parametrize("read_every", [1, 3])
def test_one_small_exchange_a_reading(train, arguments, tmp_path, read_every):
    """The waits are gathered only where the run evaluates, saves or ends, which here is at steps 4, 5 and 8."""
    script = change(tmp_path, ('"cpu": 1', f'"cpu": {read_every}'))
    options = ["--checkpoint-every", 5]
    run = Run(script, [*arguments, *options], tmp_path, 2, before=COLLECTIVES).wait()
    assert not any(run.statuses), run.error
    losses = train("distributed.py", 2)["scalars"]["loss/train"]
    assert read_scalars(tmp_path / "logs/r")["loss/train"] == losses
    readings = sorted({4, 5, 8, *range(read_every, STEPS + 1, read_every)})
    for rank in range(2):
        # What comes after the first barrier, with which the training begins, cut at our own all-reduces.
        calls = (tmp_path / f"collectives-{rank}").read_text().split()
        parts = [[]]
        for call in calls[calls.index("barrier") + 1 :]:
            if call == "all_reduce":
                parts.append([])
            elif call != "gradients":
                parts[-1].append(call)
        before, *after = parts
        assert before == [] and len(after) == len(readings)
        gathered = {step: calls for step, calls in zip(readings, after, strict=True) if calls}
        assert list(gathered) == [4, 5, 8]
        # The waits, then the spans; then all ranks start their clocks together.
        assert gathered[4] == ["all_gather_object", "all_gather_object", "barrier"]
        assert gathered[5] == ["all_gather_object", "barrier"]


# the exchange of gradients --------------------------------------------------------------------------------------------

REGISTER = "model.register_comm_hook(dist.group.WORLD, self.hook)"
EXCHANGE = "return self.average(group, bucket)"
BACKWARD = "        loss.backward()\n"
MARK = "        timer.done.append(timer.now())\n"
LEAVE = "    dist.destroy_process_group()\n    if RANK > 0:\n        return\n"
HASH = """
    weights = b"".join(weight.detach().numpy().tobytes() for weight in model.parameters())
    Path(f"hash-{RANK}").write_text(hashlib.sha256(weights).hexdigest())
"""


def run_changed(arguments, directory, changes, before=""):
    """Run a changed distributed.py in two ranks; return its record, its losses, and the weights of each rank."""
    script = change(directory, *changes, (LEAVE, HASH + LEAVE), before=before)
    run_ranks(script, arguments, directory, 2)
    record = json.loads((directory / "results/r.json").read_text())
    hashes = [(directory / f"hash-{rank}").read_text() for rank in range(2)]
    return record, read_scalars(directory / "logs/r")["loss/train"], hashes


@pytest.fixture(scope="module")
def unchanged(arguments, tmp_path_factory):
    return run_changed(arguments, tmp_path_factory.mktemp("unchanged"), [])


def test_timing_the_exchange_changes_nothing(arguments, unchanged, tmp_path):
    """Without the hook DDP exchanges the gradients by itself."""
    _, losses, hashes = unchanged
    _, own_losses, own_hashes = run_changed(arguments, tmp_path, [(REGISTER, "pass"), (MARK, "")])
    assert own_losses == losses and set(own_hashes) == set(hashes) and len(set(hashes)) == 1


def test_a_slow_rank_is_waited_for(arguments, unchanged, tmp_path):
    """Of the 0.3 s of one rank, half is waiting in the mean over the two, and nothing the exchange's."""
    slow = "        if RANK == 1:\n            time.sleep(0.3)\n" + BACKWARD
    record, losses, hashes = run_changed(arguments, tmp_path, [(BACKWARD, slow)])
    assert losses == unchanged[1] and set(hashes) == set(unchanged[2])
    seconds = record["seconds"]
    assert 0.08 * STEPS < seconds["waiting"] < seconds["train"] / 2
    assert 0 < seconds["exchange"] < seconds["train"]
    # Neither the rank that sleeps nor the one that waits takes CPU time.
    assert 0 < seconds["cpu"] < seconds["train"] / 2


def test_an_exchange_done_twice(arguments, unchanged, tmp_path):
    """Averaging what is averaged already changes nothing."""
    twice = f"dist.all_reduce(bucket.buffer().div_(WORLD_SIZE))\n        {EXCHANGE}"
    record, losses, hashes = run_changed(arguments, tmp_path, [(EXCHANGE, twice)])
    assert losses == unchanged[1] and set(hashes) == set(unchanged[2])
    assert record["seconds"]["exchange"] > 0


# Note the types of what is exchanged and is not small.
SPY = """
import atexit, os, pathlib, torch.distributed
all_reduce, exchanged = torch.distributed.all_reduce, pathlib.Path("exchanged-" + os.environ["RANK"])
def watched_all_reduce(tensor, *arguments, **options):
    if tensor.numel() > 1000:
        with exchanged.open("a") as file:
            print(tensor.dtype, file=file)
    return all_reduce(tensor, *arguments, **options)
torch.distributed.all_reduce = watched_all_reduce
"""


def exchanged_types(directory):
    return {line for rank in range(2) for line in (directory / f"exchanged-{rank}").read_text().split()}


@pytest.mark.parametrize("gradients", ["fp32", "bf16"])
def test_the_type_of_the_exchanged_gradients(arguments, unchanged, tmp_path, gradients):
    arguments = [*arguments, "--gradients", gradients]
    record, losses, hashes = run_changed(arguments, tmp_path, [], before=SPY)
    assert exchanged_types(tmp_path) == {{"fp32": "torch.float32", "bf16": "torch.bfloat16"}[gradients]}
    assert len(set(hashes)) == 1 and record["settings"]["gradients"] == gradients
    assert (losses == unchanged[1]) == (gradients == "fp32")
    # bf16 has 8 bits of a number: gradients differ by up to 0.4 %, and a step of AdamW by not much more.
    assert relative_difference(losses.values(), unchanged[1].values()) < 1e-2


def test_fp32_in_place_of_bf16_would_be_seen(arguments, unchanged, tmp_path):
    silent = 'bf16_compress_hook if args.gradients == "bf16" else allreduce_hook', "allreduce_hook"
    _, losses, _ = run_changed([*arguments, "--gradients", "bf16"], tmp_path, [silent], before=SPY)
    assert exchanged_types(tmp_path) == {"torch.float32"} and losses == unchanged[1]
