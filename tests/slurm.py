"""A real Slurm of two nodes, n1 and n2, on this machine, each with four pretended A100s, for tests and trials.

    python tests/slurm.py bash    boot, run a command in an environment for this Slurm, stop
    python tests/slurm.py         boot, print what that environment needs, stop when standard input ends

Root only. Needs Debian's slurmctld, slurmd, slurm-client and munge; no systemd, no running munge, no configuration.
Everything lies in a temporary directory, apart from one line in /etc/hosts, which is taken out again.
"""

import contextlib
import fcntl
import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path

NODES = ["n1", "n2"]
HOSTS = Path("/etc/hosts")
# Both names on one address: the rendezvous times out on other loopback addresses.
HOSTS_LINE = f"127.0.0.1 {' '.join(NODES)}  # the toy Slurm cluster of tests/slurm.py\n"
SEARCH_PATH = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"  # Debian has the daemons where users do not look
COMMANDS = ["munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "sinfo", "squeue", "scancel"]

CONFIGURATION = """\
ClusterName=toy
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
AuthInfo=socket={directory}/munge.socket,cred_expire=5
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool/%n
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/slurmd-%n.pid
SlurmctldLogFile={directory}/log/slurmctld.log
SlurmdLogFile={directory}/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
# Without it, a job that asks for no memory gets all of the node's.
DefMemPerCPU=1000
GresTypes=gpu
# Without it, nodes that do not have what this file says are invalid.
SlurmdParameters=config_overrides
ReturnToService=2
# Without it, the first job waits for seconds.
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0,bf_interval=1
KillWait=30
SlurmdTimeout=10
# Slurm warns as ever, but leaves a slow machine more time than the tests' short limits.
OverTimeLimit=10
# Ended jobs are remembered as long as the cluster runs.
MinJobAge=86400
NodeName={nodes} NodeHostname={host} NodeAddr=127.0.0.1 Port=[{ports[1]}-{ports[2]}] CPUs=64 Sockets=2 \
CoresPerSocket=32 ThreadsPerCore=1 RealMemory=515000 Gres=gpu:a100:4 State=UNKNOWN
PartitionName=gpu Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def missing():
    """Return why this machine cannot run the cluster, or None."""
    absent = [command for command in COMMANDS if not shutil.which(command, path=SEARCH_PATH)]
    if absent:
        return f"no {', '.join(absent)} here: apt-get install slurmctld slurmd slurm-client munge"
    return None if os.geteuid() == 0 else "only root can start the Slurm daemons"


def free_ports():
    """Return three ports in a row that nothing listens on, below those that the system hands out by itself."""
    for first in range(17000, 32000, 10):
        with contextlib.ExitStack() as stack:
            try:
                for port in range(first, first + 3):
                    stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
            except OSError:
                continue
        return [first, first + 1, first + 2]
    raise RuntimeError("no three free ports in a row")


def set_hosts_line(present):
    """Put the nodes' line into /etc/hosts, or take it out; in place, since containers mount that file."""
    lines = [line for line in HOSTS.read_text().splitlines(keepends=True) if line != HOSTS_LINE]
    if lines and not lines[-1].endswith("\n"):
        lines[-1] += "\n"
    HOSTS.write_text("".join(lines) + HOSTS_LINE * present)


def wait_until(condition, seconds, what):
    """Wait until condition() holds; raise TimeoutError after so many seconds."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not within {seconds} s")
        time.sleep(0.2)


def processes(name, value, command=None):
    """Return {process id: environment} of the running processes with this variable, and a command line like `command`.

    `command` is a compiled regular expression for the beginning; a zero byte follows each argument.
    """
    found = {}
    for directory in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            if command and not command.match((directory / "cmdline").read_text(errors="replace")):
                continue
            items = (directory / "environ").read_bytes().split(b"\0")
            environment = dict(item.decode(errors="replace").partition("=")[::2] for item in items)
            if environment.get(name) == value:
                found[int(directory.name)] = environment
    return found


def start(directory, environment):
    """Write the configuration and start the daemons, in the foreground of sessions of their own; return them."""
    for name in ("state", "spool", "log", "dev"):
        (directory / name).mkdir()
    for index in range(4):
        # Device files: with regular ones, jobs silently get no CUDA_VISIBLE_DEVICES. These are /dev/null.
        os.mknod(directory / f"dev/nvidia{index}", stat.S_IFCHR | 0o600, os.makedev(1, 3))
    nodes = f"n[1-{len(NODES)}]"
    (directory / "gres.conf").write_text(f"NodeName={nodes} Name=gpu Type=a100 File={directory}/dev/nvidia[0-3]\n")
    host = socket.gethostname().partition(".")[0]
    configuration = CONFIGURATION.format(directory=directory, host=host, ports=free_ports(), nodes=nodes)
    (directory / "slurm.conf").write_text(configuration)
    key = directory / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    munged = ["munged", "--foreground", "--force", f"--socket={directory}/munge.socket", f"--key-file={key}"]
    munged += [f"--{name}-file={directory}/munge.{name}" for name in ("pid", "seed", "log")]
    daemons = []
    with open(directory / "log/daemons.log", "w") as output:
        for command in munged, ["slurmctld", "-D"], *(["slurmd", "-D", "-N", node] for node in NODES):
            command[0] = shutil.which(command[0], path=SEARCH_PATH)
            daemons.append(
                subprocess.Popen(
                    command,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    start_new_session=True,  # Ctrl-C at the terminal is not for them
                )
            )
            if command is munged:
                wait_until((directory / "munge.socket").exists, 10, "munged")
    return daemons


def stop(directory, environment):
    """End the jobs, the daemons and whatever else was started with this cluster's configuration."""

    def run(*command):
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=10).stdout

    def remaining():
        return processes("SLURM_CONF", environment["SLURM_CONF"])

    with contextlib.suppress(TimeoutError):
        run("scancel", "--user=root")
        wait_until(lambda: not run("squeue", "--noheader"), 20, "the end of the jobs")
    for number in signal.SIGTERM, signal.SIGKILL:
        for process in remaining():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, number)
        with contextlib.suppress(TimeoutError):
            wait_until(lambda: not remaining(), 10, "the end of the daemons")
    if remaining():
        print(f"slurm.py: these processes cannot be ended: {list(remaining())}", file=sys.stderr)


