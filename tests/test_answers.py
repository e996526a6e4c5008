"""The metric and the decoding against hand-computed cases, brute force and the whole dev set."""

import gzip
import itertools
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import baseline
from conftest import DEV_SET


@pytest.mark.parametrize(
    ("answer", "golds", "exact", "f1"),
    [
        ("the Eiffel Tower", ["Eiffel Tower"], 1, 1),  # articles
        ("Eiffel-Tower!", ["eiffeltower"], 1, 1),  # punctuation goes without a space
        ("«Tower»", ["Tower"], 0, 0),  # the official scorer strips ASCII punctuation only
        ("in Paris, France", ["Paris"], 0, 0.5),  # precision 1/3, recall 1
        ("a b b c", ["b b d"], 0, 2 * 2 / (3 + 3)),  # "a" is an article; "b" counts twice
        ("Beyoncé", ["Beyonce\u0301", "Beyoncé"], 1, 1),  # no Unicode normalization, but several golds
        ("10 km", ["ten km", "10 kilometres"], 0, 0.5),
        ("", [], 1, 1),  # impossible, and left unanswered
        ("Paris", [], 0, 0),
        ("", ["Paris"], 0, 0),
        ("the", [], 1, 1),  # an article alone is an empty answer
        ("Paris", ["the", "Paris"], 1, 1),  # golds that are empty after normalization do not count
        ("the", ["the"], 1, 1),  # unless no other is left
    ],
)
def test_score_answer_by_hand(answer, golds, exact, f1):
    assert baseline.score_answer(answer, golds) == pytest.approx((exact, f1))


def dev_golds():
    articles = json.loads(gzip.decompress(DEV_SET.read_bytes()))["data"]
    questions = [q for article in articles for paragraph in article["paragraphs"] for q in paragraph["qas"]]
    return [[answer["text"] for answer in question["answers"]] for question in questions]


def test_gold_and_empty_answers_of_the_whole_dev_set():
    golds = dev_golds()
    has_answer = np.array([bool(gold) for gold in golds])

    def summary(texts, no_answer_scores):
        rows = zip(texts, no_answer_scores, golds, strict=True)
        answers = [
            baseline.Answer(i, str(i), text, score, *baseline.score_answer(text, gold))
            for i, (text, score, gold) in enumerate(rows)
        ]
        return baseline.summarize(answers, has_answer)

    perfect = summary([gold[0] if gold else "none" for gold in golds], np.where(has_answer, -1.0, 1.0))
    assert {
        name: perfect[name] for name in ("exact", "f1", "has_answer_f1", "no_answer_accuracy", "best_f1")
    } == dict.fromkeys(("exact", "f1", "has_answer_f1", "no_answer_accuracy", "best_f1"), 100.0)
    assert -1 <= perfect["best_f1_threshold"] < 1
    nothing = summary(["wrong"] * len(golds), np.ones(len(golds)))
    assert nothing["exact"] == nothing["f1"] == pytest.approx(100 * 5945 / 11873)
    assert (nothing["has_answer_exact"], nothing["no_answer_accuracy"]) == (0, 100)
    assert nothing["best_f1_threshold"] < 1  # answering nothing is best


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.integers(-3, 3), st.booleans(), st.sampled_from([0.0, 0.4, 1.0])), min_size=1, max_size=12)
)
def test_best_threshold_against_every_threshold(rows):
    rows = [(score + 1e-3 * index, has, f1 if has else 0.0) for index, (score, has, f1) in enumerate(rows)]  # no ties
    has_answer = np.array([has for _, has, _ in rows])
    answers = [baseline.Answer(i, str(i), "x", s, float(f1 == 1), f1) for i, (s, _, f1) in enumerate(rows)]
    quality = baseline.summarize(answers, has_answer)

    def f1_at(threshold):
        return 100 * np.mean([f1 if score <= threshold else float(not has) for score, has, f1 in rows])

    thresholds = [-math.inf, *(score for score, _, _ in rows)]
    assert quality["best_f1"] == pytest.approx(max(map(f1_at, thresholds)))
    assert f1_at(quality["best_f1_threshold"]) == pytest.approx(quality["best_f1"])
    assert quality["f1"] == pytest.approx(f1_at(0.0))


def test_best_spans_against_every_pair():
    generator = torch.Generator().manual_seed(0)
    starts, ends = torch.randn(2, 20, 60, generator=generator) * 3
    is_context = torch.zeros(20, 60, dtype=torch.bool)
    for row in range(20):
        is_context[row, 5 + row % 7 : 60 - row] = True
    found = baseline.best_spans(starts, ends, is_context)
    for row in range(20):
        tokens = is_context[row].nonzero().flatten().tolist()
        pairs = [(s, e) for s, e in itertools.product(tokens, tokens) if s <= e < s + 30]
        best = max(pairs, key=lambda pair: (starts[row, pair[0]] + ends[row, pair[1]]).item())
        assert tuple(found[row, 1:3].int().tolist()) == best
        assert found[row, 0] == starts[row, best[0]] + ends[row, best[1]]
        assert found[row, 3] == starts[row, 0] + ends[row, 0]


def test_figures_of_questions_that_are_not_there_are_null():
    for has_answer in (True, False):
        answers = [baseline.Answer(0, "q", "x", 1.0, 0.0, 0.0)]
        quality = baseline.summarize(answers, np.array([has_answer]))
        missing = {name for name, value in quality.items() if value is None}
        of_answerable = {"has_answer_exact", "has_answer_f1", "best_span_exact", "best_span_f1"}
        assert missing == ({"no_answer_accuracy"} if has_answer else of_answerable)
        assert quality["f1"] == (0 if has_answer else 100)


def test_the_best_window_answers_and_the_least_null_score_counts():
    import datasets

    context = "Alpha beta gamma delta."
    questions = datasets.Dataset.from_dict({
        "id": ["q0", "q1"], "context": [context, context],
        "answers": [{"text": ["beta gamma"], "answer_start": [6]}, {"text": [], "answer_start": []}],
    })  # fmt: skip
    texts = {"text_starts": [0, 6, 11, 17, 22], "text_ends": [5, 10, 16, 22, 23]}
    windows = [{"question_index": question, "context_start": 4, **texts} for question in (0, 0, 1)]
    table = datasets.Dataset.from_list(windows).with_format("numpy")
    split = SimpleNamespace(questions=questions, table=table)
    spans = np.array([[1.0, 4, 4, 2.0], [5.0, 5, 6, 3.0], [4.0, 7, 7, 6.0]])
    expected = [(0, "q0", "beta gamma", -3.0, 1.0, 1.0), (1, "q1", "delta", 2.0, 0.0, 0.0)]
    assert sorted(baseline.answer_questions(split, np.arange(3), spans)) == expected
    # In any order of the windows; and only the questions of the windows that are given.
    for order in ([2, 0, 1], [1, 2, 0]):
        assert sorted(baseline.answer_questions(split, np.array(order), spans[order])) == expected
    (alone,) = baseline.answer_questions(split, np.array([2]), spans[2:])
    assert alone == expected[1] and alone.text == "delta" and alone.no_answer_score == 2.0
