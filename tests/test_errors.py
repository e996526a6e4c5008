"""Bad input: one line on stderr, exit status 2, no traceback, nothing overwritten; a line for each rank that fails."""

import gzip
import json
import os
import shutil
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import baseline
import distributed
from conftest import ENCODER, ROOT, SMALL, read_scalars, run_script, write_squad
from ranks import Run, errors_of_ranks

CONTEXT = "The tower stands in Paris."
GOOD = [(CONTEXT, [("q1", "Where?", [("Paris", 20)]), ("q2", "Why?", [])])]
BOTH = pytest.mark.parametrize("script", [baseline, distributed], ids=["baseline", "distributed"])


@pytest.fixture
def squad(tmp_path):
    return write_squad(tmp_path / "squad.json", GOOD)


def broken(path, change):
    """Write good questions, changed by `change(data)`; return the path."""
    write_squad(path, GOOD)
    content = json.loads(path.read_text())
    change(content["data"])
    path.write_text(json.dumps(content))


def qa(data, number=0):
    return data[0]["paragraphs"][0]["qas"][number]


LAYOUT = 'expected SQuAD\'s layout, {"data": [{"paragraphs": [{"context": ..., "qas": [{'

BAD_FILES = {
    "no JSON": (lambda path: path.write_text("{"), LAYOUT),
    "lines of JSON": (lambda path: path.write_text('{"id": "q"}\n{"id": "r"}\n'), LAYOUT),
    "not text": (lambda path: path.write_bytes(b"\xff\xfe\x00"), LAYOUT),
    "a list": (lambda path: path.write_text("[1]"), LAYOUT),
    "a list of questions": (lambda path: path.write_text('{"data": [{"id": "q", "question": "?"}]}'), LAYOUT),
    "data a number": (lambda path: path.write_text('{"data": 7}'), LAYOUT),
    "no data": (lambda path: path.write_text("{}"), f"no key 'data'; {LAYOUT}"),
    "no paragraphs": (lambda path: broken(path, lambda data: data[0].pop("paragraphs")),
                      f"no key 'paragraphs'; {LAYOUT}"),
    "no answers": (
        lambda path: broken(path, lambda data: qa(data, 1).pop("answers")),
        "question 'q2': no key 'answers'; correct it in the file"),
    "no id": (lambda path: broken(path, lambda data: qa(data, 1).pop("id")), "no key 'id'"),
    "answers that are a word": (
        lambda path: broken(path, lambda data: qa(data).update(answers="x")), "question 'q1': string indices"),
    "an answer elsewhere": (
        lambda path: broken(path, lambda data: qa(data)["answers"][0].update(answer_start=3)),
        "question 'q1': the answer 'Paris' is not at its answer_start 3; correct it in the file"),
    "an answer before the context": (
        lambda path: broken(path, lambda data: qa(data)["answers"][0].update(answer_start=-6)),
        "the answer 'Paris' is not at its answer_start -6"),
    "no questions": (lambda path: write_squad(path, []), "no questions in it"),
    "an id twice": (lambda path: write_squad(path, [*GOOD, *GOOD]), "question 'q1': its id is null or occurs twice"),
    "half a character": (
        lambda path: broken(path, lambda data: qa(data).update(question="\ud83d?")), "surrogates not allowed"),
}  # fmt: skip


def load(path, tokenizer, script=baseline):
    args = SimpleNamespace(max_length=384, doc_stride=128, device=torch.device("cpu"))
    return script.load_split("train", str(path), tokenizer, args)


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files(tmp_path, tokenizer, case):
    make, message = BAD_FILES[case]
    path = tmp_path / "squad.json"
    make(path)
    with pytest.raises(baseline.ScriptError) as error:
        load(path, tokenizer)
    line = str(error.value)
    assert message in line and line.startswith(f"{path}: ") and "\n" not in line
    # The file is at hand: neither the Hub nor the cache has anything to do with it.
    assert "Hub" not in line and "HF_HOME" not in line
    assert error.value.status == 2


