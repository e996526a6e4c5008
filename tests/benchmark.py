"""Measure the scripts beside what one would use instead, and where their time and memory go.

    pip install accelerate                                 the Trainer wants it
    python tests/benchmark.py                              three rounds of the first three parts, on the embedded sample
    python tests/benchmark.py --squad DIR --steps 50       on DIR/train-v2.0-subset.json.gz
    python tests/benchmark.py --only scaling --rounds 5    one part

The parts:
    trainer    baseline.py and transformers' Trainer in three recipes
    scaling    distributed.py on two workers and on one, and baseline.py; a worker is one thread
    data       tokenising, the second start, decoding and scoring the whole dev set
    growth     time and memory of few steps and of all those of an epoch, with a tiny model (wants --squad)
    memory     the peak over what weights, gradients, optimizer and activations add up to, on the longest features
    profile    the FLOP/s of some steps beside those of a matrix product alone, and what takes the most time
    device     every precision, compiled and not, with three batch sizes: BERT-base with random weights on a GPU, the
               packaged encoder on a CPU; and a profile of some steps (wants --squad)

All contestants run once a round, in rotating order; a ratio is that of two runs of one round. All runs of the first two
parts train on the same features, each of them once: random questions that make exactly --steps batches are cut
beforehand. The Trainer's first step allocates within its time, the scripts' before it. All parts but the last three
use the CPU alone.
"""

import argparse
import collections
import functools
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import datasets
import numpy as np
import torch
import torch.utils.benchmark
import transformers
import transformers.trainer_pt_utils

from conftest import DEV_SET, ENCODER, GPUS, ROOT, TINY, cut_sample, run_script, write_model, write_squad

# isort: split
import baseline  # conftest makes it importable

BATCH_SIZE, SEED = 48, 42
WINDOWS = {"max_length": 384, "doc_stride": 128}
SETTINGS = {"lr": 5e-5, "warmup": 0.1, "weight_decay": 0.01, "max_grad_norm": 1.0, "seed": SEED, "precision": "fp32"}
SETTINGS |= {"model": ENCODER, "epochs": 1, "batch_size": BATCH_SIZE, "run": "run"}
# The Trainer as it comes; with batches of like length; and these computed in the baseline's passes.
RECIPES = ("plain", "grouped", "grouped in passes")
# Part: (what the ratio says, measure, contestant above, contestant below, factor).
RATIOS = {
    "trainer": [(f"baseline over Trainer, {name}", "features_per_s", "baseline", name, 1) for name in RECIPES],
    "scaling": [
        ("speedup of two workers", "train_s", "baseline", "two workers", 1),
        ("efficiency of two workers", "train_s", "baseline", "two workers", 1 / 2),
        ("DDP's own cost: one worker over baseline", "train_s", "one worker", "baseline", 1),
    ],
    "data": [("features over the tokenizer alone", "features_per_s", "features", "tokenizer", 1)],
    "growth": [
        ("time of a token, whole epoch over few steps", "tokens_per_s", "few steps", "whole epoch", 1),
        ("peak memory, whole epoch over few steps", "peak_mb", "whole epoch", "few steps", 1),
    ],
    "memory": [],
    "profile": [],
    "device": [],
}


def build_parser():
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--rounds", type=int, default=3)
    add("--steps", type=int, default=6, help=f"optimizer steps of a run, of {BATCH_SIZE} features each")
    add("--micro-batch-size", type=int, default=6, help="of both scripts, and of the Trainer's last recipe")
    add(
        "--squad",
        type=lambda path: Path(path).resolve(),
        metavar="DIR",
        help="folder with train-v2.0-subset.json.gz (default: the sample)",
    )
    add("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of a process, except in scaling")
    add("--only", choices=list(RATIOS), help="one part (default: the first three)")
    add("--output", type=Path, default=Path("benchmark.json"), metavar="FILE")
    add("--child", choices=[*RECIPES, "memory", "profile"], help="what a process of its own measures, on --train-file")
    add("--train-file")
    add("--model", default=ENCODER)
    return parser


# data -----------------------------------------------------------------------------------------------------------------


