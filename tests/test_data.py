"""Features against the text they come from, on the whole dev set and training subset; and the order of batches."""

import gzip
import json

import datasets
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import baseline
from conftest import DEV_SET, ROOT


def make(questions, tokenizer, key, max_length=384, doc_stride=128):
    return baseline.load_features(questions, key, tokenizer=tokenizer, max_length=max_length, doc_stride=doc_stride)


def check_labels(questions, features):
    """Check every label against its answer's text; return how many answers begin or end inside a word.

    Such a label gives the whole word ("Japanese" for "Japan"): no token boundary meets the answer's.
    """
    inside_words, labelled = set(), set()
    for feature in features:
        question, start, end = feature["question"], feature["start_position"], feature["end_position"]
        if start == 0:
            assert end == 0
            continue
        labelled.add(question)
        row, first = questions[question], feature["context_start"]
        assert first <= start <= end <= feature["length"] - 2
        text = row["context"][feature["token_starts"][start - first] : feature["token_ends"][end - first]]
        answer, answer_start = row["answers"]["text"][0], row["answers"]["answer_start"][0]
        if baseline.normalize_answer(text) != baseline.normalize_answer(answer):
            before, after = row["context"][answer_start - 1], row["context"][answer_start + len(answer)]
            assert (before + answer[0]).isalnum() or (answer[-1] + after).isalnum()
            assert answer in text and len(text.split()) == len(answer.split())
            inside_words.add(question)
    assert labelled == {index for index, answers in enumerate(questions["answers"]) if answers["text"]}
    return len(inside_words)


def test_whole_dev_set(tokenizer):
    questions, _ = baseline.read_squad_file(str(DEV_SET))
    features = make(questions, tokenizer, "dev")
    # The counts of the official files and of Hugging Face's run_qa.py at 384/128.
    assert (len(questions), len(features), len(set(features["question"]))) == (11873, 12134, 11873)
    assert check_labels(questions, features) == 6


def test_whole_training_subset(tokenizer, squad_folder):
    questions, _ = baseline.read_squad_file(str(squad_folder / "train-v2.0-subset.json.gz"))
    assert len(questions) == 49523
    features = make(questions, tokenizer, "subset")
    assert set(features["question"]) == set(range(49523))
    assert check_labels(questions, features) == 40


def test_windows_cover_the_context_and_overlap(tokenizer):
    questions, _ = baseline.read_squad_file(str(ROOT / "sample/dev.json"))
    features = make(questions, tokenizer, "windows", max_length=80, doc_stride=20)
    assert len(features) > len(questions)
    for index, row in enumerate(questions):
        windows = [feature for feature in features if feature["question"] == index]
        tokens = tokenizer(row["question"].strip(), row["context"])["input_ids"]
        first = windows[0]["context_start"]
        assert all(window["input_ids"][:first] == tokens[:first] for window in windows)
        assert all(window["length"] == len(window["input_ids"]) <= 80 for window in windows)
        rejoined = windows[0]["input_ids"][first:-1]
        for window in windows[1:]:
            assert rejoined[-20:] == window["input_ids"][first : first + 20]
            rejoined += window["input_ids"][first + 20 : -1]
        assert rejoined == tokens[first:-1]


def test_answers_outside_the_window_point_at_cls(tokenizer):
    context = "word " * 100 + "the answer itself" + " word" * 100
    row = {
        "id": "q",
        "question": "  What?  ",
        "context": context,
        "answers": {"text": ["answer itself"], "answer_start": [504]},
    }
    features = make(datasets.Dataset.from_list([row]), tokenizer, "outside", max_length=50, doc_stride=10)
    labels = {(feature["start_position"], feature["end_position"]) for feature in features}
    texts = {tokenizer.decode(f["input_ids"][f["start_position"] : f["end_position"] + 1]) for f in features}
    assert (0, 0) in labels and texts == {"[CLS]", "answer itself"}
    assert all(feature["input_ids"][:4] == tokenizer("What?")["input_ids"] for feature in features)  # no outer spaces


