"""Bad input: one line on stderr, exit status 2, no traceback, nothing overwritten; once in a parallel run."""

import gzip
import json
import shutil
import subprocess
from argparse import ArgumentError
from types import SimpleNamespace

import pytest
import torch

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
    "missing": (lambda path: None, "No such file"),
    "a directory": (lambda path: path.mkdir(), "Is a directory"),
    "no JSON": (lambda path: path.write_text("{"), "give files in SQuAD's format"),
    "not text": (lambda path: path.write_bytes(b"\xff\xfe\x00"), "give files in SQuAD's format"),
    "a list": (lambda path: path.write_text("[1]"), "give files in SQuAD's format"),
    "no data": (lambda path: path.write_text("{}"), "no key 'data'"),
    "no paragraphs": (lambda path: broken(path, lambda data: data[0].pop("paragraphs")), "no key 'paragraphs'"),
    "no answers": (
        lambda path: broken(path, lambda data: qa(data, 1).pop("answers")), "question 'q2': no key 'answers'"),
    "no id": (lambda path: broken(path, lambda data: qa(data, 1).pop("id")), "no key 'id'"),
    "answers that are a word": (
        lambda path: broken(path, lambda data: qa(data).update(answers="x")), "question 'q1': string indices"),
    "an answer elsewhere": (
        lambda path: broken(path, lambda data: qa(data)["answers"][0].update(answer_start=3)),
        "question 'q1': the answer 'Paris' is not at its answer_start 3; correct it in the file"),
    "an answer before the context": (
        lambda path: broken(path, lambda data: qa(data)["answers"][0].update(answer_start=-6)),
        "the answer 'Paris' is not at its answer_start -6"),
    "an empty answer": (
        lambda path: broken(path, lambda data: qa(data)["answers"][0].update(text="")),
        "the answer '' is not at its answer_start"),
    "no questions": (lambda path: write_squad(path, []), "no questions in it"),
    "an id twice": (lambda path: write_squad(path, [*GOOD, *GOOD]), "or its id is null or occurs twice"),
    "half a character": (
        lambda path: broken(path, lambda data: qa(data).update(question="\ud83d?")), "surrogates not allowed"),
}  # fmt: skip


def load(path, tokenizer):
    args = SimpleNamespace(max_length=384, doc_stride=128, threads=1)
    return baseline.load_split("train", str(path), tokenizer, args)


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files(tmp_path, tokenizer, case):
    make, message = BAD_FILES[case]
    path = tmp_path / "squad.json"
    make(path)
    with pytest.raises(baseline.ScriptError) as error:
        load(path, tokenizer)
    assert error.value.args[1] == 2
    assert message in error.value.args[0] and str(path) in error.value.args[0] and "\n" not in error.value.args[0]


def test_a_damaged_gzip(tmp_path, tokenizer):
    path = tmp_path / "squad.json.gz"
    for content in (b"{}", gzip.compress(b'{"data": []}')[:-9]):
        path.write_bytes(content)
        with pytest.raises(baseline.ScriptError, match="give files in SQuAD's format"):
            load(path, tokenizer)


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
    "--max-length 40 --doc-stride 40": "question 'q1' has 2 tokens: shorten it, or raise --max-length",
    "--max-length 1000": "--max-length 1000 is above its limit of 512",
    "--train-file x.json": "x.json: ",
    "--run-name a/b": "--run-name a/b: use letters",
    "--run-name speedup": "and not 'speedup'",
    "--output-dir FILE": "FILE",
    "--predictions FILE/x.json": "FILE",
    "--model nowhere": "--model nowhere: ",
    "--model NOT_BERT": "a gpt2 checkpoint, but this is for BERT only",
    "--model EMPTY": "--model EMPTY: ",
    "": "rajpurkar/squad_v2: ",
}


