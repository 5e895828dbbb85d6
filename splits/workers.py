"""Decoding in several processes, none of which can take the run with it.

What: `in_processes(function, jobs, workers, timeout)` yields function(job) for each job, in order,
from so many processes. A process that crashes or hangs on a job is replaced; that job is tried once
more when nothing else runs, and then yields a `Lost` that says what happened.

Why: a damaged file can crash a decoder written in C, or hold it for ever. multiprocessing.Pool
hangs when a process dies, and concurrent.futures.ProcessPoolExecutor gives up all jobs.

How much faster: as many times as there are cores (results/speed/prepare.json).

The plain way: `map(function, jobs)` in this process. prepare.py falls back to it without this file.
"""

import contextlib
import multiprocessing
import os
import queue
import signal
import sys
from collections import deque
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Callable, Iterable, Iterator

import torch

AHEAD = 4  # jobs a process that may be done before the first in line is


@dataclass
class Lost:
    """What a job yields that crashed its process, or took too long, twice."""
    reason: str


def in_processes(function: Callable, jobs: Iterable, workers: int, timeout: float) -> Iterator:
    """Yield function(job) for each job, in order, computed by `workers` processes.

    Args:
        function: takes a job, returns anything that pickles; raises nothing.
        jobs: an iterable, drawn from only as far as jobs are begun.
        workers: number of processes.
        timeout: seconds for one job.
    """
    hands = _Hands(function, workers, timeout)
    threads = ThreadPoolExecutor(workers)
    waiting = deque()

    def first():
        job, future = waiting.popleft()
        result = future.result()
        if not isinstance(result, Lost):
            return result
        wait([other for _, other in waiting])  # perhaps there was too little memory for all of them
        return hands.do(job)
    try:
        for job in jobs:
            waiting.append((job, threads.submit(hands.do, job)))
            if len(waiting) > AHEAD * workers:
                yield first()
        while waiting:
            yield first()
    finally:
        threads.shutdown(wait=False, cancel_futures=True)
        hands.stop()


class _Hands:
    """Processes that each do one job after another. A thread looks after each and replaces it."""

    def __init__(self, function, workers, timeout):
        self.context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
        self.function = function
        self.timeout = timeout
        self.processes = []
        self.free = queue.SimpleQueue()
        for _ in range(workers):
            self.free.put(self._start())

    def _start(self):
        ours, theirs = self.context.Pipe()
        process = self.context.Process(target=_worker, args=(theirs, self.function), daemon=True)
        process.start()
        theirs.close()
        self.processes.append(process)
        return ours, process

    def do(self, job):
        """The function's result, or a Lost."""
        pipe, process = hand = self.free.get() or self._start()
        try:
            pipe.send(job)
            if pipe.poll(self.timeout):
                answer = pipe.recv()
                self.free.put(hand)
                return answer
            reason = f"not decoded after {self.timeout:g} s"
        except (EOFError, OSError):
            process.join(1)
            reason = f"it crashes the decoder (exit code {process.exitcode})"
        process.kill()
        self.processes.remove(process)
        self.free.put(None)
        return Lost(reason)

    def stop(self):
        """End all processes."""
        for process in self.processes:
            process.kill()


def _worker(pipe, function):
    """A process: jobs in, results out, until the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # decoders talk on stderr, into the progress bar
    if sys.platform == "linux":
        # A fork holds the parent's lock and its ends of the other pipes: with them it would outlive
        # a killed parent.
        os.closerange(3, pipe.fileno())
        os.closerange(pipe.fileno() + 1, 1 << 16)
    torch.set_num_threads(1)
    with contextlib.suppress(EOFError):
        while True:
            pipe.send(function(pipe.recv()))