def tokenise(path, key):
    """Return (questions of a SQuAD file, their features), under the key in the cache."""
    questions, _ = baseline.read_squad_file(str(path))
    tokenizer = transformers.AutoTokenizer.from_pretrained(ENCODER)
    return questions, baseline.load_features(questions, key, tokenizer=tokenizer, **WINDOWS)


def cut_questions(source, wanted, path):
    """Write random questions of a SQuAD file that make exactly so many features; return the path."""
    questions, features = tokenise(source, "all")
    windows, paragraphs, total = collections.Counter(features["question"]), [], 0
    for index in np.random.default_rng(SEED).permutation(len(questions)).tolist():
        if total + windows[index] <= wanted:
            row, total = questions[index], total + windows[index]
            answers = list(zip(row["answers"]["text"], row["answers"]["answer_start"], strict=True))
            paragraphs.append((row["context"], [(row["id"], row["question"], answers)]))
    if total != wanted:
        sys.exit(f"{source}: {total} features cannot fill --steps of {BATCH_SIZE} each: lower it, or give --squad")
    return write_squad(path, paragraphs)


def measure_features(questions, tokenizer):
    """Turn questions into features in a cache without them; return the rate."""
    began = time.perf_counter()
    features = baseline.load_features(questions, f"measured-{began}", tokenizer=tokenizer, **WINDOWS)
    return {"features_per_s": len(features) / (time.perf_counter() - began)}


def measure_tokenizer(questions, tokenizer):
    """Call the tokenizer as make_features does on the same texts, 1,000 at a time, and drop what it returns."""
    texts, contexts, count = [text.strip() for text in questions["question"]], questions["context"][:], 0
    arguments = {"truncation": "only_second", "max_length": WINDOWS["max_length"], "stride": WINDOWS["doc_stride"]}
    arguments |= dict.fromkeys(("return_overflowing_tokens", "return_offsets_mapping"), True)
    arguments |= dict.fromkeys(("return_attention_mask", "return_token_type_ids"), False)
    os.environ["TOKENIZERS_PARALLELISM"] = "true"  # map() with several processes leaves it off
    began = time.perf_counter()
    for first in range(0, len(texts), 1000):
        rows = slice(first, first + 1000)
        count += len(tokenizer(texts[rows], contexts[rows], **arguments)["input_ids"])
    return {"features_per_s": count / (time.perf_counter() - began)}


def measure_starts(train_file, dev_file, options):
    """Start the baseline twice on a cache that is empty at first; return the times to its data and its first step."""
    with tempfile.TemporaryDirectory() as cache:
        settings = {"train_file": train_file, "dev_file": dev_file, "max_steps": 1}
        settings |= {"batch_size": options.micro_batch_size, "environment": {"HF_DATASETS_CACHE": cache}}
        first, second = (measure_script("baseline.py", options, **settings) for _ in range(2))
    return {"first_data_s": first["data_s"], "second_data_s": second["data_s"], "second_start_s": second["start_s"]}


def measure_answers(questions, features):
    """Decode random logits of all windows and score the answers: what is left of an evaluation without its model."""
    lengths, context_starts = np.array(features["length"]), np.array(features["context_start"])
    by_length, spans, decode_s = np.argsort(lengths, kind="stable"), [], 0.0
    for first in range(0, len(features), BATCH_SIZE):
        rows = by_length[first : first + BATCH_SIZE]
        positions = np.arange(lengths[rows].max())
        in_context = (positions >= context_starts[rows, None]) & (positions < lengths[rows, None] - 1)
        logits = torch.randn(2, *in_context.shape)
        began = time.perf_counter()
        spans.append(baseline.best_spans(*logits, torch.from_numpy(in_context)))
        decode_s += time.perf_counter() - began
    spans = torch.cat(spans).numpy()[np.argsort(by_length)]
    has_answer = np.array([bool(golds["text"]) for golds in questions["answers"]])
    began = time.perf_counter()
    answers = baseline.answer_questions(questions, features, np.arange(len(features)), spans)
    baseline.summarize(sorted(answers), has_answer)
    return {"decode_s": decode_s, "score_s": time.perf_counter() - began}


# training -------------------------------------------------------------------------------------------------------------


