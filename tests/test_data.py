"""Features against the text they come from, on the whole dev set and training subset; and the order of batches."""

import collections
import errno
import gzip
import inspect
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


def load(path, tokenizer, max_length=384, doc_stride=128, device="cpu"):
    args = SimpleNamespace(max_length=max_length, doc_stride=doc_stride, device=torch.device(device))
    return baseline.load_split("train", str(path) if path else None, tokenizer, args)


def rows_of(split):
    """Return the features as a list of dicts of Python values."""
    return split.table.with_format(None).to_list()


def check_labels(split):
    """Check every label against its answer's text; return how many answers begin or end inside a word.

    Such a label gives the whole word ("Japanese" for "Japan"): no token boundary meets the answer's.
    """
    inside_words, labelled = set(), set()
    for feature in rows_of(split):
        question, start, end = feature["question_index"], feature["start_position"], feature["end_position"]
        if start == 0:
            assert end == 0 and not feature["in_reach"]
            continue
        labelled.add(question)
        row, first = split.questions[question], feature["context_start"]
        assert first <= start <= end <= feature["length"] - 2
        text = row["context"][feature["text_starts"][start - first] : feature["text_ends"][end - first]]
        answer, answer_start = row["answers"]["text"][0], row["answers"]["answer_start"][0]
        if baseline.normalize_answer(text) != baseline.normalize_answer(answer):
            before, after = row["context"][answer_start - 1], row["context"][answer_start + len(answer)]
            assert (before + answer[0]).isalnum() or (answer[-1] + after).isalnum()
            assert answer in text and len(text.split()) == len(answer.split())
            inside_words.add(question)
    assert labelled == {index for index, answers in enumerate(split.questions["answers"]) if answers["text"]}
    return len(inside_words)


def prepare_independently(questions, tokenizer, max_length=384, doc_stride=128):
    """Yield the (question_index, input_ids, start, end) of all windows, as Hugging Face's run_qa.py does."""
    encoded = tokenizer(
        [question.strip() for question in questions["question"]], list(questions["context"]), truncation="only_second",
        max_length=max_length, stride=doc_stride, return_overflowing_tokens=True, return_offsets_mapping=True,
    )  # fmt: skip
    all_answers = questions["answers"][:]
    for window, question in enumerate(encoded["overflow_to_sample_mapping"]):
        offsets, answers = encoded["offset_mapping"][window], all_answers[question]
        in_context = [token for token, sequence in enumerate(encoded.sequence_ids(window)) if sequence == 1]
        first = last = 0
        if answers["text"]:
            start = answers["answer_start"][0]
            end = start + len(answers["text"][0])
            if offsets[in_context[0]][0] <= start and offsets[in_context[-1]][1] >= end:
                first = max(token for token in in_context if offsets[token][0] <= start)
                last = min(token for token in in_context if offsets[token][1] >= end)
        yield question, encoded["input_ids"][window], first, last


def test_whole_dev_set(tokenizer):
    split = load(DEV_SET, tokenizer)
    # The counts of the official files and of Hugging Face's run_qa.py at 384/128.
    counts = {"questions": 11873, "impossible": 5945, "features": 12134}
    assert counts.items() <= split.facts.items()
    assert set(split.table["question_index"][:]) == set(range(11873))
    assert check_labels(split) == 6
    answers = (answers["text"][0] for answers in split.questions["answers"] if answers["text"])
    too_long = sum(len(tokenizer(answer, add_special_tokens=False)["input_ids"]) > 30 for answer in answers)
    assert split.facts["out_of_reach"] == too_long > 0

    windows = list(prepare_independently(split.questions, tokenizer))
    features = rows_of(split)
    assert [(question, ids) for question, ids, _, _ in windows] == [
        (feature["question_index"], feature["input_ids"]) for feature in features
    ]
    labels = [(feature["start_position"], feature["end_position"]) for feature in features]
    differing = [row for row, (*_, start, end) in enumerate(windows) if labels[row] != (start, end)]
    assert len(differing) == 0, differing


def test_whole_training_subset(tokenizer, squad_folder):
    split = load(squad_folder / "train-v2.0-subset.json.gz", tokenizer)
    assert len(split.questions) == 49523
    assert set(split.table["question_index"][:]) == set(range(49523))
    assert check_labels(split) == 40


def test_windows_cover_the_context_and_overlap(tokenizer):
    split = load(ROOT / "sample/dev.json", tokenizer, max_length=80, doc_stride=20)
    features = rows_of(split)
    assert len(features) > len(split.questions)
    for index, row in enumerate(split.questions):
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
    features = rows_of(load(path, tokenizer, max_length=50, doc_stride=10))
    labels = {(feature["start_position"], feature["end_position"]) for feature in features}
    texts = {tokenizer.decode(f["input_ids"][f["start_position"] : f["end_position"] + 1]) for f in features}
    assert (0, 0) in labels and texts == {"[CLS]", "answer itself"}
    assert all(feature["input_ids"][:4] == tokenizer("What?")["input_ids"] for feature in features)  # no outer spaces


