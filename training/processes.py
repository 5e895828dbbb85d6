"""Several processes, on one machine or many, as one run that ends well or says what is wrong.

torchrun starts the processes and torch joins them. What is done here: they compare what they were
given before the first step, take the checkpoint of the first, note signals for the end of a step,
count how long they wait for each other, and end within a time limit, with a line that names the
process that was lost. One process is the simple case of the same code. pretrain.py's program needs
it; no number depends on it.
"""

import contextlib
import ctypes
import math
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

try:
    import fcntl  # POSIX only: a lock that the system takes back when its holder dies
except ImportError:
    fcntl = None

NODE = socket.gethostname()


class Stop(Exception):
    """The run cannot go on, on any process: one line for the user, or several.

    `code`: 1 for a failed run, 2 for a wrong command."""

    def __init__(self, text: str, code: int = 1):
        super().__init__(text)
        self.code = code


class Lost(Stop):
    """Another process does not answer any more."""


def started(name: str, otherwise: int) -> int:
    """A number that torchrun or SLURM has put into the environment."""
    return int(os.environ.get(name, otherwise))


def size() -> int:
    """Number of processes."""
    return started("WORLD_SIZE", 1)


def rank() -> int:
    """Number of this process, from 0."""
    return started("RANK", 0)


def on_this_node() -> int:
    """Number of processes on this machine."""
    return started("LOCAL_WORLD_SIZE", size())


def alone_on_its_gpu(device) -> bool:
    """Does this process share its GPU with no other? Several share no samples, and have no NCCL."""
    return device.type == "cuda" and on_this_node() <= max(1, torch.cuda.device_count())


def wrong_start() -> str | None:
    """What is wrong with how the processes were started, and what to type; None: nothing."""
    tasks = started("SLURM_NTASKS", 1)
    if tasks == 1 or "WORLD_SIZE" in os.environ:
        return None
    nodes = started("SLURM_NNODES", 1)
    return (f"SLURM starts {tasks} tasks, and each would train the whole run; type: srun --ntasks="
            f"{nodes} --ntasks-per-node=1 torchrun --nnodes={nodes} --nproc_per_node="
            f"{max(1, tasks // nodes)} --rdzv_backend=c10d --rdzv_endpoint=FIRST_NODE:29500 "
            "pretrain.py ...")


# ---------------------------------------------------------------------- Joining, and agreeing


def connect(device, minutes: float):
    """Join the processes that torchrun started; one process has nobody to join.

    `minutes`: how long any process waits for another, now and at every exchange. Raises Stop."""
    if size() == 1:
        return
    master = os.environ.get("MASTER_ADDR", "")
    hint = ("type GLOO_SOCKET_IFNAME=eth0 (on GPUs also NCCL_SOCKET_IFNAME=eth0) before the "
            f"command, where eth0 is the interface that `ip route get {master}` names")
    if means_itself_alone(master):
        raise Stop(f"node {NODE}: its name means {socket.gethostbyname(NODE)}, where no other "
                   f"machine can reach it; {hint}")
    try:
        backend = "cpu:gloo,cuda:nccl" if alone_on_its_gpu(device) else "gloo"
        dist.init_process_group(backend, timeout=timedelta(minutes=minutes))
        dist.barrier()
    except (RuntimeError, ValueError) as error:  # of the store, of gloo, of NCCL
        raise Stop(f"process {rank()} on {NODE} could not connect to the others by way of {master} "
                   f"({first_line(error)}): do the commands of all nodes run, with no firewall "
                   f"between them? If so, {hint}") from None


def means_itself_alone(master: str) -> bool:
    """Does this machine's name mean an address of its own (127.0.1.1 on Debian), with others to
    connect?"""
    if on_this_node() == size() or "GLOO_SOCKET_IFNAME" in os.environ:
        return False
    with contextlib.suppress(OSError):
        several = not socket.gethostbyname(master).startswith("127.")
        return several and socket.gethostbyname(NODE).startswith("127.")
    return False


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its kind."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:1000]


def agreed(make: Callable):
    """make() -> (result, facts), on every process; the result, if the facts are the same on all.

    Raises Stop, on all, when `make` failed on one (ValueError, OSError) or a fact differs."""
    result = facts = error = None
    try:
        result, facts = make()
    except (Stop, ValueError, OSError) as reason:
        if size() == 1:
            raise
        error = first_line(reason)
    if size() > 1:
        reports = [None] * size()
        dist.all_gather_object(reports, (NODE, error, facts))
        lines = dict.fromkeys(differences(reports))  # the processes of a node say the same
        if lines:
            raise Stop("\n".join(lines))
    return result


def differences(reports: list[tuple]) -> list[str]:
    """(node, error, facts) of each process -> a line for each error, or fact unlike the first's.

    >>> differences([("a", None, {"lr": 1}), ("b", None, {"lr": 2}), ("c", "no data", None)])
    ['node c: no data']
    >>> differences([("a", None, {"lr": 1}), ("b", None, {"lr": 2})])
    ['node b: lr is 2, but 1 on node a; give all nodes the same']
    """
    errors = [f"node {node}: {error}" for node, error, _ in reports if error]
    if errors:
        return errors
    first, _, wanted = reports[0]
    return [f"node {node}: {name} is {facts.get(name)!r}, but {wanted.get(name)!r} on node {first};"
            " give all nodes the same" for node, _, facts in reports for name in wanted | facts
            if facts.get(name) != wanted.get(name)]