def start(script, settings, directory, world_size=None, environment=()):
    """Run a script, with these options, to its end in the directory; end with its last words where it fails."""
    words = []
    for name, value in settings.items():
        if value is not False and value is not None:
            words += [f"--{name.replace('_', '-')}"] + ([] if value is True else [value])
    process = run_script(script, words, directory, world_size, environment)
    if process.returncode:
        sys.exit(f"{script}: exit status {process.returncode}\n{process.stderr[-3000:]}")


def measure_script(script, options, world_size=None, environment=(), **settings):
    """Train with a script in a directory of its own; return what its record says."""
    common = SETTINGS | WINDOWS | {"micro_batch_size": options.micro_batch_size, "threads": options.threads}
    with tempfile.TemporaryDirectory() as directory:
        start(script, common | settings, directory, world_size, environment)  # writes results, logs, checkpoints there
        record = json.loads((Path(directory) / "results/run.json").read_text())
    seconds = record["seconds"]
    measured = record["throughput"] | {
        "train_s": seconds["train"],
        "train_loss": record["quality"]["train_loss"],
        "start_s": seconds["setup"] + seconds["data"] + seconds["warm_up"],  # until the first step
        "data_s": seconds["data"],
        "input_share": record["step"]["input"] / seconds["median"],  # of a step, spent waiting for its batch
        "peak_mb": record["memory"]["peak_bytes"] / 1e6,
    }
    return {name: value for name, value in measured.items() if value is not None}


def measure_child(child, train_file, options, environment=(), **settings):
    """Measure what --child names in a process of its own; return what it measured."""
    with tempfile.TemporaryDirectory() as directory:
        output = Path(directory) / "measured.json"
        common = {"micro_batch_size": options.micro_batch_size, "threads": options.threads, "steps": options.steps}
        settings = common | {"child": child, "train_file": train_file, "output": output} | settings
        start("tests/benchmark.py", settings, directory, environment=environment)
        return json.loads(output.read_text())


class Clock(transformers.TrainerCallback):
    """Time the training alone, as the scripts do: from the first batch asked for to the last step done.

    on_step_begin comes after the step's batch was read: it would leave the first one out. The Trainer's train_runtime
    has its own preparing and reporting in it.
    """

    def on_epoch_begin(self, *_, **__):
        self.began = time.perf_counter()

    def on_step_end(self, *_, **__):
        self.seconds = time.perf_counter() - self.began


def trainer_columns(features):
    """Return the features as `BertForQuestionAnswering` takes them from the Trainer, in memory."""
    rows = features[:]
    splits = list(zip(rows["context_start"], rows["length"], strict=True))
    return datasets.Dataset.from_dict({
        "input_ids": rows["input_ids"],
        "attention_mask": [[1] * length for _, length in splits],
        "token_type_ids": [[0] * start + [1] * (length - start) for start, length in splits],
        "start_positions": rows["start_position"],
        "end_positions": rows["end_position"],
    })  # fmt: skip


def train_with_trainer(options):
    """Train an epoch with the Trainer, without whatever costs it time and is not training; return the figures."""
    torch.set_num_threads(options.threads)
    torch.manual_seed(SEED)
    model = transformers.BertForQuestionAnswering.from_pretrained(ENCODER, dtype=torch.float32)
    tokenizer, clock = transformers.AutoTokenizer.from_pretrained(ENCODER), Clock()
    dataset = trainer_columns(tokenise(options.train_file, "trainer")[1])
    # On all of SQuAD the Trainer sorts within 50 batches, on little data within fewer, down to one. So it does 50 here.
    grouped = functools.partial(transformers.trainer_pt_utils.get_length_grouped_indices, mega_batch_mult=50)
    transformers.trainer_pt_utils.get_length_grouped_indices = grouped
    pass_size = options.micro_batch_size if options.child == "grouped in passes" else BATCH_SIZE
    arguments = transformers.TrainingArguments(
        output_dir=str(options.output.parent),
        max_steps=options.steps,
        per_device_train_batch_size=pass_size,
        gradient_accumulation_steps=BATCH_SIZE // pass_size,
        train_sampling_strategy="random" if options.child == "plain" else "group_by_length",
        learning_rate=SETTINGS["lr"],
        warmup_steps=SETTINGS["warmup"],  # below 1 it is a share
        weight_decay=SETTINGS["weight_decay"],
        max_grad_norm=SETTINGS["max_grad_norm"],
        seed=SEED,
        use_cpu=True,
        dataloader_pin_memory=False,
        disable_tqdm=True,
        report_to="none",
        **dict.fromkeys(("logging_strategy", "save_strategy", "eval_strategy"), "no"),
    )
    collator = transformers.DataCollatorWithPadding(tokenizer)
    trainer = transformers.Trainer(
        model, arguments, collator, dataset, processing_class=tokenizer, callbacks=[clock]
    )  # fmt: skip
    result, count = trainer.train(), options.steps * BATCH_SIZE
    assert (len(dataset), result.global_step, torch.get_num_threads()) == (count, options.steps, options.threads)
    measured = {"features_per_s": count / clock.seconds, "train_s": clock.seconds, "train_loss": result.training_loss}
    return measured | {"trainer_runtime_s": result.metrics["train_runtime"]}


