"""The packaged encoder learns to answer real questions; minutes of training, so only where SQUAD_LONG=1."""

import gzip
import json
import os

import pytest

from conftest import DEV_SET, ENCODER, run_script


def answerable(source, count, path):
    """Write the first `count` answerable questions of a SQuAD file."""
    content, left = json.loads(gzip.decompress(source.read_bytes())), count
    for article in content["data"]:
        for paragraph in article["paragraphs"]:
            paragraph["qas"] = [qa for qa in paragraph["qas"] if qa["answers"]][: max(left, 0)]
            left -= len(paragraph["qas"])
    assert left == 0
    path.write_text(json.dumps(content))
    return str(path)


@pytest.mark.alone  # it trains with two threads
@pytest.mark.skipif(os.environ.get("SQUAD_LONG") != "1", reason="SQUAD_LONG=1 switches on training for ten minutes")
def test_the_encoder_learns(squad_folder, tmp_path):
    files = ["--train-file", answerable(squad_folder / "train-v2.0-subset.json.gz", 4000, tmp_path / "train.json")]
    files += ["--dev-file", answerable(DEV_SET, 400, tmp_path / "dev.json"), "--model", ENCODER, "--threads", "2"]
    command = [*files, "--batch-size", "24", "--micro-batch-size", "6", "--epochs", "1"]
    quality = {}
    for run, more in (("untrained", ["--lr", "0", "--max-steps", "1"]), ("trained", ["--lr", "2e-4"])):
        process = run_script("baseline.py", [*command, *more, "--run-name", run], tmp_path)
        assert process.returncode == 0, process.stderr
        quality[run] = json.loads((tmp_path / f"results/{run}.json").read_text())["quality"]
    print(quality)
    assert quality["untrained"]["dev_loss"] > 4.5 and quality["untrained"]["best_span_f1"] < 15
    assert quality["trained"]["dev_loss"] < 0.6 * quality["untrained"]["dev_loss"]
    assert quality["trained"]["best_span_f1"] > 40
