"""The files and checkpoints that people bring: a table of inputs, and of what must come of each."""

import json
import shutil
import unicodedata
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import baseline
from conftest import ENCODER, TINY, run_script, write_model, write_squad

TOWER = "The tower stands in Paris. It was built in 1889 by Gustave Eiffel."
WHERE = ("q1", "Where does the tower stand?", [("Paris", 20)])


# Answers that begin or end in a character which the tokenizer drops: (context, answer). The marks are escaped.
ANSWERS = {
    "Thai": ("12 \u0e40\u0e14\u0e37\u0e2d\u0e19 \u0e2a\u0e35\u0e48 \u0e04\u0e23\u0e31\u0e49\u0e07",
             "\u0e2a\u0e35\u0e48"),
    "Thai, at the end": ("12 \u0e40\u0e14\u0e37\u0e2d\u0e19 \u0e2a\u0e35\u0e48", "\u0e2a\u0e35\u0e48"),
    "Hindi": ("\u092d\u093e\u0930\u0924 \u0915\u0940 \u0930\u093e\u091c\u0927\u093e\u0928\u0940",
              "\u0930\u093e\u091c\u0927\u093e\u0928\u0940"),
    "Hindi, inside": ("\u092d\u093e\u0930\u0924 \u0915\u0940 \u0930\u093e\u091c\u0927\u093e\u0928\u0940",
                      "\u0915\u0940"),
    "Arabic with vowels": ("\u0645\u064f\u062d\u064e\u0645\u064e\u0651\u062f\u064c \u0631\u0633\u0648\u0644",
                           "\u0645\u064f\u062d\u064e\u0645\u064e\u0651\u062f\u064c"),
    "decomposed": (unicodedata.normalize("NFD", "She met Beyonc\u00e9, then Zo\u00eb."), "Beyonce\u0301"),
    "after a decomposed word": ("Beyonce\u0301 sang there.", "sang"),
    "a mark after it": ("The tower stands in Paris\u200e. It was built.", "Paris\u200e"),
    "a mark before it": ("The tower stands in \u200eParis. It was built.", "\u200eParis"),
    "a mark before the next word": ("The Paris \u200eLyon line", "Paris"),
    "a mark of its own on either side": ("a \u200e Paris \u200f b", "Paris"),
    "inside parentheses": ("The city (\u200eParis\u200e)", "Paris\u200e"),
    "a byte-order mark first": ("\ufeffParis is a city.", "\ufeffParis"),
    "a soft hyphen inside": ("A co\u00adop shop", "co\u00adop"),
    "a soft hyphen at its end": ("Every week\u00ad end", "week\u00ad"),
    "zero-width space, then a line": ("in Paris\u200b\nIt was built.", "Paris\u200b"),
    "Korean, a token for each letter": ("\uc5d0\ud3a0\ud0d1\uc740 \ud504\ub791\uc2a4 \ud30c\ub9ac\uc5d0",
                                        "\ud30c\ub9ac\uc5d0"),
    "Chinese, a token for each character": ("\u5df4\u9ece\u94c1\u5854\u4f4d\u4e8e\u6cd5\u56fd\u5df4\u9ece",
                                            "\u6cd5\u56fd"),
}  # fmt: skip


def load(path, tokenizer, max_length=384, doc_stride=128):
    args = SimpleNamespace(max_length=max_length, doc_stride=doc_stride, device=torch.device("cpu"))
    return baseline.load_split("train", str(path), tokenizer, args)


def labelled_answers(split):
    """Return the text of every label, as an evaluation would give it."""
    texts = []
    for index, feature in enumerate(split.table):
        if feature["start_position"]:
            spans = np.array([[1.0, feature["start_position"], feature["end_position"], 0.0]])
            texts.append(baseline.answer_questions(split, np.array([index]), spans)[0].text)
    return texts


@pytest.mark.parametrize("case", ANSWERS)
def test_labels_and_answers_keep_dropped_characters(tmp_path, tokenizer, case):
    context, answer = ANSWERS[case]
    path = write_squad(tmp_path / "squad.json", [(context, [("q", "Which?", [(answer, context.index(answer))])])])
    split = load(path, tokenizer)
    assert labelled_answers(split) == [answer]
    assert split.facts["out_of_reach"] == 0