def prepare_baseline(options, **settings):
    """Do what baseline.main() does before its first step; return (options, device, model, optimizer, features)."""
    settings = SETTINGS | WINDOWS | {"model": options.model, "random_init": options.model != ENCODER} | settings
    parser = baseline.build_parser()
    parser.set_defaults(**settings, train_file=options.train_file, dev_file=options.train_file)
    settings = parser.parse_args([])
    device = baseline.select_device(settings)
    _, features, _, _ = baseline.load_data(settings)
    memory_before = resident_memory()
    model = baseline.load_model(settings, device)
    return settings, device, model, baseline.make_optimizer(model, settings), features, memory_before


def resident_memory(most=False):
    """Return the process's memory in bytes, or the most since it was asked for last."""
    status = Path("/proc/self/status").read_text()
    value = 1024 * int(re.search(r"VmHWM:\s+(\d+)" if most else r"VmRSS:\s+(\d+)", status)[1])
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    return value


def compare_memory(options):
    """Train two steps on the longest features; return the peak beside what training cannot do without."""
    size = options.micro_batch_size
    settings, device, model, optimizer, features, before = prepare_baseline(
        options, batch_size=size, micro_batch_size=None, threads=options.threads
    )
    longest = np.argsort(features["length"][:])[-size:]
    for _ in baseline.optimize(model, optimizer, features, [longest] * 2, 0, 2, [], settings, device):
        pass
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else resident_memory(most=True) - before
    (passes,) = baseline.load_passes([longest], features, settings, device)
    weights, saved = {weight.untyped_storage().data_ptr() for weight in model.parameters()}, {}

    def note(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        baseline.forward(model, passes[0], settings, device)
    activations = sum(count for pointer, count in saved.items() if pointer not in weights)
    # Of each weight: itself, its gradient, AdamW's two.
    tensors = 4 * sum(weight.numel() * weight.element_size() for weight in model.parameters())
    measured = {"peak_mb": peak / 1e6, "weights_to_optimizer_mb": tensors / 1e6, "activations_mb": activations / 1e6}
    return measured | {"peak_over_sum": peak / (tensors + activations)}


def product_rate(rows, config, precision, device):
    """Return the FLOP/s of the largest product of a layer, of so many tokens, computed again and again."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    shapes = (rows, config.hidden_size), (config.hidden_size, config.intermediate_size)
    factors = dict(zip("ab", (torch.randn(shape, dtype=dtype, device=device) for shape in shapes), strict=True))
    timer = torch.utils.benchmark.Timer("a @ b", globals=factors, num_threads=torch.get_num_threads())
    return 2 * rows * config.hidden_size * config.intermediate_size / timer.blocked_autorange(min_run_time=1).median


def profile_steps(options):
    """Take some optimizer steps twice, the second time profiled.

    Return the FLOP/s of the first, beside those of a product of its matrices alone, and the shares of the operations
    that take the most of the device's time.
    """
    settings, device, model, optimizer, features, _ = prepare_baseline(
        options, micro_batch_size=options.micro_batch_size, threads=options.threads, precision=None
    )
    lengths = np.array(features["length"][:])
    batches = baseline.plan_epochs(lengths, settings)[0][: options.steps]
    take_steps = functools.partial(
        baseline.optimize, model, optimizer, features, batches, 0, len(batches), [], settings, device
    )
    baseline.warm_up(model, features, lengths, batches, settings, device)
    train_s = sum(seconds for _, seconds, *_ in take_steps())
    with torch.profiler.profile() as profiler:
        for _ in take_steps():
            pass
    work = baseline.describe_work(settings, {}, model, lengths, [batches])
    pass_tokens = work["trained_tokens"] * min(options.micro_batch_size, BATCH_SIZE) // work["trained_features"]
    measured = {
        "training, FLOP/s": work["trained_flop"] / train_s,
        "product alone, FLOP/s": product_rate(pass_tokens, model.config, settings.precision, device),
    }
    own = torch.autograd.DeviceType.CUDA if device.type == "cuda" else torch.autograd.DeviceType.CPU
    seconds = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    events = [event for event in profiler.key_averages() if event.device_type == own and not event.is_user_annotation]
    times = {event.key: getattr(event, seconds) for event in events}
    largest = sorted(times, key=times.get, reverse=True)[:8]
    return measured | {f"{name}, share of the time": times[name] / sum(times.values()) for name in largest}


# report ---------------------------------------------------------------------------------------------------------------


def contestants_of(part, options, directory):
    """Return {name: function that runs it once and returns its measurements} of a part; prepares what they need."""
    squad, partial = options.squad and options.squad / "train-v2.0-subset.json.gz", functools.partial
    dev_file = cut_sample("dev", 1, directory / "dev.json")  # the scripts evaluate after training, outside its time
    if part == "data":
        questions, _ = baseline.read_squad_file(str(squad or DEV_SET))
        tokenizer = transformers.AutoTokenizer.from_pretrained(ENCODER)
        return {
            "features": partial(measure_features, questions, tokenizer),
            "tokenizer": partial(measure_tokenizer, questions, tokenizer),
            "starts": partial(measure_starts, squad or DEV_SET, dev_file, options),
            "answers": partial(measure_answers, *tokenise(DEV_SET, "dev")),
        }
    settings = {"dev_file": dev_file, "max_steps": options.steps}
    if part in ("growth", "memory", "profile", "device"):
        settings["train_file"] = squad or ROOT / "sample/train.json"
    else:
        settings["train_file"] = directory / "train.json"
        cut_questions(squad or ROOT / "sample/train.json", options.steps * BATCH_SIZE, settings["train_file"])
    start("baseline.py", SETTINGS | WINDOWS | settings | {"prepare": True}, directory)  # so that no run has to tokenise
    if part == "trainer":
        recipes = {name: partial(measure_child, name, settings["train_file"], options) for name in RECIPES}
        return {"baseline": partial(measure_script, "baseline.py", options, **settings)} | recipes
    if part == "scaling":
        run = partial(measure_script, options=options, **settings | {"threads": 1})
        return {
            "baseline": partial(run, "baseline.py"),
            "one worker": partial(run, "distributed.py", world_size=1),
            "two workers": partial(run, "distributed.py", world_size=2),
        }
    if part == "growth":
        settings |= {"model": write_model(directory, **TINY), "random_init": True}
        run = partial(measure_script, "baseline.py", options)
        return {"few steps": partial(run, **settings), "whole epoch": partial(run, **settings | {"max_steps": None})}
    gpu = {"CUDA_VISIBLE_DEVICES": GPUS}
    if part in ("memory", "profile"):
        return {"baseline": partial(measure_child, part, settings["train_file"], options, gpu)}
    return device_contestants(settings, options, gpu, directory)


def device_contestants(settings, options, gpu, directory):
    """Return contestants_of() the part "device"."""
    contestants, on_gpu = {}, shutil.which("nvidia-smi") is not None
    child = {"model": ENCODER, "micro_batch_size": options.micro_batch_size}
    if on_gpu:  # BERT-base in passes that 40 GB hold
        child = {"model": write_model(directory), "micro_batch_size": 96}
    settings |= child | {"environment": gpu, "random_init": on_gpu}
    for precision in ("fp32", "tf32", "bf16") if on_gpu else ("fp32", "bf16"):
        for compiled in (False, True):
            for batch_size in (48, 96, 192):
                name = f"{precision}{' compiled' * compiled}, batch {batch_size}"
                work = settings | {"precision": precision, "compile": compiled, "batch_size": batch_size}
                contestants[name] = functools.partial(measure_script, "baseline.py", options, **work)
    profile = functools.partial(measure_child, "profile", settings["train_file"], options, gpu, **child)
    return contestants | {"profile": profile}


def run_rounds(contestants, rounds):
    """Run each contestant once a round, the first one changing; return [{contestant: {measure: value}}, ...]."""
    names, measured = list(contestants), []
    for number in range(rounds):
        shift = number % len(names)
        measured.append({})
        for name in names[shift:] + names[:shift]:
            print(f"round {number + 1} of {rounds}: {name}", file=sys.stderr, flush=True)
            measured[-1][name] = contestants[name]()
    return measured


def report_part(part, rounds):
    """Print a part's table; return what the file holds of it: all measurements, and medians and ranges over rounds."""

    def summarise(label, values):
        row = {"median": float(np.median(values)), "min": min(values), "max": max(values), "n": len(values)}
        print(f"{label:48} {row['median']:9.4g}  {row['min']:.4g} to {row['max']:.4g}")
        return row

    print(f"\n{part:48} {'median':>9}  range, n = {len(rounds)}")
    measures, ratios = collections.defaultdict(dict), {}
    for name, measured in rounds[0].items():
        for measure in measured:
            measures[name][measure] = summarise(f"{name:20} {measure}", [run[name].get(measure, 0.0) for run in rounds])
    for label, measure, above, below, factor in RATIOS[part]:
        ratios[label] = summarise(label, [factor * run[above][measure] / run[below][measure] for run in rounds])
    return {"rounds": rounds, "measures": measures, "ratios": ratios}


def describe_machine():
    """Return what the figures depend on beside the options."""
    device = torch.device("cpu")
    gpus = "nvidia-smi --query-gpu=name,driver_version --format=csv,noheader 2> /dev/null"
    return {
        "device": baseline.device_name(device),
        **baseline.describe_environment(device),
        "gpus": subprocess.getoutput(gpus).splitlines(),
        "cores": len(os.sched_getaffinity(0)),
        "load_average": os.getloadavg()[0],  # above 0, others were at work when this started
    }


def main():
    options = build_parser().parse_args()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    if options.child:
        measure = {"memory": compare_memory, "profile": profile_steps}.get(options.child, train_with_trainer)
        options.output.write_text(json.dumps(measure(options), indent=2))
        return
    parts = [options.only] if options.only else ["trainer", "scaling", "data"]
    if options.only in ("growth", "device") and not options.squad:
        sys.exit(f"--only {options.only} wants --squad DIR: the sample is too small")
    if "trainer" in parts and not importlib.util.find_spec("accelerate"):
        sys.exit("the Trainer wants accelerate: pip install accelerate, or leave it out with --only")
    if BATCH_SIZE % options.micro_batch_size:
        sys.exit(f"--micro-batch-size {options.micro_batch_size}: must divide {BATCH_SIZE}, for the Trainer")
    torch.set_num_threads(options.threads)
    named = {name: getattr(options, name) for name in ("rounds", "steps", "micro_batch_size", "threads")}
    named["questions"] = "train-v2.0-subset.json.gz" if options.squad else "sample"
    content = {"machine": describe_machine(), "options": named, "parts": {}}
    with tempfile.TemporaryDirectory() as directory:
        os.environ["HF_DATASETS_CACHE"] = directory
        datasets.config.HF_DATASETS_CACHE = directory
        for part in parts:
            rounds = run_rounds(contestants_of(part, options, Path(directory)), options.rounds)
            content["parts"][part] = report_part(part, rounds)
            options.output.write_text(json.dumps(content, indent=2, default=str))


if __name__ == "__main__":
    main()