def test_a_damaged_gzip(tmp_path, tokenizer):
    path = tmp_path / "squad.json.gz"
    for content in (b"{}", gzip.compress(b'{"data": []}')[:-9]):
        path.write_bytes(content)
        with pytest.raises(baseline.ScriptError) as error:
            load(path, tokenizer)
        assert LAYOUT in str(error.value)


BAD_OPTIONS = {
    "--epochs 0": "--epochs: 0 is not in [1",
    "--batch-size -3": "--batch-size: -3 is not in [1",
    "--lr nan": "--lr: nan is not in [0, 1]",
    "--lr x": "--lr: invalid number value: 'x'",
    "--precision fp8": "invalid choice: 'fp8'",
    "--precision tf32": "--precision tf32: not supported by",
    "--device gpu": "invalid choice: 'gpu'",
    "--unknown": "unrecognized arguments: --unknown",
    "--run x": "unrecognized arguments: --run x",  # no abbreviations, which a later version may break
    "--max-length 40 --doc-stride 40": "question 'q1' has 2 tokens: shorten it, raise",
    "--max-length 1000": "--max-length 1000 is above its limit of 512",
    # Met before the model is looked at.
    "--train-file x.json --model nowhere": "--train-file x.json: there is no such file",
    "--train-file EMPTY --model nowhere": "--train-file EMPTY: there is no such file",
    "--dev-file x.json --model nowhere": "--dev-file x.json: there is no such file",
    "--run-name a/b": "--run-name a/b: use up to 200 letters",
    "--run-name .hidden": "--run-name .hidden: use up to 200 letters",
    "--run-name speedup": "do not begin with 'speedup'",
    f"--run-name {'x' * 245}": "x: use up to 200 letters",
    "--run-name " + "\u0141" * 101: "\u0141: use up to 200 letters",  # 202 bytes
    "--output-dir FILE": "FILE",
    "--output-dir LINK": "LINK",
    "--predictions FILE/x.json": "FILE",
    "--predictions EMPTY": "--predictions EMPTY: is a directory, an input or a result; give another file",
    "--predictions .": "--predictions .: is a directory",
    "--predictions good.json": "--predictions good.json: is a directory, an input or a result",
    "--predictions ./LINK/../good.json": "is a directory, an input or a result",
    "--predictions results/old.json": "--predictions results/old.json: is a directory, an input or a result",
    "--predictions results/run.json --run-name run": "--predictions results/run.json: is a directory, an input or a",
    "--predictions DIRECTORY.json": "--predictions DIRECTORY-na.json: is a directory, an input or a result",
    "--model nowhere": "--model nowhere: ",
    "--model NOT_BERT": "a gpt2 checkpoint, but this is for BERT only",
    "--model EMPTY": "--model EMPTY: ",
    "": "rajpurkar/squad_v2: ",
}


def message_of(error, capsys):
    """Return the line with which a script ends, and its status."""
    if error.type is SystemExit:
        return capsys.readouterr().err.removesuffix("\n"), error.value.code
    # An OSError is printed as it is.
    return str(error.value), getattr(error.value, "status", 2)


@BOTH
@pytest.mark.parametrize("line", BAD_OPTIONS)
def test_bad_options(tmp_path, monkeypatch, in_process, capsys, script, line):
    monkeypatch.setattr(distributed.dist, "is_torchelastic_launched", lambda: True)
    (tmp_path / "FILE").write_text("kept")
    (tmp_path / "EMPTY").mkdir()
    (tmp_path / "DIRECTORY-na.json").mkdir()
    (tmp_path / "LINK").symlink_to("nowhere")
    (tmp_path / "results").mkdir()
    (tmp_path / "results/old.json").write_text("kept")
    (tmp_path / "NOT_BERT").mkdir()
    (tmp_path / "NOT_BERT/config.json").write_text('{"model_type": "gpt2"}')
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(f"{ENCODER}/{name}", tmp_path / "NOT_BERT" / name)
    write_squad(tmp_path / "good.json", GOOD)
    good = [] if line == "" else ["--train-file", "good.json", "--dev-file", "good.json"]
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    monkeypatch.setattr("sys.argv", ["x.py", "--model", ENCODER, *good, *line.split()])
    with pytest.raises((script.ScriptError, SystemExit, OSError)) as error:
        script.main()
    message, status = message_of(error, capsys)
    assert BAD_OPTIONS[line] in message and "\n" not in message and status == 2
    assert {path: path.read_bytes() for path in before} == before
    # What is left is empty.
    assert not any(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file() and path not in before)