WORDS = st.text(st.sampled_from("aé\u0301\u200e\u00ad\u0e2a\u0e35\ud30c,(-"), min_size=1, max_size=6)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(words=st.lists(WORDS, min_size=1, max_size=40), data=st.data())
def test_labels_of_whole_words_are_these_words(tmp_path, tokenizer, words, data):
    """Whatever marks words have, a label that begins and ends with words gives exactly their text."""
    first = data.draw(st.integers(0, len(words) - 1))
    answer_words = words[first : first + data.draw(st.integers(1, 3))]
    has_tokens = [bool(tokenizer.tokenize(word)) for word in words]
    assume(has_tokens[first] and has_tokens[first + len(answer_words) - 1])
    context, answer = " ".join(words), " ".join(answer_words)
    start = len(" ".join([*words[:first], ""]))
    path = write_squad(tmp_path / "squad.json", [(context, [("q", "Which?", [(answer, start)])])])
    split = load(path, tokenizer, max_length=24, doc_stride=6)
    texts = labelled_answers(split)
    assert set(texts) <= {answer}
    assert split.facts["out_of_reach"] == (not texts)
    if len(tokenizer.tokenize(answer)) <= 6:  # the overlap holds it
        assert texts


@pytest.mark.parametrize("case", ["Thai", "a mark after it", "a mark before it"])
def test_a_question_that_is_learned_is_answered(tmp_path, run, case):
    context, answer = ANSWERS[case]
    path = write_squad(tmp_path / "squad.json", [(context, [("q", "Which?", [(answer, context.index(answer))])])])
    options = ["--epochs", "60", "--max-steps", "60", "--evaluate-every", "60", "--lr", "0.003", "--dropout", "0"]
    record = run(path, *options, "--predictions", "predictions.json")
    assert record["quality"]["train_loss"] < 0.1
    assert record["quality"]["exact"] == record["quality"]["f1"] == 100
    assert json.loads(Path("predictions.json").read_text()) == {"q": answer}


def words(count):
    return " ".join(["word"] * count)


# Contexts of which the second part is the answer, and how many answers are then out of reach.
REACH = {
    "thirty tokens": (["It is ", words(30), "."], 0),
    "thirty-one tokens": (["It is ", words(31), "."], 1),
    "longer than any window": (["It is ", words(60)], 1),
    "dropped characters only": (["a ", "\u200e", " b"], 1),
    # The tokenizer makes a word of more than 100 characters one [UNK], which says nothing about the text in it.
    "a word of 100 characters": (["in ", "nationalization" * 6 + "nationaliz", " or y"], 0),
    "a word of 101 characters": (["in ", "nationalization" * 6 + "nationaliza", " or y"], 1),
    "inside a long word": (["x" * 90, "yes", "z" * 90], 1),
    "Thai without spaces": (["\u0e01" * 70, "\u0e02" * 5, "\u0e03" * 70], 1),
    "beside a long word": (["x" * 101 + " ", "yes", " " + "z" * 101], 0),
    "an unknown sign": (["in ", "\U0001f5fc", " or y"], 0),
}


@pytest.mark.parametrize("case", REACH)
def test_answers_that_can_never_be_given_are_counted(tmp_path, run, capsys, case):
    """The model may learn the label, but no evaluation would give this answer."""
    parts, count = REACH[case]
    paragraphs = [(TOWER, [WHERE]), ("".join(parts), [("q2", "Which?", [(parts[1], len(parts[0]))])])]
    path = write_squad(tmp_path / "squad.json", paragraphs)
    record = run(path, "--max-length", "60", "--doc-stride", "35")
    facts = [record["settings"][f"{split}_out_of_reach"] for split in ("train", "dev")]
    assert facts == [count, count]
    # Once for each split.
    assert capsys.readouterr().out.count("1 answers cannot be predicted") == 2 * count