def from_the_first(make: Callable):
    """make() of the first process that has any (not None), handed to all: the disks of the others
    need not hold it. Its errors stop all."""
    for source in range(size()):
        box = [None, None]  # result, error
        if rank() == source:
            try:
                box = [make(), None]
            except (ValueError, OSError) as reason:
                box = [None, first_line(reason)]
        if size() > 1:
            dist.broadcast_object_list(box, source)
        if box[1]:
            raise Stop(box[1])
        if box[0] is not None:
            return box[0]
    return None


# ---------------------------------------------------------------- Steps, and who was lost in them


class Watch:
    """Over the steps of a run: signals are noted, not obeyed; waiting is counted; and a process
    that is lost, or its link or agent, ends the others in time, which say which it was.

    Args: minutes: as in `connect`. advice: () -> what to say to the user then.
    """

    number = 0  # of the first signal that was caught
    waited = 0.0  # seconds in exchanges: with the slowest process, and for the way there and back

    def __init__(self, minutes: float, advice: Callable = lambda: ""):
        self.minutes = minutes
        self.advice = advice
        self.agent = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        self.ended = threading.Event()

    def __enter__(self):
        numbers = [signal.SIGTERM, signal.SIGINT, getattr(signal, "SIGHUP", signal.SIGINT)]
        self.handlers = {number: signal.getsignal(number) for number in numbers}
        for number, handler in self.handlers.items():
            if handler != signal.SIG_IGN:  # as nohup does with SIGHUP
                signal.signal(number, self.note)
        self.all_reduce = dist.all_reduce
        if size() > 1:
            dist.all_reduce = self.timed
            self.store = dist.distributed_c10d._get_default_store().clone()
            self.store.set(f"node {rank()}", NODE)
            self.last_step = math.inf  # the first exchange starts the clock, not what comes before
            threading.Thread(target=self.pulse, daemon=True).start()
        if self.agent and sys.platform == "linux":
            pr_set_pdeathsig = 1  # when torchrun's agent dies, which started this process
            ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)
        return self

    def __exit__(self, kind, error, traceback):
        self.ended.set()
        dist.all_reduce = self.all_reduce
        for number, handler in self.handlers.items():  # the caller may be a program that goes on
            signal.signal(number, handler or signal.SIG_DFL)
        if of_an_exchange(error):
            raise Lost(self.loss()) from None

    def note(self, number, frame):
        """A handler of signals."""
        self.number = self.number or number

    def timed(self, *args, **kwargs):
        """dist.all_reduce, by the clock."""
        began = time.perf_counter()
        self.last_step = min(self.last_step, time.monotonic())
        result = self.all_reduce(*args, **kwargs)
        self.waited += time.perf_counter() - began
        return result

    def agree(self, number: int, finite: bool) -> list[int]:
        """The one exchange of a step.

        Args: the signal that this process caught, 0 for none; are its loss and weights numbers?
        Returns: [the signal that any caught, 1 + the rank of one that lost its numbers or 0]."""
        answers = torch.tensor([number, 0 if finite else rank() + 1])
        if self.agent and os.getppid() != self.agent:
            answers[0] = signal.SIGTERM  # the agent is gone: nobody would end this process
        if size() > 1:
            dist.all_reduce(answers, op=dist.ReduceOp.MAX)
            self.last_step = time.monotonic()
        return answers.tolist()

    def pulse(self):
        """In a thread: write every second that this process lives; and end it, whatever holds it,
        when a step takes longer than any exchange may."""
        beats = 0
        while not self.ended.wait(1):
            beats += 1
            with contextlib.suppress(RuntimeError):  # the node that keeps the store is lost
                self.store.set(f"pulse {rank()}", str(beats))
            if time.monotonic() - self.last_step > 60 * self.minutes + 30:
                print(f"pretrain.py: error: {self.loss()}", file=sys.stderr, flush=True)
                os._exit(1)

    def loss(self) -> str:
        """Which process was lost, and what to do: for the user."""
        found = []
        asking = threading.Thread(target=lambda: found.extend(self.silent()), daemon=True)
        asking.start()
        asking.join(10)
        if asking.is_alive():
            found = [f"the node {os.environ.get('MASTER_ADDR')} of process 0"]
        lost = " and ".join(found) or "another process, which ended"
        return (f"process {rank()} on {NODE} lost {lost}: its connection ended, or no word came "
                f"within --timeout {self.minutes:g} minutes; {self.advice()}; the same command "
                "continues from there")

    def silent(self) -> list[str]:
        """The processes whose pulse stands still."""
        store = dist.distributed_c10d._get_default_store().clone()
        others = [other for other in range(size()) if other != rank()]
        names = [f"pulse {other}" for other in others]
        first = store.multi_get(names)
        time.sleep(2.5)
        still = [a == b for a, b in zip(first, store.multi_get(names))]
        return [f"process {other} on {store.get(f'node {other}').decode()}"
                for other, lost in zip(others, still) if lost]