def test_results_that_are_a_dangling_link(tmp_path, refused, squad):
    """As to a disk that is not mounted."""
    (tmp_path / "results").symlink_to("/nowhere/results")
    line = refused(squad)
    assert f"{tmp_path}/results" in line and "give another --output-dir" in line


@pytest.mark.parametrize("name", ["checkpoints", "logs"])
def test_directories_that_are_files(tmp_path, squad, run, name):
    (tmp_path / name).write_text("kept")
    with pytest.raises(OSError, match=f"{tmp_path}/{name}"):
        run(squad)
    assert (tmp_path / name).read_text() == "kept"


def test_a_working_directory_where_nothing_can_be_written(tmp_path, squad, run, monkeypatch):
    monkeypatch.chdir("/sys")
    with pytest.raises(OSError):
        Path("results").mkdir()
    record = run(squad, "--predictions", tmp_path / "answers/predictions.json")
    assert record["settings"]["steps"] == 2
    assert json.loads((tmp_path / "answers/predictions.json").read_text()).keys() == {"q1", "q2"}


def test_a_tilde_that_the_shell_leaves(tmp_path, squad, tiny, in_process, monkeypatch):
    """It does so in --output-dir=~/x."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    shutil.copy(squad, tmp_path / "home/squad.json")
    shutil.copytree(tiny, tmp_path / "home/model")
    options = ["--output-dir=~/x", "--predictions=~/y/z.json", "--train-file=~/squad.json", "--dev-file=~/squad.json"]
    monkeypatch.setattr(
        "sys.argv", ["baseline.py", *options, "--model=~/model", "--random-init", "--run-name=run", *SMALL]
    )
    baseline.main()
    assert (tmp_path / "home/x/results/run.json").exists() and (tmp_path / "home/y/z.json").exists()
    assert not (tmp_path / "~").exists()


def test_the_help_shows_defaults_and_what_sample_sets(capsys, monkeypatch, in_process):
    for script in (baseline, distributed):
        parser = script.build_parser()
        text = " ".join(parser.format_help().split())
        for action in parser._actions:
            if action.nargs != 0:
                assert "(default:" in action.help or action.default is None, action.dest
                default = "bf16 on a GPU" if action.dest == "precision" else str(action.default or "")
                assert default in text
        monkeypatch.setattr("sys.argv", ["x.py"])
        plain = vars(script.parse_args())
        monkeypatch.setattr("sys.argv", ["x.py", "--sample"])
        sample = vars(script.parse_args())
        changed = {name for name in plain if plain[name] != sample[name]} - {
            "sample",
            "model",
            "train_file",
            "dev_file",
        }
        assert changed >= {"batch_size", "lr", "dropout"}
        (sets,) = [action.help for action in parser._actions if action.dest == "sample"]
        said = dict(zip(*[iter(sets.split(", with ")[1].split())] * 2, strict=True))
        assert {name[2:].replace("-", "_") for name in said} == changed
        for name, value in said.items():
            assert float(value) == sample[name[2:].replace("-", "_")]


def test_a_batch_larger_than_the_data(squad, run, capsys):
    run(squad, "--batch-size", "100000")
    output = capsys.readouterr().out
    assert "2 steps of 2 features" in output
    assert "--batch-size 100000: there are fewer features, so each step trains on all of them" in output


MISTAKES = [NameError, UnboundLocalError, AttributeError, AssertionError]


def mistake(kind):
    def raise_it(*arguments, **named):
        raise kind("a mistake in the code")

    return raise_it


@BOTH
@pytest.mark.parametrize("kind", MISTAKES)
@pytest.mark.parametrize("function", ["load_tokenizer", "check_weights"])
def test_mistakes_in_loading_the_model_keep_their_traceback(monkeypatch, script, kind, function):
    monkeypatch.setattr(script, function, mistake(kind))
    args = SimpleNamespace(model=ENCODER, seed=1, max_length=384, dropout=None, random_init=False)
    with pytest.raises(kind) as error:
        script.load_model(args)
    assert error.type is kind


@BOTH
@pytest.mark.parametrize("kind", MISTAKES)
@pytest.mark.parametrize("function", ["read_squad", "check_answer", "make_features"])
def test_mistakes_in_loading_the_data_keep_their_traceback(monkeypatch, tmp_path, tokenizer, script, kind, function):
    path = write_squad(tmp_path / "squad.json", [(f"{CONTEXT} {kind} {function}", GOOD[0][1])])
    monkeypatch.setattr(script, function, mistake(kind))
    with pytest.raises(kind) as error:
        load(path, tokenizer, script)
    assert error.type is kind


def test_a_mistake_as_its_author_sees_it(tmp_path, squad):
    """Through the lines at the end of the script, with the traceback."""
    before = "import torch\ndef broken(*arguments): undefined\ntorch.optim.AdamW.step = broken"
    arguments = ["--sample", "--random-init", "--train-file", squad, "--dev-file", squad, *SMALL]
    mistaken = Run("baseline.py", arguments, tmp_path, before=before).wait()
    assert mistaken.status == 1
    assert "Traceback" in mistaken.error and "NameError: name 'undefined' is not defined" in mistaken.error
    assert not list(tmp_path.glob("results/*"))


def lines_of(error, script="distributed"):
    """Return the lines that a script has printed for each rank that failed; there is nothing but such lines."""
    lines = error.splitlines()
    assert all(line.startswith((f"{script}.py: error: ", f"{script}.py: rank ")) for line in lines), error
    return sorted(lines)


def run_to_the_end(script, arguments, directory, world_size=None, **named):
    """Run a script, and let each rank end by itself, where torchrun ends the others after the first failure."""
    run = Run(script, arguments, directory, world_size, **named)
    for process in run.processes:
        process.join(300)
    assert not run.is_alive()
    return run


def test_as_a_user_sees_it(tmp_path):
    process = run_script("baseline.py", ["--train-file", "a.json", "--dev-file", "b.json"], tmp_path)
    assert process.returncode == 2
    assert process.stderr == "baseline.py: error: --train-file a.json: there is no such file\n"
    assert process.stdout == ""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--epochs", "0"], "argument --epochs: 0 is not in [1, inf]"),
        (["--sample", "--output-dir", "FILE"], "[Errno 20] Not a directory: 'FILE/checkpoints"),
        (["--sample", "--model", "nowhere"], "--model nowhere: "),
        (["--sample", "--max-length", "20"], "tokens: shorten it, raise --max-length, or lower --doc-stride"),
    ],
)
def test_each_kind_of_error_is_one_line(tmp_path, options, message):
    (tmp_path / "FILE").write_text("kept")
    run = run_to_the_end("baseline.py", options, tmp_path)
    assert run.statuses == [2]
    (line,) = lines_of(run.error, "baseline")
    assert line.startswith("baseline.py: error: ") and message in line
    assert (tmp_path / "FILE").read_text() == "kept"


def test_without_torchrun(tmp_path):
    run = run_to_the_end("distributed.py", ["--sample"], tmp_path)
    assert run.statuses == [2]
    assert run.error == "distributed.py: error: start it with torchrun, or with: bash run_ddp.sh\n"


def test_the_baseline_under_torchrun(tmp_path, squad):
    """It would train twice, and record two runs of one worker."""
    arguments = ["--sample", "--random-init", "--train-file", squad, "--dev-file", squad, *SMALL]
    run = run_to_the_end("baseline.py", arguments, tmp_path, 2)
    assert run.statuses == [2, 2]
    assert set(lines_of(run.error, "baseline")) == {
        "baseline.py: error: start it without torchrun; the data-parallel script is distributed.py"
    }
    assert not list(tmp_path.glob("results/*"))


@pytest.mark.parametrize(
    ("options", "message", "environment"),
    [
        (["--epochs", "0"], "argument --epochs: 0 is not in [1, inf]", {}),
        (["--model", "nowhere"], "--model nowhere: ", {}),
        ([], "cannot join the other ranks: ", {"GLOO_SOCKET_IFNAME": "nosuch0"}),
    ],
)
def test_each_rank_prints_its_error_with_its_name(tmp_path, squad, options, message, environment):
    files = ["--train-file", squad, "--dev-file", squad]
    run = run_to_the_end("distributed.py", ["--sample", *files, *options], tmp_path, 2, environment=environment)
    assert run.statuses == [2, 2]
    first, second = lines_of(run.error)
    assert first.startswith(f"distributed.py: error: {message}")
    assert second.startswith(f"distributed.py: rank 1 on {os.uname().nodename}: error: {message}")
    assert all(name in run.error for name in environment)
    assert not list(tmp_path.glob("results/*"))


def test_an_error_of_one_rank_ends_all(tmp_path, squad):
    """The second rank alone cannot make its data, as on a node with a full disk: it is named, with its host."""
    (tmp_path / "FILE").write_text("in place of the directory")
    before = (
        "import datasets, os\n"
        "if os.environ['RANK'] == '1':\n"
        "    datasets.config.HF_DATASETS_CACHE = 'FILE'\n"
    )  # fmt: skip
    arguments = ["--sample", "--random-init", "--train-file", squad, "--dev-file", squad, *SMALL]
    run = Run("distributed.py", arguments, tmp_path, 2, before=before).wait()
    assert run.statuses[1] == 2 and run.statuses[0] != 0
    (line,) = lines_of(run.error)
    assert line.startswith(f"distributed.py: rank 1 on {os.uname().nodename}: error: FILE/squad-features: ")
    assert "cannot be used as a cache" in line and "HF_HOME" in line
    assert not list(tmp_path.glob("results/*"))


# When the optimizer is made, what is in use of the address space may grow by 200 MB.
LIMIT = """
import resource, torch
make = torch.optim.AdamW.__init__