def test_an_answer_that_is_too_long_for_one_window_may_be_in_reach_of_the_next(tmp_path, tokenizer):
    """The answer is cut by the end of the first window, and whole in the second one."""
    context = f"{words(26)} the answer {words(40)}"
    path = write_squad(tmp_path / "squad.json", [(context, [("q", "Why?", [("the answer", 26 * 5)])])])
    split = load(path, tokenizer, max_length=32, doc_stride=10)
    assert split.facts["out_of_reach"] == 0
    assert labelled_answers(split) == ["the answer"]
    assert split.table["in_reach"][:].tolist() == [False, True, *[False] * (len(split.lengths) - 2)]


@pytest.mark.parametrize("question", ["Where? [SEP] In Paris. [SEP] Who?", "[SEP]", "[CLS] [MASK] who [PAD]?", "Who?"])
def test_special_tokens_in_a_question(tmp_path, run, tokenizer, question):
    path = write_squad(tmp_path / "squad.json", [(TOWER, [("q", question, [("Gustave Eiffel", 51)])])])
    expected = tokenizer(question, TOWER)
    split = load(path, tokenizer)
    (feature,) = split.table
    assert split.ids.tolist() == feature["input_ids"].tolist() == expected["input_ids"]
    assert feature["context_start"] == expected["token_type_ids"].index(1) == expected.sequence_ids().index(1)
    assert labelled_answers(split) == ["Gustave Eiffel"]
    assert run(path)["settings"]["steps"] == 2


def change(**values):
    """Return a question of SQuAD's layout with these values changed."""
    question = {"id": "q2", "question": "Who built it?", "answers": [{"text": "Gustave Eiffel", "answer_start": 51}]}
    return question | values


# Records of a file: (context, question), and what is said of it; None where it works.
RECORDS = {
    "as it should be": (TOWER, change(), None),
    "question null": (TOWER, change(question=None), "question 'q2': question and context must be text"),
    "question a number": (TOWER, change(question=7), "question 'q2': question and context must be text"),
    "question a list": (TOWER, change(question=["Who?"]), "question 'q2': question and context must be text"),
    "id null": (TOWER, change(id=None), "question None: its id is null or occurs twice"),
    "id an object": (TOWER, change(id={}), "question {}: "),
    "id a number": (TOWER, change(id=7), None),
    "context null": (None, change(answers=[]), "question 'q2': question and context must be text"),
    "context a number": (7, change(answers=[]), "question 'q2': question and context must be text"),
    "context empty": ("", change(answers=[]), "question 'q2': its context has no tokens"),
    "context of spaces": (" \n", change(answers=[]), "question 'q2': its context has no tokens"),
    "context without tokens": ("\u200b\u200b", change(answers=[]), "question 'q2': its context has no tokens"),
    "context of half a character": ("\ud83d", change(answers=[]), "surrogates not allowed"),
    "question empty": (TOWER, change(question=" "), None),
    "answer null": (TOWER, change(answers=[{"text": None, "answer_start": 51}]),
                    "question 'q2': the answer None is empty or not text; where there is no answer, write []"),
    "answer empty": (TOWER, change(answers=[{"text": "", "answer_start": 0}]),
                     "question 'q2': the answer '' is empty or not text; where there is no answer, write []"),
    "answer of spaces": (TOWER, change(answers=[{"text": " ", "answer_start": 3}]),
                         "question 'q2': the answer ' ' is empty or not text; where there is no answer, write []"),
    "answer_start null": (TOWER, change(answers=[{"text": "Paris", "answer_start": None}]),
                          "question 'q2': answer_start must be an integer, not None"),
    "answer_start a float": (TOWER, change(answers=[{"text": "Paris", "answer_start": 20.0}]),
                             "question 'q2': answer_start must be an integer, not 20.0"),
    "answer_start a text": (TOWER, change(answers=[{"text": "Paris", "answer_start": "20"}]),
                            "question 'q2': answer_start must be an integer, not '20'"),
    "second answer elsewhere": (
        TOWER, change(answers=[{"text": "Paris", "answer_start": 20}, {"text": "Paris", "answer_start": 21}]),
        "question 'q2': the answer 'Paris' is not at its answer_start 21"),
    "impossible, with an answer": (TOWER, change(is_impossible=True),
                                   "question 'q2': it has an answer, but is_impossible is true"),
    "impossible": (TOWER, change(is_impossible=True, answers=[]), None),
    "answers null": (TOWER, change(answers=None), "question 'q2': "),
    "answers as the hub has them": (TOWER, change(answers={"text": ["Paris"], "answer_start": [20]}),
                                    "question 'q2': "),
    "more keys": (TOWER, change(is_impossible=False, plausible_answers=[], language="en"), None),
    "Korean question": (TOWER, change(question="\uc5d0\ud3a0\ud0d1\uc740 " * 60), "question 'q2' has "),
    "long question": (TOWER, change(question="why " * 300), "question 'q2' has 300 tokens: shorten it"),
}  # fmt: skip


