"""Two nodes on one machine: what pretrain.py does when a node, a link, a flag or a disk fails.

    sudo python bench/nodes.py --data demo --out results/robustness/nodes.json     # some 15 minutes

Each node is a network namespace with an address and a host name of its own, a copy of the prepared
data and run folders of its own; a pair of virtual interfaces joins them, and torchrun starts one
process on each, as on two machines without a common disk. Needs Linux, iproute2 and root, says so
and stops without. What must hold is compared with a run that nobody disturbed, bit for bit.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import ROOT, command_line, machine, where, write

ADDRESSES = {"clmr-a": "10.77.0.1", "clmr-b": "10.77.0.2"}
A, B = ADDRESSES
STEPS = 8
TIMEOUT = 0.3  # minutes


def ip(*words, check=True):
    """`ip WORDS`, quietly."""
    return subprocess.run(["ip", *words], check=check, capture_output=True, text=True)


class Nodes:
    """The two namespaces, joined, with folders of their own; all of it is taken away at the end."""

    def __init__(self, folder: Path, data: Path):
        self.folder = folder
        self.data = data
        self.port = 20000 + os.getpid() % 20000
        self.started = []

    def __enter__(self):
        self.remove()
        for name in ADDRESSES:
            ip("netns", "add", name)
            shutil.copytree(self.data, self.folder / name / "data")
        ip("link", "add", "to-b", "netns", A, "type", "veth", "peer", "name", "to-a", "netns", B)
        for name, address in ADDRESSES.items():
            ip("-n", name, "address", "add", f"{address}/24", "dev", self.interface(name))
            ip("-n", name, "link", "set", "lo", "up")
        self.link("up")
        return self

    def __exit__(self, *error):
        self.end()
        self.remove()

    def interface(self, name):
        return "to-b" if name == A else "to-a"

    def link(self, state):
        """Up, or down: packets are then lost without a word."""
        for name in ADDRESSES:
            ip("-n", name, "link", "set", self.interface(name), state)

    def remove(self):
        for name in ADDRESSES:
            ip("netns", "delete", name, check=False)
            shutil.rmtree(Path("/etc/netns") / name, ignore_errors=True)

    def pids(self, name):
        """Of all processes of a node, torchrun's first."""
        return [int(pid) for pid in ip("netns", "pids", name, check=False).stdout.split()]

    def worker(self, name):
        """The pid of the process that trains on a node."""
        for pid in self.pids(name):
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            if not any(b"torch.distributed.run" in word for word in words):
                if any(word.endswith(b"pretrain.py") for word in words):
                    return pid
        raise RuntimeError(f"nothing trains on {name}")

    def kill(self, name):
        """SIGKILL to all that runs on a node."""
        for pid in self.pids(name):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue

    def end(self):
        for name in ADDRESSES:
            self.kill(name)
        for process in self.started:
            process.wait()
        self.started = []
        self.link("up")

    def start(self, name, run, *flags, torchrun=("--nnodes=2",), interface=True):
        """Start torchrun on a node, training into its folder `run` -> Popen."""
        number = list(ADDRESSES).index(name)
        here = self.folder / name
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore",
                       "PYTHONUNBUFFERED": "1"}
        if interface:
            environment["GLOO_SOCKET_IFNAME"] = self.interface(name)
        words = ["ip", "netns", "exec", name, "unshare", "--uts", "sh", "-c",
                 f'hostname {name}; exec "$@"', "sh", sys.executable, "-m",
                 "torch.distributed.run", "--nproc_per_node=1", f"--node_rank={number}",
                 "--rdzv_backend=c10d", f"--rdzv_endpoint={ADDRESSES[A]}:{self.port}",
                 f"--rdzv_conf=is_host={int(name == A)},last_call_timeout=5",
                 f"--local_addr={ADDRESSES[name]}", *torchrun, str(ROOT / "pretrain.py"),
                 "--data", "data", "--width", "0.0625", "--batch-size", "4", "--amp", "off",
                 "--device", "cpu", "--log-every", "1", "--save-every", "2", "--timeout",
                 str(TIMEOUT), "--out", run, *map(str, flags)]
        with open(here / f"{run}.txt", "w", encoding="utf-8") as text:
            process = subprocess.Popen(words, cwd=here, env=environment, stdout=text,
                                       stderr=subprocess.STDOUT)
        self.started.append(process)
        return process

    def start_both(self, run, *flags, of_b=(), **how):
        """Both nodes with these flags, the second with more -> [Popen, Popen]."""
        self.port += 1
        return [self.start(A, run, *flags, **how), self.start(B, run, *flags, *of_b, **how)]

    def text(self, name, run):
        """What a node said."""
        return (self.folder / name / f"{run}.txt").read_text(encoding="utf-8")

    def lines(self, run):
        """The errors of pretrain.py on each node."""
        return [[line for line in self.text(name, run).splitlines()
                 if line.startswith("pretrain.py: ")] for name in ADDRESSES]

    def wait_for_step(self, run, step, seconds=240):
        log = self.folder / A / run / "log.jsonl"
        for _ in range(10 * seconds):
            if log.exists() and f'{{"step": {step},' in log.read_text(encoding="utf-8"):
                return
            time.sleep(0.1)
        raise RuntimeError(f"{run} did not get to step {step}: {self.text(A, run)[-500:]}")

    def checkpoint(self, run, name=A):
        import torch

        return torch.load(self.folder / name / run / "checkpoint.pt", weights_only=True)


