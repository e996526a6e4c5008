"""Features against the text they come from, on the whole dev set and training subset; and the order of batches."""

import gzip
import json
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import baseline
from conftest import DEV_SET, ROOT, write_squad


def load(path, tokenizer, max_length=384, doc_stride=128, threads=1):
    args = SimpleNamespace(max_length=max_length, doc_stride=doc_stride, threads=threads)
    return baseline.load_split("train", str(path) if path else None, tokenizer, args)


def check_labels(questions, features):
    """Check every label against its answer's text; return how many answers begin or end inside a word.

    Such a label gives the whole word ("Japanese" for "Japan"): no token boundary meets the answer's.
    """
    inside_words, labelled = set(), set()
    for feature in features.to_list():
        question, start, end = feature["question_index"], feature["start_position"], feature["end_position"]
        if start == 0:
            assert end == 0
            continue
        labelled.add(question)
        row, first = questions[question], feature["context_start"]
        assert first <= start <= end <= feature["length"] - 2
        text = row["context"][feature["text_starts"][start - first] : feature["text_ends"][end - first + 1]]
        answer, answer_start = row["answers"]["text"][0], row["answers"]["answer_start"][0]
        if baseline.normalize_answer(text) != baseline.normalize_answer(answer):
            before, after = row["context"][answer_start - 1], row["context"][answer_start + len(answer)]
            assert (before + answer[0]).isalnum() or (answer[-1] + after).isalnum()
            assert answer in text and len(text.split()) == len(answer.split())
            inside_words.add(question)
    assert labelled == {index for index, answers in enumerate(questions["answers"]) if answers["text"]}
    return len(inside_words)


def test_whole_dev_set(tokenizer):
    questions, features, facts = load(DEV_SET, tokenizer, threads=2)
    # The counts of the official files and of Hugging Face's run_qa.py at 384/128.
    assert (len(questions), len(features), len(set(features["question_index"]))) == (11873, 12134, 11873)
    assert check_labels(questions, features) == 6
    counts = {"questions": 11873, "impossible": 5945, "features": 12134, "lost_answers": 0}
    assert counts.items() <= {name.removeprefix("train_"): value for name, value in facts.items()}.items()


def test_whole_training_subset(tokenizer, squad_folder):
    questions, features, _ = load(squad_folder / "train-v2.0-subset.json.gz", tokenizer, threads=2)
    assert len(questions) == 49523
    assert set(features["question_index"]) == set(range(49523))
    assert check_labels(questions, features) == 40


def test_windows_cover_the_context_and_overlap(tokenizer):
    questions, features, _ = load(ROOT / "sample/dev.json", tokenizer, max_length=80, doc_stride=20)
    assert len(features) > len(questions)
    features = features.to_list()
    for index, row in enumerate(questions):
        windows = [feature for feature in features if feature["question_index"] == index]
        tokens = tokenizer(row["question"], row["context"])["input_ids"]
        first = windows[0]["context_start"]
        assert all(window["input_ids"][:first] == tokens[:first] for window in windows)
        assert all(window["length"] == len(window["input_ids"]) <= 80 for window in windows)
        rejoined = windows[0]["input_ids"][first:-1]
        for window in windows[1:]:
            assert rejoined[-20:] == window["input_ids"][first : first + 20]
            rejoined += window["input_ids"][first + 20 : -1]
        assert rejoined == tokens[first:-1]


def test_answers_outside_the_window_point_at_cls(tokenizer, tmp_path):
    context = "word " * 100 + "the answer itself" + " word" * 100
    path = write_squad(tmp_path / "outside.json", [(context, [("q", "  What?  ", [("answer itself", 504)])])])
    _, features, _ = load(path, tokenizer, max_length=50, doc_stride=10)
    labels = {(feature["start_position"], feature["end_position"]) for feature in features}
    texts = {tokenizer.decode(f["input_ids"][f["start_position"] : f["end_position"] + 1]) for f in features}
    assert (0, 0) in labels and texts == {"[CLS]", "answer itself"}
    assert all(feature["input_ids"][:4] == tokenizer("What?")["input_ids"] for feature in features)  # no outer spaces


def test_hub_layout_gives_the_same_features(tokenizer, tmp_path, monkeypatch):
    """The hub's dataset has a row for each question; a Parquet file stands in for it, since no hub is reached here."""
    rows = []
    for article in json.loads((ROOT / "sample/train.json").read_text())["data"]:
        for paragraph in article["paragraphs"]:
            for qa in paragraph["qas"]:
                answers = {key: [answer[key] for answer in qa["answers"]] for key in ("text", "answer_start")}
                rows.append({"id": qa["id"], "title": article["title"], "context": paragraph["context"],
                             "question": qa["question"], "answers": answers})  # fmt: skip
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "train.parquet")
    load_dataset = datasets.load_dataset
    monkeypatch.setattr(
        baseline.datasets, "load_dataset",
        lambda name, split: load_dataset("parquet", data_files={split: str(tmp_path / "train.parquet")}, split=split,
                                         cache_dir=str(tmp_path / "cache")),
    )  # fmt: skip
    _, from_hub, hub_facts = load(None, tokenizer)
    _, from_file, file_facts = load(ROOT / "sample/train.json", tokenizer)
    assert len(hub_facts.pop("train_sha256")) == len(file_facts.pop("train_sha256")) == 64
    assert hub_facts == file_facts
    assert from_hub.to_dict() == from_file.to_dict()