@pytest.mark.parametrize("everywhere", [False, True], ids=["in one record", "in all records"])
@pytest.mark.parametrize("case", RECORDS)
def test_records(tmp_path, run, refused, case, everywhere):
    context, question, message = RECORDS[case]
    paragraphs = [{"context": context, "qas": [question]}]
    if not everywhere:
        first_id = 1 if isinstance(question["id"], int) else "q1"  # one file, one type of ids
        first = {"id": first_id, "question": WHERE[1], "answers": [{"text": "Paris", "answer_start": 20}]}
        paragraphs.insert(0, {"context": TOWER, "qas": [first]})
    path = tmp_path / "squad.json"
    path.write_text(json.dumps({"data": [{"paragraphs": paragraphs}]}))
    if message:
        assert message in refused(path)
    else:
        quality = run(path, "--predictions", "predictions.json")["quality"]
        assert np.isfinite(quality["train_loss"])
        assert str(question["id"]) in json.loads(Path("predictions.json").read_text())


@pytest.mark.parametrize("answers", [[], [("Paris", 20)]], ids=["no question", "every question"])
def test_dev_sets_of_one_kind(tmp_path, run, capsys, answers):
    """Figures of questions that are not there are null, and nothing is said of what the model learned."""
    path = write_squad(tmp_path / "squad.json", [(TOWER, [("q1", "Where?", answers), ("q2", "Which city?", answers)])])
    quality = run(path)["quality"]
    assert (quality["has_answer_f1"] is None) == (not answers)
    assert (quality["no_answer_accuracy"] is None) == bool(answers)
    assert "learn" not in capsys.readouterr().out


def write_checkpoint(directory, architecture="BertForQuestionAnswering", **sizes):
    """Write a tiny checkpoint with weights; return its directory."""
    write_model(directory, **(TINY | sizes))
    torch.manual_seed(0)
    config = transformers.BertConfig.from_pretrained(directory)
    getattr(transformers, architecture)(config).save_pretrained(directory)
    return directory


def rename_weights(rename):
    def spoil(directory):
        weights = load_file(directory / "model.safetensors")
        weights = {rename(name): weight for name, weight in weights.items() if rename(name)}
        save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})

    return spoil


def replace_weight(name, weight):
    def spoil(directory):
        weights = load_file(directory / "model.safetensors")
        save_file(weights | {name: weight}, directory / "model.safetensors", metadata={"format": "pt"})

    return spoil


def rewrite(name, content):
    """Return a function that replaces a file's content: by content(old), by bytes, or by nothing for None."""

    def spoil(directory):
        path = directory / name
        if content is None:
            path.unlink()
        else:
            path.write_bytes(content(path.read_bytes()) if callable(content) else content)

    return spoil


def set_key(name, key, value):
    return rewrite(name, lambda content: json.dumps(json.loads(content) | {key: value}).encode())


def set_tokenizer(directory, tokenizer_class):
    shutil.copy(f"{ENCODER}/vocab.txt", directory)
    (directory / "tokenizer.json").unlink()
    config = {"tokenizer_class": tokenizer_class, "word_tokenizer_type": "basic", "do_lower_case": True}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))


def drop_tokenizer(directory):
    for path in directory.glob("tokenizer*"):
        path.unlink()