def of_an_exchange(error) -> bool:
    """Is it torch's way to say that another process did not answer?"""
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and ("gloo" in str(error) or "NCCL" in str(error)))


# ------------------------------------------------------------------------- One run, one folder


class Lock:
    """Keeps a second run out of a folder, as long as process 0 lives: `take`, `close`.

    The system gives a lock of a process that died back. Where a file system knows no locks, the
    file's age tells: its holder touches it every minute, and after ten it is taken for dead."""

    STALE = 600  # seconds

    def __init__(self, folder):
        self.path = Path(folder) / "lock"
        self.file = None
        self.released = threading.Event()

    def take(self):
        """Raises ValueError, which names the holder, when another run has the folder."""
        if rank() > 0:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        file = open(self.path, "a+", encoding="utf-8")
        file.seek(0)
        holder = file.read().strip()
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            taken = False
            if os.fstat(file.fileno()).st_nlink == 0:  # its holder went, and took it away meanwhile
                file.close()
                return self.take()
        except BlockingIOError:
            taken = True
        except (OSError, AttributeError):  # no locks on this disk, or on this system
            taken = bool(holder) and time.time() - self.path.stat().st_mtime < self.STALE
            if not taken:
                threading.Thread(target=self.touch, daemon=True).start()
        if taken:
            file.close()
            raise ValueError(f"{self.path.parent} is being trained ({holder}); wait for that run, "
                             "or give this one another folder: --out")
        self.file = file
        file.truncate(0)
        file.write(f"by process {os.getpid()} of {NODE} since {time.strftime('%Y-%m-%d %H:%M:%S')}")
        file.flush()

    def touch(self):
        """In a thread: this run lives."""
        while not self.released.wait(60):
            with contextlib.suppress(OSError):
                os.utime(self.path)

    def close(self):
        """Give the folder back, if it was taken."""
        self.released.set()
        if self.file:
            with contextlib.suppress(OSError):
                self.path.unlink()
            self.file.close()


# ----------------------------------------------------------------------------------------- Ends


class Unbreakable:
    """A stream that may be missing, full, closed by its reader, or of another alphabet: what cannot
    be written is lost, and the run goes on."""

    def __init__(self, stream):
        self.stream = stream
        with contextlib.suppress(AttributeError, ValueError, OSError):
            stream.reconfigure(errors="backslashreplace")

    def write(self, text: str):
        """Write and flush, or never again."""
        try:
            self.stream.write(text)
            self.stream.flush()
        except (OSError, ValueError):
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
        except AttributeError:  # None: pythonw has no streams
            pass

    def flush(self):
        """All is written."""

    def __getattr__(self, name):
        return getattr(self.stream, name)


class one_line_errors:
    """What may go wrong in a run ends here, in a line on stderr; a bug keeps its traceback.

    The group of processes is left, and what cannot be printed is lost. `program`: the name that the
    line begins with. `code`: to end the program with.
    """

    code = 1

    def __init__(self, program: str):
        self.program = program

    def __enter__(self):
        for _ in range(3):  # what is missing (2>&-) would be the number of the next file opened
            if (number := os.open(os.devnull, os.O_RDWR)) > 2:
                os.close(number)
                break
        self.streams = sys.stdout, sys.stderr
        sys.stdout, sys.stderr = map(Unbreakable, self.streams)
        return self

    def __exit__(self, kind, error, traceback):
        text = self.text(error) if error else None
        for line in (text or "").splitlines():
            print(f"{self.program}: {line}", file=sys.stderr)
        if isinstance(error, Lost):
            os._exit(1)  # at once: to leave the group in order would wait for the lost one, too
        with contextlib.suppress(RuntimeError):
            if dist.is_initialized():
                dist.destroy_process_group()
        sys.stdout, sys.stderr = self.streams
        return text is not None

    def text(self, error) -> str | None:
        """What to say of an error: nothing where another process says it; None: it is a bug."""
        here = f"process {rank()} on {NODE}: " if size() > 1 else ""
        if isinstance(error, KeyboardInterrupt):  # while it loads; later it ends the step
            return "interrupted before the first step; the same command begins again"
        if isinstance(error, (Stop, FloatingPointError)):  # all processes have the same to say
            self.code = getattr(error, "code", 1)
            speaks = started("LOCAL_RANK", rank()) == 0
            return "\n".join(f"error: {line}" for line in str(error).splitlines() if speaks)
        if isinstance(error, (ValueError, OSError)):
            return f"error: {here}{error}"
        if isinstance(error, torch.OutOfMemoryError):
            reason = first_line(error).split(". ")[0]
            return (f"error: {here}the GPU's memory is too small ({reason}); type a smaller "
                    "--batch-size, or --recompute 3")
        if of_an_exchange(error):
            return f"error: {here}another process ended; see its message"
        return None