@contextlib.contextmanager
def cluster():
    """Boot a cluster, give the environment for Slurm's commands, and shut it down whatever happens meanwhile."""
    with contextlib.ExitStack() as stack:
        lock = stack.enter_context(open(Path(tempfile.gettempdir()) / "toy-slurm.lock", "w"))
        # Two clusters at once would share the line in /etc/hosts.
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("waiting for the end of another toy cluster", file=sys.stderr, flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="toy-slurm-")))
        directory.chmod(0o755)
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH"))}
        environment |= {"SLURM_CONF": f"{directory}/slurm.conf", "PATH": SEARCH_PATH}
        stack.callback(set_hosts_line, False)
        set_hosts_line(True)
        stack.callback(stop, directory, environment)
        daemons = start(directory, environment)

        def idle():
            sinfo = ["sinfo", "--noheader", "--Node", "--format=%T"]
            output = subprocess.run(sinfo, env=environment, capture_output=True, text=True).stdout
            return output.split() == ["idle"] * len(NODES) or any(daemon.poll() is not None for daemon in daemons)

        try:
            wait_until(idle, 30, "two idle nodes")
            if any(daemon.poll() is not None for daemon in daemons):
                raise RuntimeError("a daemon of the cluster ended")
        except (RuntimeError, TimeoutError):
            for log in sorted(directory.glob("**/*.log")):
                print(f"--- {log.name}\n{log.read_text()[-3000:]}", file=sys.stderr)
            raise
        yield environment


def main():
    reason = missing()
    if reason:
        sys.exit(f"slurm.py: error: {reason}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the cluster is shut down
    with cluster() as environment:
        if sys.argv[1:]:
            signal.signal(signal.SIGINT, lambda *_: None)  # the command's own affair
            return subprocess.run(sys.argv[1:], env=environment).returncode
        print(json.dumps({name: environment[name] for name in ("SLURM_CONF", "PATH")}), flush=True)
        sys.stdin.read()  # ends also when the process at the other end is killed
    return 0


if __name__ == "__main__":
    sys.exit(main())