def drop_post_processor(directory):
    set_key("tokenizer.json", "post_processor", None)(directory)
    set_key("tokenizer_config.json", "tokenizer_class", "PreTrainedTokenizerFast")(directory)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:53aa51172d142c89d9012cce15ae4d6c\nsize 90868376\n"
FIRST = "bert.embeddings.LayerNorm.bias"
WIDE = "bert.encoder.layer.1.output.dense.weight"
RELATIVE = "bert.encoder.layer.0.attention.self.distance_embedding.weight"


def nothing(directory):
    pass


# Checkpoints: how one is spoiled, its sizes or architecture, and what is said of it; None where it works.
CHECKPOINTS = {
    "as it should be": (nothing, {}, None),
    "pretrained, another head": (nothing, {"architecture": "BertForPreTraining"}, None),
    "the encoder alone": (nothing, {"architecture": "BertModel"}, None),
    "three labels": (nothing, {"architecture": "BertForSequenceClassification", "num_labels": 3}, None),
    "a span head of three": (nothing, {"num_labels": 3}, None),
    "names of old": (
        rename_weights(lambda name: name.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta")),
        {}, None),
    "no head": (rename_weights(lambda name: None if name.startswith("qa_outputs") else name), {}, None),
    "saved by DDP": (
        rename_weights("module.{}".format), {}, f"weights are missing or have another shape: {FIRST} (module.bert."),
    "saved compiled": (
        rename_weights("_orig_mod.{}".format), {}, f"another shape: {FIRST} (_orig_mod.bert."),
    "saved by DDP, compiled": (
        rename_weights("module._orig_mod.{}".format), {}, f"another shape: {FIRST} (module._orig_mod.bert."),
    "saved with compiled layers": (
        rename_weights(lambda name: name.replace("layer.1.", "layer.1._orig_mod.")), {},
        "shape: bert.encoder.layer.1.attention.output.LayerNorm.bias (bert.encoder.layer.1._orig_mod."),
    "a weight missing": (rename_weights(lambda name: None if name == WIDE else name), {}, f"shape: {WIDE}, 1 in all;"),
    "another shape": (replace_weight(WIDE, torch.zeros(3, 64)), {}, f"another shape: {WIDE}, 1 in all;"),
    "all of another model": (rename_weights("decoder.{}".format), {}, f"another shape: {FIRST}, 37 in all;"),
    "weights cut": (rewrite("model.safetensors", lambda content: content[: len(content) // 2]), {}, "deserializing"),
    "weights cut early": (rewrite("model.safetensors", lambda content: content[:100]), {}, "deserializing"),
    "weights empty": (rewrite("model.safetensors", b""), {}, "deserializing"),
    "weights a pointer of Git LFS": (rewrite("model.safetensors", POINTER), {}, "deserializing"),
    "weights not there": (rewrite("model.safetensors", None), {}, "no file named model.safetensors"),
    "configuration cut": (rewrite("config.json", b"{"), {}, "not a valid JSON file"),
    "configuration not there": (rewrite("config.json", None), {}, "give a BERT checkpoint"),
    "tokenizer a pointer of Git LFS": (rewrite("tokenizer.json", POINTER), {}, "give a BERT checkpoint"),
    "tokenizer not there": (rewrite("tokenizer.json", None), {}, "it has no tokenizer files"),
    "no tokenizer files at all": (drop_tokenizer, {}, "no tokenizer files, such as tokenizer.json or vocab.txt;"),
    "tokenizer in Python": (
        lambda directory: set_tokenizer(directory, "BertJapaneseTokenizer"), {}, "Python based tokenizers"),
    "a vocabulary only": (lambda directory: set_tokenizer(directory, "BertTokenizer"), {}, None),
    "tokenizer without post-processor": (drop_post_processor, {}, "does not make [CLS] question [SEP] context [SEP]"),
    "relative positions": (
        replace_weight(RELATIVE, torch.zeros(1023, 32)), {},
        f"its encoder has weights that transformers' BERT does not use: {RELATIVE};"),
    "relative positions, the encoder alone": (
        replace_weight(RELATIVE.removeprefix("bert."), torch.zeros(1023, 32)), {"architecture": "BertModel"},
        f"does not use: {RELATIVE.removeprefix('bert.')};"),
    "a third layer": (
        replace_weight(WIDE.replace("layer.1", "layer.2"), torch.zeros(64, 128)), {},
        "does not use: bert.encoder.layer.2"),
    # Checkpoints that transformers 3 wrote have them: they are 0, 1, 2 ... in all of them.
    "position ids": (replace_weight("bert.embeddings.position_ids", torch.arange(512)[None]), {}, None),
    "a weight not a number": (
        replace_weight(WIDE, torch.full((64, 128), torch.nan)), {}, f"its weights are not finite numbers: {WIDE};"),
    "a weight infinite": (
        replace_weight(FIRST, torch.full((64,), torch.inf)), {}, f"its weights are not finite numbers: {FIRST};"),
    "more tokens than embeddings": (nothing, {"vocab_size": 1000}, "exceeds its embedding"),
    "more embeddings than tokens": (nothing, {"vocab_size": 30528}, None),
    "one token type": (nothing, {"type_vocab_size": 1}, "only one token type"),
    "three token types": (nothing, {"type_vocab_size": 3}, None),
    "fewer positions": (nothing, {"max_position_embeddings": 128}, "--max-length 384 is above its limit of 128"),
}  # fmt: skip


@pytest.mark.parametrize("case", CHECKPOINTS)
def test_checkpoints(tmp_path, run, refused, case):
    spoil, sizes, message = CHECKPOINTS[case]
    directory = write_checkpoint(tmp_path / "checkpoint", **sizes)
    spoil(directory)
    path = write_squad(tmp_path / "squad.json", [(TOWER, [WHERE])])
    if message:
        line = refused(path, model=directory)
        assert message in line and line.startswith(f"--model {directory}: ")
    else:
        record = run(path, model=directory)
        assert np.isfinite(record["quality"]["train_loss"])
        assert len(record["settings"]["model_sha256"]) == 64


@pytest.mark.parametrize("case", ["names of old", "three labels", "the encoder alone", "a span head of three"])
def test_what_is_loaded_is_what_was_saved(tmp_path, case):
    spoil, sizes, _ = CHECKPOINTS[case]
    directory = write_checkpoint(tmp_path / "checkpoint", **sizes)
    saved = load_file(directory / "model.safetensors")
    spoil(directory)
    args = SimpleNamespace(model=str(directory), seed=1, max_length=384, dropout=None, random_init=False)
    _, model, _ = baseline.load_model(args)
    for name, weight in model.bert.state_dict().items():
        assert torch.equal(weight, saved.get(f"bert.{name}", saved.get(name)))
    assert model.qa_outputs.weight.shape == (2, 64)


def test_one_checkpoint_by_any_name(tmp_path, run, monkeypatch):
    """The record keeps the name that was given, and a checksum of the weights, by which runs are compared."""
    path = write_squad(tmp_path / "squad.json", [(TOWER, [WHERE])])
    directory = write_checkpoint(tmp_path / "checkpoint")
    (tmp_path / "link").symlink_to(directory)
    shutil.copytree(directory, tmp_path / "copy")
    monkeypatch.chdir(directory)
    settings = {}
    for number, model in enumerate([".", str(directory), "../checkpoint/", "../link", "../copy"]):
        settings[model] = run(path, model=model, name=f"run-{number}")["settings"]
        assert settings[model]["model"] == model
    assert len({of_run["model_sha256"] for of_run in settings.values()}) == 1
    other = write_checkpoint(tmp_path / "other")
    replace_weight(WIDE, torch.zeros(64, 128))(other)
    assert run(path, model=other, name="other")["settings"]["model_sha256"] != settings["."]["model_sha256"]


def test_a_second_run_of_the_same_name(tmp_path, run, capsys):
    """Slurm gives all runs of a job the same default name."""
    path = write_squad(tmp_path / "squad.json", [(TOWER, [WHERE])])
    other = write_squad(tmp_path / "other.json", [(TOWER, [("q2", *WHERE[1:])])])
    shutil.copy(path, tmp_path / "copy.json")
    run(path)
    record = (tmp_path / "results/run.json").read_text()
    said = f"{tmp_path}/results/run.json: this run is finished; for another one, give another --run-name\n"
    capsys.readouterr()
    for arguments in ([path], [tmp_path / "copy.json", "--checkpoint-every", "1", "--evaluate-every", "1"]):
        run(*arguments)
        assert capsys.readouterr().out.endswith(said)
    for arguments, message in [
        ([path, "--lr", "0.001"], "made with lr 5e-05, not 0.001; give another --run-name"),
        ([path, "--precision", "bf16"], "made with precision 'fp32', not 'bf16'"),
        ([path, "--seed", "1"], "made with seed 42, not 1"),
        ([other], "made with train_sha256 "),
    ]:
        with pytest.raises(baseline.ScriptError) as error:
            run(*arguments)
        assert message in str(error.value) and error.value.status == 2
        assert (tmp_path / "results/run.json").read_text() == record
    (tmp_path / "results/run.json").write_text("{")
    with pytest.raises(baseline.ScriptError, match=r"results/run\.json: damaged"):
        run(path)
    assert (tmp_path / "results/run.json").read_text() == "{"


# What may have happened to the file of the features since it was written: how it is spoiled.
CACHES = {
    "empty": lambda content: b"",
    "a byte": lambda content: content[:1],
    "cut in the header": lambda content: content[:300],
    "cut in the middle": lambda content: content[: len(content) // 2],
    "cut at the end": lambda content: content[:-100],
    "garbage": lambda content: b"garbage " * 1000,
    "zeros": lambda content: bytes(len(content)),
}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty directory for the features."""
    monkeypatch.setattr(baseline.datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache/squad-features"


@pytest.mark.parametrize("case", CACHES)
def test_a_damaged_cache_is_named(tmp_path, cache, refused, run, case):
    path = write_squad(tmp_path / "squad.json", [(TOWER * 50, [WHERE])])
    options = ["--max-length", "64", "--doc-stride", "16"]
    run(path, *options, name="first")
    (file,) = cache.glob("*.arrow")
    content = file.read_bytes()
    file.unlink()  # a new file: the old one is still mapped
    file.write_bytes(CACHES[case](content))
    line = refused(path, *options)
    assert line.startswith(f"{cache}: cannot be used as a cache: ") and "; remove it, or set HF_HOME" in line
    # As the line says.
    shutil.rmtree(cache)
    run(path, *options)


def full(*arguments, **named):
    raise OSError(28, "No space left on device")


def test_a_cache_that_cannot_be_used(tmp_path, cache, refused, monkeypatch):
    path = write_squad(tmp_path / "squad.json", [(TOWER, [WHERE])])
    cache.parent.write_text("in place of the directory")
    line = refused(path)
    assert str(cache) in line and "HF_HOME" in line
    cache.parent.unlink()
    acquire = baseline.filelock.FileLock.acquire
    with monkeypatch.context() as patch:
        patch.setattr(
            baseline.filelock.FileLock, "acquire",
            # Only that of the cache, not that of the run.
            lambda lock, **named: full() if str(cache) in lock.lock_file else acquire(lock, **named),
        )  # fmt: skip
        line = refused(path)
    assert str(cache) in line and "HF_HOME" in line and "No space left" in line
    with monkeypatch.context() as patch:
        patch.setattr(baseline.datasets.Dataset, "map", full)
        line = refused(path)
    assert str(cache) in line and "HF_HOME" in line and "No space left" in line


def test_an_unusable_cache_as_a_user_sees_it(tmp_path):
    (tmp_path / "FILE").write_text("in place of the directory")
    environment = {"HF_HOME": str(tmp_path / "FILE"), "HF_DATASETS_CACHE": str(tmp_path / "FILE/datasets")}
    process = run_script("baseline.py", ["--sample", "--random-init"], tmp_path, environment=environment)
    assert process.returncode == 2
    assert process.stderr.startswith("baseline.py: error: ") and process.stderr.count("\n") == 1
    assert str(tmp_path / "FILE") in process.stderr and "HF_HOME" in process.stderr