@pytest.mark.parametrize("script", [baseline, distributed], ids=["baseline", "distributed"])
@pytest.mark.parametrize("line", BAD_OPTIONS)
def test_bad_options(tmp_path, monkeypatch, script, line):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(distributed.dist, "is_torchelastic_launched", lambda: True)
    (tmp_path / "FILE").write_text("kept")
    (tmp_path / "EMPTY").mkdir()
    (tmp_path / "NOT_BERT").mkdir()
    (tmp_path / "NOT_BERT/config.json").write_text('{"model_type": "gpt2"}')
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(f"{ENCODER}/{name}", tmp_path / "NOT_BERT" / name)
    good = [] if line == "" or "--train-file" in line else ["--train-file", write_squad(tmp_path / "good.json", GOOD),
                                                            "--dev-file", str(tmp_path / "good.json")]  # fmt: skip
    prepare = [] if line == "--precision tf32" else ["--prepare"]  # which asks nothing of a login node
    monkeypatch.setattr("sys.argv", ["x.py", "--model", ENCODER, *prepare, *good, *line.split()])
    with pytest.raises((script.ScriptError, ArgumentError, OSError)) as error:  # those that end as one line
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
    assert process.stderr.startswith("baseline.py: error: a.json: ") and "No such file" in process.stderr
    assert process.stderr.count("\n") == 1
    assert process.stdout == ""


def test_an_output_directory_that_cannot_be_made(tmp_path):
    (tmp_path / "FILE").write_text("kept")
    process = run_script("baseline.py", ["--sample", "--output-dir", "FILE"], tmp_path)
    assert process.returncode == 2
    assert process.stderr.startswith("baseline.py: error: ") and process.stderr.count("\n") == 1
    assert "FILE" in process.stderr and (tmp_path / "FILE").read_text() == "kept"


def test_without_torchrun(tmp_path):
    process = run_script("distributed.py", ["--sample"], tmp_path)
    assert process.returncode == 2
    assert "start it with torchrun" in process.stderr and process.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sample", "--max-length", "1000"], "--max-length 1000 is above its limit of 512"),
        (["--sample", "--train-file", "missing.json"], "missing.json: "),
        (["--sample", "--run-name", "a/b"], "--run-name a/b: use letters"),
    ],
)
def test_once_in_a_parallel_run(tmp_path, arguments, message):
    """The script's own line stands once; what torchrun adds of its own is torchrun's."""
    process = run_script("distributed.py", arguments, tmp_path, world_size=2)
    assert process.returncode != 0
    assert message in one_error_line(process, "distributed.py")
    assert "[rank" not in process.stderr  # no traceback of a rank
    assert not list(tmp_path.glob("results/*"))


def test_an_error_of_one_rank_ends_all(tmp_path):
    """The second rank alone does not find its data, as on a node that lacks the file: it is named, with its host."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os\n"
        "if os.environ.get('RANK') == '1':\n"
        "    os.environ['HF_DATASETS_CACHE'] = 'FILE'\n"
    )  # fmt: skip
    (tmp_path / "FILE").write_text("in place of the directory")
    environment = {"PYTHONPATH": str(tmp_path)}
    process = run_script("distributed.py", ["--sample"], tmp_path, world_size=2, environment=environment)
    assert process.returncode != 0
    line = one_error_line(process, "distributed.py")
    assert "cannot be used as a cache" in line and "HF_HOME" in line and "(rank 1 on " in line
    assert "[rank" not in process.stderr
    assert not list(tmp_path.glob("results/*"))


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
@pytest.mark.parametrize("script", [baseline, distributed], ids=["baseline", "distributed"])
@pytest.mark.parametrize("environment", [{"CUDA_VISIBLE_DEVICES": "0,1"}, {"SLURM_GPUS_ON_NODE": "2"}])
def test_gpus_that_torch_cannot_use_end_a_job_before_training(monkeypatch, script, environment):
    with pytest.raises(script.ScriptError) as error:
        set_up(script, monkeypatch, **environment)
    message = str(error.value)
    built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
    assert built in message and "driver: " in message and "\n" not in message
    assert "PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cu126 bash run_baseline.sh --prepare" in message
    assert "https://pytorch.org/get-started/previous-versions" in message and "--device cpu" in message
    for wanted in ["--device", "cpu"], ["--prepare"]:
        assert set_up(script, monkeypatch, wanted, **environment).device.type == "cpu"


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch can use the GPU here")
@pytest.mark.parametrize("visible", ["", "-1", "NoDevFiles"])
def test_without_gpus_the_cpu_is_used(monkeypatch, visible):
    assert set_up(baseline, monkeypatch, CUDA_VISIBLE_DEVICES=visible).device.type == "cpu"