def test_hub_layout_gives_the_same_features(tokenizer, tmp_path, monkeypatch):
    """The hub's squad_v2 is Parquet with these columns; a local file stands for it, since no hub is reached here."""
    rows = []
    for article in json.loads((ROOT / "sample/train.json").read_text())["data"]:
        for paragraph in article["paragraphs"]:
            for qa in paragraph["qas"]:
                answers = {key: [answer[key] for answer in qa["answers"]] for key in ("text", "answer_start")}
                rows.append({"id": qa["id"], "title": article["title"], "context": paragraph["context"],
                             "question": qa["question"], "answers": answers})  # fmt: skip
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "train.parquet")
    load = datasets.load_dataset
    monkeypatch.setattr(
        baseline.datasets, "load_dataset",
        lambda name, split: load("parquet", data_files={split: str(tmp_path / "train.parquet")}, split=split,
                                 cache_dir=str(tmp_path / "cache")),
    )  # fmt: skip
    hub, hub_digest = baseline.read_hub("train")
    file, _ = baseline.read_squad_file(str(ROOT / "sample/train.json"))
    assert len(hub_digest) == 64
    assert make(hub, tokenizer, "hub").to_dict() == make(file, tokenizer, "file").to_dict()


def test_gzip_gives_the_same_questions(tmp_path):
    content = (ROOT / "sample/dev.json").read_bytes()
    (tmp_path / "dev.json.gz").write_bytes(gzip.compress(content))
    plain, _ = baseline.read_squad_file(str(ROOT / "sample/dev.json"))
    assert baseline.read_squad_file(str(tmp_path / "dev.json.gz"))[0].to_dict() == plain.to_dict()


def test_a_second_start_does_not_tokenise_again(monkeypatch):
    monkeypatch.setattr("sys.argv", ["baseline.py", "--sample", "--max-length", "200"])
    options = baseline.parse_options(baseline.build_parser())
    _, first, _, _ = baseline.load_data(options)

    def fail(*arguments, **named):
        raise AssertionError("tokenised again")

    monkeypatch.setattr(baseline, "make_features", fail)
    monkeypatch.setattr(baseline.inspect, "getsource", lambda function: SOURCE)
    _, second, _, _ = baseline.load_data(options)
    assert second.cache_files and second.cache_files == first.cache_files  # memory-mapped, not held
    assert second.to_dict() == first.to_dict()


SOURCE = baseline.inspect.getsource(baseline.make_features)


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


def test_collate_pads_and_splits(tokenizer):
    questions, _ = baseline.read_squad_file(str(ROOT / "sample/train.json"))
    features = make(questions, tokenizer, "collate")
    indices = np.array([3, 100, 200, 17, 250])
    passes = baseline.collate(indices, features.with_format("arrow"), pass_size=2, round_to=64)
    assert [len(inputs["input_ids"]) for inputs in passes] == [2, 2, 1]
    rows = [(inputs, row) for inputs in passes for row in range(len(inputs["input_ids"]))]
    for index, (inputs, row) in zip(indices, rows, strict=True):
        expected = tokenizer(questions[int(index)]["question"].strip(), questions[int(index)]["context"],
                             padding="max_length", max_length=inputs["input_ids"].shape[1])  # fmt: skip
        assert inputs["input_ids"].shape[1] % 64 == 0
        for name in ("input_ids", "attention_mask", "token_type_ids"):
            assert inputs[name][row].tolist() == expected[name]
        assert inputs["start_positions"][row] == features[int(index)]["start_position"]


def test_a_long_question_that_leaves_no_room_is_named(tokenizer):
    row = {"id": "q7", "question": "why " * 40, "context": "text", "answers": {"text": [], "answer_start": []}}
    with pytest.raises(baseline.ScriptError, match="no room beside question q7"):
        make(datasets.Dataset.from_list([row]), tokenizer, "long", max_length=64, doc_stride=32)
