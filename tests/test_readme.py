"""The README's Python, run as it stands there on a trained model, and the files that it links to."""

import re
import shutil
import subprocess

import transformers

from conftest import ROOT, TINY, write_model
from ranks import run_ranks

README = (ROOT / "README.md").read_text()


def test_the_trained_model_can_be_asked(tmp_path):
    model = write_model(tmp_path / "checkpoints/RUN/model", **TINY)
    transformers.BertForQuestionAnswering(transformers.BertConfig.from_pretrained(model)).save_pretrained(model)
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    # What an untrained model answers is chance: let it find a span that begins before it ends.
    asked = "output = model(**inputs)"
    assert code.count(asked) == 1
    chosen = f"{asked}\noutput.start_logits[0, 12], output.end_logits[0, 12] = 99, 99"
    (tmp_path / "ask.py").write_text(code.replace(asked, chosen))
    # [CLS] where does the tower stand ? [SEP] the tower stands in paris . [SEP]
    assert run_ranks(tmp_path / "ask.py", [], tmp_path).output == "paris\n"


def test_the_diff_without_the_report_is_short_and_keeps_main():
    assert shutil.which("bash")
    (command,) = re.findall(r"^diff -U1 -p baseline.py <.*$", README, re.MULTILINE)
    process = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 1 and process.stderr == ""
    assert "DistributedDataParallel(" in process.stdout and "Karp" not in process.stdout


def test_links_lead_to_files():
    links = re.findall(r"\]\(((?!https?:)[^)]+)\)|src=\"([^\"]+)\"", README)
    assert links
    for link in {one or other for one, other in links}:
        assert (ROOT / link).exists(), link