def test_gzip_gives_the_same_questions(tmp_path):
    content = (ROOT / "sample/dev.json").read_bytes()
    (tmp_path / "dev.json.gz").write_bytes(gzip.compress(content))
    plain, _ = baseline.read_squad(str(ROOT / "sample/dev.json"))
    assert baseline.read_squad(str(tmp_path / "dev.json.gz"))[0].to_dict() == plain.to_dict()


def test_a_second_start_does_not_tokenize_again(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["baseline.py", "--sample", "--max-length", "200", "--random-init"])
    source = baseline.inspect.getsource(baseline.make_features)

    def start():
        args = baseline.parse_args()
        tokenizer, _, _ = baseline.load_model(args)
        files = {"train": args.train_file, "dev": args.dev_file}
        return [baseline.load_split(split, path, tokenizer, args)[1] for split, path in files.items()]

    def fail(*arguments, **named):
        raise AssertionError("tokenized again")

    first = start()
    monkeypatch.setattr(baseline, "make_features", fail)
    monkeypatch.setattr(baseline.inspect, "getsource", lambda function: source)
    for before, after in zip(first, start(), strict=True):
        assert after.cache_files and after.cache_files == before.cache_files  # memory-mapped, not held
        assert after.to_dict() == before.to_dict()


@settings(max_examples=50, deadline=None)
@given(count=st.integers(1, 700), batch_size=st.integers(1, 50), seed=st.integers(0, 9), epoch=st.integers(0, 3))
def test_an_epoch_holds_each_feature_once(count, batch_size, seed, epoch):
    lengths = np.random.default_rng(0).integers(20, 384, count)
    batches = baseline.epoch_batches(lengths, batch_size, seed, epoch)
    assert sorted(np.concatenate(batches)) == list(range(count))
    assert sorted(map(len, batches), reverse=True)[: count // batch_size] == [batch_size] * (count // batch_size)
    again = baseline.epoch_batches(lengths, batch_size, seed, epoch)
    assert all(np.array_equal(a, b) for a, b in zip(batches, again, strict=True))


def test_batches_differ_by_epoch_and_hold_like_lengths():
    lengths = np.random.default_rng(0).integers(20, 384, 5000)
    first, second = (baseline.epoch_batches(lengths, 48, 0, epoch) for epoch in (0, 1))
    assert not any(set(a) == set(b) for a in first for b in second)
    padded = sum(len(batch) * lengths[batch].max() for batch in first)
    assert lengths.sum() / padded > 0.95  # a random order gives about 0.53 here


class SeenInputs(torch.nn.Module):
    """A model that notes what it is called with."""

    def forward(self, input_ids, attention_mask, token_type_ids):
        self.seen = {
            "input_ids": input_ids,
            "attention_mask": attention_mask[:, 0, 0],
            "token_type_ids": token_type_ids,
        }
        logits = torch.zeros(input_ids.shape)
        return SimpleNamespace(start_logits=logits, end_logits=logits)


def test_batches_are_padded_and_split_as_the_tokenizer_would(tokenizer):
    questions, features, _ = load(ROOT / "sample/train.json", tokenizer)
    indices = [3, 100, 200, 17, 250]
    args = SimpleNamespace(device=torch.device("cpu"), micro_batch_size=2, precision="fp32")
    (micro_batches,) = baseline.load_batches(features, [np.array(indices)], args)
    assert [len(inputs["input_ids"]) for inputs in micro_batches] == [2, 2, 1]
    for first, inputs in zip((0, 2, 4), micro_batches, strict=True):
        rows = indices[first : first + 2]
        expected = tokenizer(
            [questions[row]["question"] for row in rows], [questions[row]["context"] for row in rows], padding=True
        )
        model = SeenInputs()
        *_, is_context = baseline.forward(model, inputs, args)
        for name, tensor in model.seen.items():
            assert tensor.long().tolist() == expected[name]
        for row, in_context in enumerate(is_context.tolist()):
            assert in_context == [sequence == 1 for sequence in expected.sequence_ids(row)]
        for name in ("start_position", "end_position"):
            assert inputs[name].tolist() == [features[row][name] for row in rows]


def test_a_question_that_leaves_no_space_is_named(tokenizer, tmp_path):
    path = write_squad(tmp_path / "long.json", [("text", [("q6", "why?", []), ("q7", "why " * 40, [])])])
    with pytest.raises(baseline.ScriptError, match="question 'q7' has 40 tokens: shorten it, or raise --max-length"):
        load(path, tokenizer, max_length=64, doc_stride=32)