def test_hub_layout_gives_the_same_features(tokenizer, tmp_path, monkeypatch):
    """The Hub's Parquet file has a row for each question; one stands in for it, since no Hub is reached here."""
    rows = []
    for article in json.loads((ROOT / "sample/train.json").read_text())["data"]:
        for paragraph in article["paragraphs"]:
            for qa in paragraph["qas"]:
                answers = {key: [answer[key] for answer in qa["answers"]] for key in ("text", "answer_start")}
                rows.append({"id": qa["id"], "title": article["title"], "context": paragraph["context"],
                             "question": qa["question"], "answers": answers})  # fmt: skip
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "train.parquet")
    asked = []

    def download(*arguments, **named):
        asked.append((arguments, named))
        return str(tmp_path / "train.parquet")

    monkeypatch.setattr(baseline, "hf_hub_download", download)
    from_hub = load(None, tokenizer)
    from_file = load(ROOT / "sample/train.json", tokenizer)
    # The names of the files in the repository rajpurkar/squad_v2, looked up there.
    path = "squad_v2/train-00000-of-00001.parquet"
    assert asked == [(("rajpurkar/squad_v2", path), {"repo_type": "dataset"})]
    assert len(from_hub.facts.pop("sha256")) == len(from_file.facts.pop("sha256")) == 64
    assert from_hub.facts == from_file.facts
    assert rows_of(from_hub) == rows_of(from_file)
    assert torch.equal(from_hub.ids, from_file.ids) and torch.equal(from_hub.numbers, from_file.numbers)