def limit(*arguments, **named):
    pages = int(open("/proc/self/statm").read().split()[0])
    size = pages * resource.getpagesize() + 200 * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (size, size))
    make(*arguments, **named)

torch.optim.AdamW.__init__ = limit
"""


@pytest.mark.parametrize(("script", "world_size"), [("baseline", None), ("distributed", 2)])
def test_out_of_memory(tmp_path, script, world_size):
    arguments = ["--sample", "--batch-size", "720", "--micro-batch-size", "720", "--max-steps", "1"]
    run = run_to_the_end(f"{script}.py", arguments, tmp_path, world_size, before=LIMIT)
    lines = lines_of(run.error, script)
    assert run.statuses == [2] * len(lines) and len(lines) == (world_size or 1)
    messages = [line.partition("error: ")[2] for line in lines]
    advice = "out of memory: set a lower --micro-batch-size"
    # A rank that comes later may find the other one gone before it runs out of memory, too.
    assert advice in messages
    assert all(message == advice or message.startswith("lost the connection to another") for message in messages)


# Warnings of libraries and of torch, in a step of the training.
WARN = """
import logging, torch, warnings
step = torch.optim.AdamW.step

def warn(*arguments, **named):
    for library in ("datasets", "filelock", "huggingface_hub", "transformers.modeling_utils"):
        logging.getLogger(library).warning("noise of %s", library)
    logging.getLogger("torch._dynamo.convert_frame").warning("recompile_limit reached")
    warnings.warn("a warning of torch")
    return step(*arguments, **named)

