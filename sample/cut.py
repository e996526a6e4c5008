"""Cut the small sample from SQuAD 2.0 files (.json or .json.gz, official layout).

    python sample/cut.py train-v2.0.json dev-v2.0.json

writes train.json and dev.json beside this file. Whole short paragraphs, a few per article, are taken in the order of
their context's SHA-256, so the order of the input does not matter. A paragraph is skipped if it would overshoot the
wanted number of questions or move the share of impossible ones too far from SQuAD's own.
"""

import gzip
import hashlib
import json
import sys
from pathlib import Path

# Wanted questions; impossible share in the official file; longest context, in characters; most paragraphs per article.
TRAIN = (720, 43_498 / 130_319, 420, 4)
DEV = (180, 5_945 / 11_873, 520, 1)  # up to 420 characters there are paragraphs of three articles only
TOLERANCE = 0.005  # largest distance from that share, at the end


def load(path: str) -> list[dict]:
    opener = gzip.open if path.endswith(".gz") else open
    with opener(path, "rt", encoding="utf-8") as file:
        return json.load(file)["data"]


def order(pair: tuple[str, dict]) -> tuple[str, str]:
    title, paragraph = pair
    return hashlib.sha256(paragraph["context"].encode()).hexdigest(), title


def cut(articles: list[dict], wanted: int, share: float, longest: int, most: int) -> list[dict]:
    taken: dict[str, list[dict]] = {}
    total, drift = 0, 0.0  # drift: impossible questions taken, less what the share asks for
    for title, paragraph in sorted(((a["title"], p) for a in articles for p in a["paragraphs"]), key=order):
        qas = paragraph["qas"]
        change = sum(q["is_impossible"] for q in qas) - share * len(qas)
        if not qas or len(paragraph["context"]) > longest or len(taken.get(title, [])) == most:
            continue
        if total + len(qas) > wanted or abs(drift + change) > TOLERANCE * wanted:
            continue
        taken.setdefault(title, []).append(clean(paragraph))
        total += len(qas)
        drift += change
        if total == wanted:
            return [{"title": t, "paragraphs": taken[t]} for t in sorted(taken)]
    sys.exit(f"only {total} of {wanted} questions could be taken")


def clean(paragraph: dict) -> dict:
    context, qas = paragraph["context"], []
    for q in paragraph["qas"]:
        for a in q["answers"]:
            if not context.startswith(a["text"], a["answer_start"]):
                sys.exit(f"answer of question {q['id']} is not at its offset")
        qas.append({key: q[key] for key in ("id", "question", "answers", "is_impossible")})
    return {"context": context, "qas": qas}


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python sample/cut.py TRAIN DEV")
    for name, path, goal in (("train", sys.argv[1], TRAIN), ("dev", sys.argv[2], DEV)):
        text = json.dumps({"version": "v2.0", "data": cut(load(path), *goal)}, indent=1)
        Path(__file__).with_name(f"{name}.json").write_text(text + "\n", encoding="utf-8", newline="\n")