def test_gzip_gives_the_same_questions():
    content = (ROOT / "sample/dev.json").read_bytes()
    plain = baseline.read_squad("dev.json", content)
    assert baseline.read_squad("dev.json.gz", gzip.compress(content)).to_dict() == plain.to_dict()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty directory for the features."""
    monkeypatch.setattr(baseline.datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache/squad-features"


@pytest.fixture
def tokenizations(monkeypatch):
    """A list that grows by one whenever questions are cut into features."""
    calls = []
    source = inspect.getsource(baseline.make_features)
    make_features = baseline.make_features

    def counted(*arguments, **named):
        calls.append(1)
        return make_features(*arguments, **named)

    getsource = inspect.getsource
    monkeypatch.setattr(baseline, "make_features", counted)
    monkeypatch.setattr(inspect, "getsource", lambda item: source if item is counted else getsource(item))
    return calls


def test_a_second_start_does_not_tokenize_again(monkeypatch, tmp_path, cache, tokenizations):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["baseline.py", "--sample", "--max-length", "200", "--random-init"])

    def start():
        args = baseline.parse_args()
        args.device = torch.device("cpu")
        tokenizer, _, _ = baseline.load_model(args)
        files = {"train": args.train_file, "validation": args.dev_file}
        return [baseline.load_split(name, path, tokenizer, args) for name, path in files.items()]

    first = start()
    count = len(tokenizations)
    assert count > 0
    for before, after in zip(first, start(), strict=True):
        assert (
            after.table.cache_files and after.table.cache_files == before.table.cache_files
        )  # memory-mapped, not held
        assert rows_of(after) == rows_of(before)
        assert torch.equal(after.ids, before.ids)
    assert len(tokenizations) == count
    assert len(list(cache.glob("*.arrow"))) == 2  # one file for each split


def test_what_features_depend_on_is_part_of_their_name(tokenizer, cache, tokenizations, monkeypatch, tmp_path):
    path = write_squad(tmp_path / "squad.json", [("It stands in Paris.", [("q", "Where?", [("Paris", 13)])])])
    load(path, tokenizer)
    load(path, tokenizer)
    assert len(tokenizations) == 1
    # A file that another version of datasets wrote may be one that this version cannot read.
    with monkeypatch.context() as patch:
        patch.setattr(datasets, "__version__", "99.0")
        load(path, tokenizer)
    assert len(tokenizations) == 2
    with monkeypatch.context() as patch:
        patch.setattr(baseline, "MAX_ANSWER_TOKENS", 3)
        load(path, tokenizer)
    load(path, tokenizer, max_length=100, doc_stride=20)
    load(path, tokenizer, max_length=100, doc_stride=21)
    other = write_squad(tmp_path / "squad.json", [("It stands in Paris.", [("q", "Where is it?", [("Paris", 13)])])])
    load(other, tokenizer)
    assert len(tokenizations) == len(list(cache.glob("*.arrow"))) == 6


def test_a_finished_cache_is_only_read(tokenizer, cache, tokenizations, monkeypatch, tmp_path):
    """An administrator may have prepared it, in a directory where nobody else can write, not even a lock."""
    path = write_squad(tmp_path / "squad.json", [("It stands in Paris.", [("q", "Where?", [("Paris", 13)])])])
    before = load(path, tokenizer)
    (cache_file,) = cache.glob("*.arrow")
    for file in cache.iterdir():
        if file != cache_file:
            file.unlink()

    def refuse(*arguments, **named):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(baseline.filelock.FileLock, "acquire", refuse)
    changed = cache_file.stat().st_mtime_ns
    assert rows_of(load(path, tokenizer)) == rows_of(before)
    assert list(cache.iterdir()) == [cache_file] and cache_file.stat().st_mtime_ns == changed
    assert len(tokenizations) == 1


def test_each_text_is_tokenized_once(tokenizer):
    """Each question, and each context once for all its questions that are tokenized together."""
    seen = []

    def counted(texts, **named):
        assert isinstance(texts, list)
        seen.extend(texts)
        return tokenizer(texts, **named)

    counted.cls_token_id = tokenizer.cls_token_id
    counted.sep_token_id = tokenizer.sep_token_id
    questions = baseline.read_squad("dev.json", (ROOT / "sample/dev.json").read_bytes())
    baseline.make_features(questions[:], list(range(len(questions))), counted, max_length=384, doc_stride=128)
    assert collections.Counter(seen) == collections.Counter([*questions["question"], *set(questions["context"])])


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


def test_a_micro_batch_is_padded_as_the_tokenizer_would(tokenizer):
    split = load(ROOT / "sample/train.json", tokenizer)
    assert split.ids.device == split.numbers.device == torch.device("cpu")
    args = SimpleNamespace(device=torch.device("cpu"), precision="fp32")
    for rows in ([3, 100], [200, 17, 250], [0], list(range(700, len(split.lengths)))):
        assert [split.table[row]["question_index"] for row in rows] == rows
        expected = tokenizer(
            [split.questions[row]["question"] for row in rows], [split.questions[row]["context"] for row in rows],
            padding=True,
        )  # fmt: skip
        inputs = baseline.make_inputs(split, torch.tensor(rows), split.lengths[rows])
        model = SeenInputs()
        baseline.forward(model, inputs, args)
        for name, tensor in model.seen.items():
            assert tensor.long().tolist() == expected[name]
        for row, in_context in enumerate(inputs["is_context"].tolist()):
            assert in_context == [sequence == 1 for sequence in expected.sequence_ids(row)]
        for name in ("start_position", "end_position"):
            assert inputs[name].tolist() == [split.table[row][name] for row in rows]


@pytest.mark.parametrize("micro_batch_size", [2, 5, None])
def test_a_step_computes_each_feature_of_its_batch_once(tokenizer, monkeypatch, micro_batch_size):
    split = load(ROOT / "sample/train.json", tokenizer)
    seen = []

    def forward(model, inputs, args):
        seen.append(inputs)
        loss = model.weight * inputs["start_position"].float().mean()
        return loss, None, None

    monkeypatch.setattr(baseline, "forward", forward)
    args = SimpleNamespace(device=torch.device("cpu"), micro_batch_size=micro_batch_size)
    model = torch.nn.Module()
    model.weight = torch.nn.Parameter(torch.ones(()))
    rows = [3, 100, 200, 17, 250]
    loss = baseline.train_step(model, split, torch.tensor(rows), split.lengths[rows], args)
    assert [len(inputs["input_ids"]) for inputs in seen] == {2: [2, 2, 1], 5: [5], None: [5]}[micro_batch_size]
    ids = []
    for inputs in seen:
        for row, is_token in zip(inputs["input_ids"], inputs["is_token"], strict=True):
            ids.append(row[is_token].tolist())
    assert ids == [list(split.table[row]["input_ids"]) for row in rows]
    # The mean over the batch, however it is split.
    mean = np.mean([split.table[row]["start_position"] for row in rows])
    assert loss.item() == pytest.approx(mean) == model.weight.grad.item()


def test_features_lie_on_the_device(tokenizer):
    """On torch's meta device there are no values: whoever wanted one on the host would get an error."""
    split = load(ROOT / "sample/dev.json", tokenizer, device="meta")
    assert split.ids.device.type == split.numbers.device.type == "meta"
    assert len(split.ids) == split.lengths.sum() and split.ids.dtype == torch.int32
    inputs = baseline.make_inputs(split, torch.arange(3, device="meta"), split.lengths[:3])
    assert {tensor.device.type for tensor in inputs.values()} == {"meta"}
    assert inputs["input_ids"].shape == (3, split.lengths[:3].max())


def test_a_question_that_leaves_no_space_is_named(tokenizer, tmp_path):
    path = write_squad(tmp_path / "long.json", [("text", [("q6", "why?", []), ("q7", "why " * 40, [])])])
    with pytest.raises(baseline.ScriptError, match="question 'q7' has 40 tokens: shorten it, raise"):
        load(path, tokenizer, max_length=64, doc_stride=32)
