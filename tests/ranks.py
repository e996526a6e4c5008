"""Real runs of the scripts without torchrun, forked from one process that has done the slow imports.

A run is a process per rank, with the variables and the store that torchrun would give it. torchrun's own part, ending
the other ranks after one has failed and passing signals on, is tested with torchrun.
"""

import itertools
import multiprocessing
import os
import re
import runpy
import signal
import sys
import time
from pathlib import Path

from torch.distributed import TCPStore

from conftest import ROOT

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    [
        *("datasets", "filelock", "huggingface_hub", "matplotlib.figure", "numpy", "pandas", "pyarrow.parquet"),
        *("torch", "torch.distributed", "torch._dynamo", "torch.distributed.algorithms.ddp_comm_hooks.default_hooks"),
        *("torch.utils.tensorboard", "tqdm", "transformers", "transformers.models.bert.modeling_bert"),
    ]
)
NUMBERS = itertools.count()


def be_rank(script, arguments, directory, environment, streams, before):
    """Run a script as the process of one rank."""
    os.chdir(directory)
    os.environ.update(environment)
    for number, stream in enumerate(streams, 1):
        os.dup2(os.open(stream, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    sys.argv = [script, *arguments]
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts its background jobs with SIGINT ignored
    exec(before, {})
    runpy.run_path(script, run_name="__main__")


class Run:
    """A script at work in a directory, in `world_size` ranks where that is given; `before` is code to run first."""

    def __init__(self, script, arguments, directory, world_size=None, environment=(), before=""):
        self.streams = [Path(directory) / f"{name}-{next(NUMBERS)}" for name in ("out", "err")]
        given, self.processes = dict(environment), []
        if world_size:
            self.store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
            given |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(self.store.port), "WORLD_SIZE": str(world_size)}
            given |= {"TORCHELASTIC_RUN_ID": "x", "TORCHELASTIC_USE_AGENT_STORE": "True", "GROUP_WORLD_SIZE": "1"}
        for rank in range(world_size or 1):
            own = given | ({"RANK": str(rank), "LOCAL_RANK": str(rank)} if world_size else {})
            rest = [str(argument) for argument in arguments], directory, own, self.streams, before
            self.processes.append(SERVER.Process(target=be_rank, args=(str(ROOT / script), *rest)))
            self.processes[-1].start()

    def wait(self, seconds=600):
        """Wait for the end of all ranks. Like torchrun, end the others after one has failed."""
        end = time.monotonic() + seconds
        while self.is_alive() and not self.status and time.monotonic() < end:
            time.sleep(0.05)
        if self.is_alive():
            self.send(signal.SIGTERM)
            for process in self.processes:
                process.join(30)
            self.kill()
        assert time.monotonic() < end, f"{self.output}{self.error}"
        return self

    def send(self, number):
        """Send a signal to all ranks."""
        for process in self.processes:
            if process.is_alive():
                os.kill(process.pid, number)

    def kill(self):
        self.send(signal.SIGKILL)
        for process in self.processes:
            process.join()

    def is_alive(self):
        return any(process.is_alive() for process in self.processes)

    @property
    def output(self):
        return self.streams[0].read_text() if self.streams[0].exists() else ""

    @property
    def error(self):
        return self.streams[1].read_text() if self.streams[1].exists() else ""

    @property
    def statuses(self):
        """The exit status of each rank."""
        return [process.exitcode for process in self.processes]

    @property
    def status(self):
        """An exit status of a rank that failed by itself, else 0."""
        return max(status or 0 for status in self.statuses)


def run_ranks(script, arguments, directory, world_size=None, environment=()):
    """Run a script to its end; it must succeed."""
    run = Run(script, arguments, directory, world_size, environment).wait()
    assert not any(run.statuses), run.error
    return run


def errors_of_ranks(text, world_size):
    """Return {rank: its error} of a run's stderr, where each rank prints one line at most, and nothing else is.

    At least one has failed. The others are ended, as by torchrun, maybe before they print theirs.
    """
    errors = {}
    for line in text.splitlines():
        found = re.fullmatch(r"(?:baseline|distributed)\.py: (?:rank (\d) on \S+: )?(?:error: )?(.*)", line)
        assert found, text
        rank = int(found[1] or 0)
        assert rank not in errors and rank < (world_size or 1), text
        errors[rank] = found[2]
    assert errors
    return errors
