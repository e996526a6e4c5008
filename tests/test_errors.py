"""Bad input: one line on stderr, exit status 2, no traceback, nothing overwritten; once in a parallel run."""

import gzip
import json
import shutil
import subprocess

import pytest

import baseline
import distributed
from conftest import ENCODER, ROOT, run_script, write_squad

CONTEXT = "The tower stands in Paris."
GOOD = [(CONTEXT, [("q1", "Where?", [("Paris", 20)]), ("q2", "Why?", [])])]


def broken(path, change):
    """Write good questions, changed by `change(data)`; return the path."""
    write_squad(path, GOOD)
    content = json.loads(path.read_text())
    change(content["data"])
    path.write_text(json.dumps(content))


def qa(data, number=0):
    return data[0]["paragraphs"][0]["qas"][number]


BAD_FILES = {
    "missing": (lambda path: None, "cannot be read: No such file"),
    "a directory": (lambda path: path.mkdir(), "cannot be read: Is a directory"),
    "no JSON": (lambda path: path.write_text("{"), "not JSON"),
    "not text": (lambda path: path.write_bytes(b"\xff\xfe\x00"), "not JSON"),
    "a list": (lambda path: path.write_text("[1]"), "not SQuAD's layout"),
    "no data": (lambda path: path.write_text("{}"), "no key 'data' before the first question"),
    "no paragraphs": (lambda path: broken(path, lambda data: data[0].pop("paragraphs")), "no key 'paragraphs' before"),
    "no answers": (
        lambda path: broken(path, lambda data: qa(data, 1).pop("answers")), "no key 'answers' at question q2"),
    "no id": (lambda path: broken(path, lambda data: qa(data, 1).pop("id")), "no key 'id'"),
    "a question that is a number": (
        lambda path: broken(path, lambda data: qa(data).update(question=7)), "not SQuAD's layout"),
    "answers that are a word": (
        lambda path: broken(path, lambda data: qa(data).update(answers="x")), "not SQuAD's layout"),
    "an answer elsewhere": (
        lambda path: broken(path, lambda data: qa(data)["answers"][0].update(answer_start=3)),
        "the answer 'Paris' is not at its answer_start 3 at question q1"),
    "an answer before the context": (
        lambda path: broken(path, lambda data: qa(data)["answers"][0].update(answer_start=-6)),
        "is not at its answer_start"),
    "no questions": (lambda path: write_squad(path, []), "no questions in it"),
    "an empty context": (lambda path: write_squad(path, [(" ", [("q1", "Why?", [])])]), "empty context at question q1"),
    "an id twice": (lambda path: write_squad(path, [*GOOD, *GOOD]), "question id q1 occurs twice"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files(tmp_path, case):
    make, message = BAD_FILES[case]
    path = tmp_path / "squad.json"
    make(path)
    with pytest.raises(baseline.ScriptError) as error:
        baseline.read_squad_file(str(path))
    assert message in str(error.value) and str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_damaged_gzip(tmp_path):
    path = tmp_path / "squad.json.gz"
    for content in (b"{}", gzip.compress(b'{"data": []}')[:-9]):
        path.write_bytes(content)
        with pytest.raises(baseline.ScriptError, match="not JSON"):
            baseline.read_squad_file(str(path))


BAD_OPTIONS = {
    "--epochs 0": "--epochs: 0 is not at least 1",
    "--batch-size -3": "--batch-size: -3 is not at least 1",
    "--lr nan": "--lr: nan is not from 0 to 1",
    "--lr x": "--lr: invalid float value: 'x'",
    "--precision fp8": "invalid choice: 'fp8'",
    "--precision tf32": "--precision tf32: this device has none",
    "--unknown": "unrecognized arguments: --unknown",
    "--max-length 40 --doc-stride 40": "--doc-stride 40, --max-length 40: no room beside question q1",
    "--max-length 1000": "--max-length 1000: the model's limit is 512",
    "--train-file x.json": "give both --train-file and --dev-file",
    "--run a/b": "--run a/b: use letters",
    "--results FILE": "FILE: cannot be written",
    "--predictions FILE/x.json": "FILE: cannot be written",
    "--model nowhere": "--model nowhere: no checkpoint",
    "--model NOT_BERT": "a gpt2 checkpoint, but this is for BERT only",
    "--model EMPTY": "no checkpoint",
    "": "rajpurkar/squad_v2: the hub does not give it",
}


@pytest.mark.parametrize("script", [baseline, distributed], ids=["baseline", "distributed"])
@pytest.mark.parametrize("line", BAD_OPTIONS)
def test_bad_options(tmp_path, monkeypatch, script, line):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "FILE").write_text("kept")
    (tmp_path / "EMPTY").mkdir()
    (tmp_path / "NOT_BERT").mkdir()
    (tmp_path / "NOT_BERT/config.json").write_text('{"model_type": "gpt2"}')
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(f"{ENCODER}/{name}", tmp_path / "NOT_BERT" / name)
    good = [] if line == "" or "--train-file" in line else ["--train-file", write_squad(tmp_path / "good.json", GOOD),
                                                            "--dev-file", str(tmp_path / "good.json")]  # fmt: skip
    prepare = [] if line == "--precision tf32" else ["--prepare"]  # which asks nothing of a login node's device
    monkeypatch.setattr("sys.argv", ["x.py", "--model", ENCODER, *prepare, *good, *line.split()])
    with pytest.raises(script.ScriptError) as error:
        script.main()
    assert BAD_OPTIONS[line] in str(error.value) and "\n" not in str(error.value)
    assert (tmp_path / "FILE").read_text() == "kept"


def one_error_line(process, script):
    lines = [line for line in process.stderr.splitlines() if "error:" in line and line.startswith(script)]
    assert len(lines) == 1, process.stderr
    return lines[0]


def test_as_a_user_sees_it(tmp_path):
    process = run_script(
        "baseline.py", ["--train-file", "a.json", "--dev-file", "b.json", "--model", ENCODER], tmp_path
    )
    assert process.returncode == 2
    assert process.stderr == "baseline.py: error: a.json: cannot be read: No such file or directory\n"
    assert process.stdout == ""


def test_without_torchrun(tmp_path):
    process = run_script("distributed.py", ["--sample"], tmp_path)
    assert process.returncode == 2
    assert "torchrun --standalone" in process.stderr and process.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sample", "--batch-size", "1"], "2 workers cannot share batches of 1"),
        (["--sample", "--train-file", "missing.json"], "missing.json: cannot be read"),
    ],
)
def test_once_in_a_parallel_run(tmp_path, arguments, message):
    """The script's own line stands once; what torchrun adds of its own is torchrun's."""
    process = run_script("distributed.py", arguments, tmp_path, world_size=2)
    assert process.returncode != 0
    assert message in one_error_line(process, "distributed.py")
    assert "[rank" not in process.stderr  # no traceback of a rank
    assert not list(tmp_path.glob("results/*"))


def test_the_launchers_pass_on_the_status(tmp_path):
    for launcher in ("run_baseline.sh", "run_ddp.sh"):
        command = ["bash", ROOT / launcher, "--sample", "--epochs", "0"]
        process = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert process.returncode == 2
        assert process.stderr == "baseline.py: error: --epochs: 0 is not at least 1\n"