def alive(pid):
    """Does a process run? One that has ended, and whose parent has not asked yet, does not."""
    try:
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except OSError:
        return False


def ended(processes, seconds=240):
    """Seconds until all have ended, and their exit codes; None as code of one that goes on."""
    began = time.monotonic()
    while time.monotonic() - began < seconds and any(p.poll() is None for p in processes):
        time.sleep(0.1)
    return time.monotonic() - began, [p.poll() for p in processes]


def equal(a, b):
    """Weights, moments and step of two checkpoints, bit for bit."""
    import torch

    same = a["step"] == b["step"]
    same &= all(torch.equal(value, b["learner"][key]) for key, value in a["learner"].items())
    for i, state in a["optimiser"]["state"].items():
        other = b["optimiser"]["state"][i]
        same &= all(torch.equal(value, other[key]) for key, value in state.items())
    return bool(same)


# ------------------------------------------------------------------------------------ the cases
# Each takes the nodes -> (what happened, in words; did it hold?).


def undisturbed(nodes):
    """two nodes, undisturbed"""
    _, codes = ended(nodes.start_both("straight", "--max-steps", STEPS))
    words = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2",
             f"--master_port={nodes.port + 1000}", str(ROOT / "pretrain.py"), "--data", nodes.data,
             "--width", "0.0625", "--batch-size", "4", "--amp", "off", "--device", "cpu",
             "--max-steps", STEPS, "--out", nodes.folder / A / "one-machine"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    subprocess.run(list(map(str, words)), check=True, capture_output=True, env=environment)
    same = equal(nodes.checkpoint("straight"), nodes.checkpoint("one-machine"))
    return f"equal to two processes of one machine, bit for bit: {same}", same and codes == [0, 0]