torch.optim.AdamW.step = warn
"""


@pytest.mark.parametrize(("script", "world_size"), [("baseline.py", None), ("distributed.py", 1)])
def test_warnings_of_libraries_are_silenced_by_name_and_those_of_torch_are_seen(tmp_path, squad, script, world_size):
    arguments = ["--sample", "--random-init", "--train-file", squad, "--dev-file", squad, *SMALL]
    run = run_to_the_end(script, arguments, tmp_path, world_size, before=WARN)
    assert run.statuses == [0], run.error
    assert "noise" not in run.output + run.error
    assert "recompile_limit reached" in run.error and "a warning of torch" in run.error
    # Nothing else: no deprecation, no advice that is for the author of a script.
    others = [line for line in run.error.splitlines() if "recompile_limit" not in line and "warn" not in line]
    assert not others, run.error


# The first step waits until there is a file "go".
WAIT = """
import pathlib, time, torch
step = torch.optim.AdamW.step

def wait(*arguments, **named):
    pathlib.Path("started").touch()
    while not pathlib.Path("go").exists():
        time.sleep(0.02)
    return step(*arguments, **named)

torch.optim.AdamW.step = wait
"""


@pytest.mark.parametrize(("script", "world_size"), [("baseline", None), ("distributed", 2)])
def test_two_runs_of_one_name_at_once(tmp_path, squad, script, world_size):
    """As when a job is queued again, and submitted again."""
    arguments = ["--sample", "--random-init", "--train-file", squad, "--dev-file", squad, *SMALL, "--run-name", "run"]
    first = Run(f"{script}.py", arguments, tmp_path, world_size, before=WAIT)
    try:
        while not (tmp_path / "started").exists():
            assert first.is_alive(), first.error
        # Where there are more ranks, the second one waits for the first, until torchrun ends it.
        second = Run(f"{script}.py", arguments, tmp_path, world_size).wait()
        assert second.statuses[0] == 2
        said = f"{script}.py: error: run: is being trained by another process; give another --run-name"
        assert lines_of(second.error, script) == [said]
        # Another name is free.
        run_to_the_end(f"{script}.py", [*arguments, "--prepare"], tmp_path)
        assert first.is_alive()
    finally:
        (tmp_path / "go").touch()
    assert first.wait().statuses == [0] * (world_size or 1), first.error
    assert json.loads((tmp_path / "results/run.json").read_text())["settings"]["steps"] == 2
    assert not (tmp_path / "checkpoints/run/lock").exists()


UNLIKE = {
    # Only the first rank sees a checkpoint.
    "directories": (
        "import os; os.chdir(os.environ['RANK'])",
        "checkpoints/run: not the same on all nodes; give an --output-dir that they share",
    ),
    # A GPU that supports bf16 beside one that does not.
    "precisions": (
        "import os, sys; sys.argv += ['--precision', ['fp32', 'bf16'][int(os.environ['RANK'])]]",
        "the GPUs differ in what they support; give --precision fp32",
    ),
}


@pytest.mark.parametrize("name", UNLIKE)
def test_nodes_that_are_not_alike(tmp_path, squad, tiny, name):
    before, said = UNLIKE[name]
    (tmp_path / "0/checkpoints/run").mkdir(parents=True)
    (tmp_path / "0/checkpoints/run/last.pt").touch()
    (tmp_path / "1").mkdir()
    arguments = ["--random-init", "--model", tiny, "--train-file", squad, "--dev-file", squad, *SMALL]
    run = Run("distributed.py", [*arguments, "--run-name", "run"], tmp_path, 2, before=before).wait()
    errors = errors_of_ranks(run.error, 2)
    assert set(errors.values()) == {said} and 2 in run.statuses


def test_the_lock_of_a_killed_run_does_not_matter(tmp_path, squad, run):
    """The operating system frees it; the file may stay."""
    (tmp_path / "checkpoints/run").mkdir(parents=True)
    (tmp_path / "checkpoints/run/lock").touch()
    assert run(squad)["settings"]["steps"] == 2


def test_a_terminal_that_knows_only_ascii(tmp_path, squad, tiny):
    """And a long TMPDIR, in which no socket can be made."""
    long = tmp_path / ("x" * 200)
    long.mkdir()
    environment = {"PYTHONIOENCODING": "ascii", "TMPDIR": str(long)}
    arguments = ["--random-init", "--model", tiny, "--output-dir", "\u0141\u00f3d\u017a", "--run-name", "run", *SMALL]
    arguments += ["--train-file", squad, "--dev-file", squad]
    process = run_script("baseline.py", arguments, tmp_path, environment=environment)
    assert process.returncode == 0, process.stderr
    assert r"\u0141\xf3d\u017a/results/run.json: " in process.stdout
    assert process.stderr == ""
    assert (tmp_path / "\u0141\u00f3d\u017a/results/run.json").exists()


def test_the_launchers_pass_on_the_status(tmp_path):
    for launcher, script in [("run_baseline.sh", "baseline.py"), ("run_ddp.sh", "distributed.py")]:
        command = ["bash", ROOT / launcher, "--sample", "--epochs", "0"]
        process = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert process.returncode == 2
        lines = process.stderr.splitlines()  # those before are pip's, where the launcher installs something
        assert lines[-1] == f"{script}: error: argument --epochs: 0 is not in [1, inf]"
        assert "Traceback" not in process.stderr


def set_up(script, monkeypatch, arguments=(), **environment):
    """Call set_up_device() with these options and variables of a job; return the options."""
    for name in ("CUDA_VISIBLE_DEVICES", "SLURM_GPUS_ON_NODE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    args = script.build_parser().parse_args(["--threads", "1", *arguments])
    script.set_up_device(args)
    return args


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch can use the GPU here")
@BOTH
def test_gpus_that_torch_cannot_use_end_a_job_before_training(monkeypatch, script):
    with pytest.raises(script.ScriptError) as error:
        set_up(script, monkeypatch, SLURM_GPUS_ON_NODE="2")
    message = str(error.value)
    reason = "" if torch.version.cuda else "Torch not compiled with CUDA enabled"
    assert message.startswith(f"torch {torch.__version__} cannot use the GPU: {reason}") and "\n" not in message
    assert "README" in message and "--device cpu" in message
    for wanted in ["--device", "cpu"], ["--prepare"]:
        assert set_up(script, monkeypatch, wanted, SLURM_GPUS_ON_NODE="2").device.type == "cpu"


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch can use the GPU here")
@pytest.mark.parametrize("visible", ["", "-1", "NoDevFiles"])
def test_without_gpus_the_cpu_is_used(monkeypatch, visible):
    assert set_up(baseline, monkeypatch, CUDA_VISIBLE_DEVICES=visible).device.type == "cpu"


@pytest.mark.parametrize(
    ("quota", "threads"),
    [("max 100000", 8), ("100000 100000", 1), ("250000 100000", 3), ("50000 100000", 1), ("6400000 100000", 8)],
)
def test_threads_follow_a_containers_quota(monkeypatch, tmp_path, quota, threads):
    """A container may see eight cores, and get the time of one."""
    (tmp_path / "cpu.max").write_text(f"{quota}\n")
    asked = []
    monkeypatch.setattr(baseline.torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr(baseline, "Path", lambda path: asked.append(path) or tmp_path / "cpu.max")
    assert baseline.default_threads() == threads
    assert asked == ["/sys/fs/cgroup/cpu.max"]


def test_the_workers_of_a_node_share_a_containers_quota(monkeypatch, tmp_path):
    (tmp_path / "cpu.max").write_text("800000 100000\n")
    monkeypatch.setattr(distributed.torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr(distributed, "Path", lambda path: tmp_path / "cpu.max")
    assert distributed.default_threads() == 8
    monkeypatch.setattr(distributed, "LOCAL_WORLD_SIZE", 4)
    assert distributed.default_threads() == 2


@pytest.mark.parametrize(
    ("variables", "name"),
    [
        ({"SLURM_JOB_ID": "7"}, "baseline-7"),
        # A job's script makes one step; so a job that is queued again goes on with the same run.
        ({"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0"}, "baseline-7"),
        # In an allocation, each start is a run of its own.
        ({"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "2"}, "baseline-7.2"),
    ],
)
def test_the_name_of_a_run_in_a_job(monkeypatch, in_process, variables, name):
    for variable in ("SLURM_JOB_ID", "SLURM_STEP_ID"):
        monkeypatch.delenv(variable, raising=False)
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)
    monkeypatch.setattr("sys.argv", ["baseline.py"])
    assert baseline.parse_args().run_name == name


def test_threads_without_a_quota(monkeypatch, tmp_path):
    """As outside containers, and with the first version of cgroups."""
    monkeypatch.setattr(baseline.torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr(baseline, "Path", lambda path: tmp_path / "missing")
    assert baseline.default_threads() == 8


def git(*arguments):
    identity = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
    return subprocess.run(["git", *identity, *arguments], check=True, capture_output=True, text=True).stdout.strip()


@pytest.mark.skipif(shutil.which("git") is None, reason="no git on this machine")
@pytest.mark.parametrize("owner", [None, 65534], ids=["own", "of another user"])
def test_the_commit_is_recorded(tmp_path, monkeypatch, owner):
    """Also of a clone that another user owns, which git by itself refuses, and with an apostrophe in its path."""
    if owner is not None and os.getuid() != 0:
        pytest.skip("only root can give files to another user")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    original, clone = tmp_path / "original", tmp_path / "it's a clone"
    git("init", original)
    (original / "baseline.py").write_text("pass\n")
    git("-C", original, "add", ".")
    git("-C", original, "commit", "--message", "x")
    commit = git("-C", original, "rev-parse", "HEAD")
    git("clone", original, clone)
    if owner is not None:
        for path in [clone, *clone.rglob("*")]:
            os.chown(path, owner, owner)
        with pytest.raises(subprocess.CalledProcessError):
            git("-C", clone, "rev-parse", "HEAD")
    monkeypatch.setattr(baseline, "HERE", clone)
    assert baseline.read_commit() == commit
    (clone / "baseline.py").write_text("changed\n")
    assert baseline.read_commit() == f"{commit}-dirty"
    # Without a repository, or without git, it is not known.
    shutil.rmtree(clone / ".git")
    assert baseline.read_commit() is None
    monkeypatch.setenv("PATH", str(tmp_path))
    assert baseline.read_commit() is None


def test_tensorboard_of_a_clock_that_was_ahead(tmp_path, monkeypatch):
    """TensorBoard reads the files in the order of the times in their names: a resumed run begins anew."""
    scalars = {}
    with monkeypatch.context() as patch:
        now = time.time()
        patch.setattr("time.time", lambda: now + 3600)
        first = baseline.Board(tmp_path, scalars)
        for step in (1, 2, 3):
            first.show(step, {"loss/train": float(step)})
        first.call("close")
    assert read_scalars(tmp_path)["loss/train"] == {1: 1, 2: 2, 3: 3}
    # The checkpoint was written after the second step.
    resumed = baseline.Board(tmp_path, {"loss/train": {1: 1.0, 2: 2.0}})
    for step in (3, 4):
        resumed.show(step, {"loss/train": 10.0 * step})
    resumed.call("close")
    assert read_scalars(tmp_path)["loss/train"] == {1: 1, 2: 2, 3: 30, 4: 40}