def resumed(nodes):
    """resume, only node 0 has the checkpoint"""
    ended(nodes.start_both("resumed", "--max-steps", STEPS // 2))
    _, codes = ended(nodes.start_both("resumed", "--max-steps", STEPS))
    only = not (nodes.folder / B / "resumed" / "checkpoint.pt").exists()
    same = equal(nodes.checkpoint("resumed"), nodes.checkpoint("straight"))
    return f"equal to the uninterrupted run: {same}", same and only and codes == [0, 0]


def restarted(nodes):
    """--max-restarts, worker of node 1 killed"""
    how = ("--nnodes=2", "--max-restarts=3")
    processes = nodes.start_both("restarted", "--max-steps", STEPS, torchrun=how)
    nodes.wait_for_step("restarted", 3)
    os.kill(nodes.worker(B), signal.SIGKILL)
    _, codes = ended(processes)
    same = codes == [0, 0] and equal(nodes.checkpoint("restarted"), nodes.checkpoint("straight"))
    again = "continuing from step" in nodes.text(A, "restarted")
    return f"continued: {again}; equal to the uninterrupted run: {same}", same and again


def refusal(case, of_b, says):
    """A case in which node 1 is given something else."""

    def refused(nodes):
        run = case.replace("/", "").replace(" ", "-")
        seconds, codes = ended(nodes.start_both(run, "--max-steps", STEPS, of_b=of_b))
        both = all(any(says in line and "clmr-b" in line for line in lines)
                   for lines in nodes.lines(run))
        begun = any((nodes.folder / name / run / "log.jsonl").exists() for name in ADDRESSES)
        held = both and not begun and 0 not in codes and None not in codes
        return f"both name node 1 and `{says}`, start included {seconds:.0f} s", held

    refused.__doc__ = case
    return refused


def disturbed(case, harm, nodes_that_end=ADDRESSES, says="lost", torchrun=("--nnodes=2",)):
    """A case in which a step is never finished."""

    def lost(nodes):
        run = case.replace(" ", "-").replace(",", "").replace("'", "")
        processes = nodes.start_both(run, "--max-steps", 10_000, torchrun=torchrun)
        nodes.wait_for_step(run, 3)
        workers = {name: nodes.worker(name) for name in nodes_that_end}
        began = time.monotonic()
        harm(nodes)
        while any(map(alive, workers.values())) and time.monotonic() - began < 120:
            time.sleep(0.1)
        seconds = time.monotonic() - began
        told = [any(says in line for line in nodes.text(name, run).splitlines())
                for name in workers]
        nodes.link("up")
        ended(processes, 90)
        nodes.end()
        said = "all say who was lost" if says == "lost" else "they save"
        return (f"ends after {seconds:.0f} s (--timeout is {60 * TIMEOUT:.0f} s); "
                f"{said if all(told) else 'NOT ALL SAY WHY'}", seconds < 100 and all(told))

    lost.__doc__ = case
    return lost


def kill_agent(nodes):
    """SIGKILL to torchrun of node 0 alone."""
    worker = nodes.worker(A)
    status = Path(f"/proc/{worker}/status").read_text(encoding="utf-8")
    agent = next(line.split()[1] for line in status.splitlines() if line.startswith("PPid"))
    os.kill(int(agent), signal.SIGKILL)


def elastic(nodes):
    """--nnodes=1:2, node 1 lost"""
    how = ("--nnodes=1:2", "--max-restarts=3")
    processes = nodes.start_both("elastic", "--max-steps", 2 * STEPS, torchrun=how)
    nodes.wait_for_step("elastic", 3)
    nodes.kill(B)
    _, codes = ended(processes[:1], 300)
    step = nodes.checkpoint("elastic")["step"]
    log = nodes.text(A, "elastic")
    held = codes == [0] and step == 2 * STEPS and "1 process on cpu" in log
    return f"node 0 goes on alone to step {step}", held


def loopback_name(nodes):
    """a host name that means 127.0.1.1, as on Debian"""
    for name in ADDRESSES:
        hosts = Path("/etc/netns") / name / "hosts"
        hosts.parent.mkdir(parents=True, exist_ok=True)
        hosts.write_text(f"127.0.0.1 localhost\n127.0.1.1 {name}\n", encoding="utf-8")
    seconds, codes = ended(nodes.start_both("name", "--max-steps", STEPS, interface=False))
    told = all(any("GLOO_SOCKET_IFNAME" in line for line in lines) for lines in nodes.lines("name"))
    return f"both name GLOO_SOCKET_IFNAME, start included {seconds:.0f} s", told and 0 not in codes


def second_run(nodes):
    """a second run into the same folder"""
    processes = nodes.start_both("locked", "--max-steps", 10_000)
    nodes.wait_for_step("locked", 2)
    words = [sys.executable, str(ROOT / "pretrain.py"), "--data", nodes.data, "--width", "0.0625",
             "--batch-size", "4", "--amp", "off", "--max-steps", 10_000, "--out",
             nodes.folder / A / "locked"]
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True)
    going = all(process.poll() is None for process in processes)
    nodes.end()
    told = "is being trained (by process" in done.stderr and "of clmr-a" in done.stderr
    return "refused, with the holder's node and process", told and going and done.returncode == 1


def cases(other_data):
    missing = ["--data", "nowhere"]
    return [
        undisturbed, resumed, restarted,
        refusal("other data on node 1", ["--data", other_data], "fingerprint"),
        refusal("other --lr on node 1", ["--lr", "0.001"], "lr"),
        refusal("other --seed on node 1", ["--seed", "1"], "seed"),
        refusal("data missing on node 1", missing, "nowhere"),
        disturbed("link down without a reset", lambda nodes: nodes.link("down")),
        disturbed("node 1 killed", lambda nodes: nodes.kill(B), [A]),
        disturbed("torchrun's agent of node 0 killed", kill_agent, says="stopped after step",
                  nodes_that_end=[A]),
        elastic, loopback_name, second_run]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--data", type=Path, required=True, help="prepared, e.g. data/demo")
    parser.add_argument("--other-data", type=Path, help="another one; by default the demo's audio")
    parser.add_argument("--only", nargs="+", default=[""], help="cases whose name has such a word")
    parser.add_argument("--out", type=Path, help="JSON")
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    if not hasattr(os, "geteuid") or os.geteuid() or not shutil.which("ip"):
        sys.exit("bench/nodes.py makes network namespaces: it needs Linux, iproute2 and root; "
                 "type: sudo python bench/nodes.py --data data/demo")
    data = args.data.resolve() if args.data.exists() else (ROOT / "data" / args.data).resolve()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        with Nodes(folder, data) as nodes:
            other = args.other_data and args.other_data.resolve()
            for case in cases(other or without_labels(folder / "other")):
                if not any(word in case.__doc__ for word in args.only):
                    continue
                began = time.monotonic()
                happened, held = case(nodes)
                nodes.end()
                rows.append({"case": case.__doc__, "what happens": happened,
                             "held": "yes" if held else "NO"})
                print(f"{rows[-1]} ({time.monotonic() - began:.0f} s)", flush=True)
    import torch

    held = sum(row["held"] == "yes" for row in rows)
    caption = (f"Two nodes (network namespaces with disks of their own, one process each) on "
               f"{where()}; {STEPS} steps of 4 pairs, width 0.0625; {held} of {len(rows)} held. "
               f"torch {torch.__version__}; `{command_line(__file__)}`")
    result = {"command": command_line(__file__), "machine": machine(), "caption": caption,
              "versions": {"torch": torch.__version__}, "table": rows}
    write(result, args.out)
    return int(held < len(rows))


def without_labels(target):
    """The demo's audio as another prepared folder, whose fingerprint differs."""
    words = [sys.executable, str(ROOT / "prepare.py"), "--data", "folder", "--root",
             str(ROOT / "demo" / "audio"), "--out", str(target)]
    subprocess.run(words, check=True, capture_output=True)
    return target


if __name__ == "__main__":
    sys.exit(main())
