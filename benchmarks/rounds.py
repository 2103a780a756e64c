"""Contestants in processes of their own, measured in turn so that a slow minute slows all of them."""

from __future__ import annotations

import ctypes
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol


class Contestant(Protocol):
    """What is measured, living in its own process."""

    def prepare(self, case: int) -> None:
        """Inputs of one round; the same `case` gives every contestant the same inputs."""

    def step(self) -> None:
        """The measured work."""

    def facts(self) -> dict[str, Any]:
        """What the parent checks or prints, after any number of steps."""


class Contest:
    """Runs contestants by turns.

        with Contest({"ours": partial(build, ...), "theirs": ...}, threads=2) as contest:
            seconds = contest.run(rounds=7)

    builders: name -> picklable function without arguments that makes a Contestant, called in the child.
    """

    def __init__(self, builders: Mapping[str, Callable[[], Contestant]], threads: int) -> None:
        self._builders, self._threads, self._stack = dict(builders), threads, ExitStack()

    def __enter__(self) -> Contest:
        context = multiprocessing.get_context("spawn")
        self._pipes = {}
        for name, build in self._builders.items():
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(there, build, self._threads), daemon=True)
            process.start()
            there.close()
            self._stack.callback(_stop, process, here)
            self._pipes[name] = here
            self.ask(name, "facts")  # one at a time: building is the hungriest moment
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def ask(self, name: str, question: str, *arguments: Any) -> Any:
        """`step` a case (seconds), `memory` or `peak` of a case (bytes, see those methods), or `facts`."""
        self._pipes[name].send((question, *arguments))
        answer = self._pipes[name].recv()
        if isinstance(answer, BaseException):
            raise RuntimeError(f"{name} failed") from answer
        return answer

    def run(self, rounds: int, warmup: int = 3) -> dict[str, list[float]]:
        """Seconds of every contestant in every round; the order turns so that nobody always follows the same one."""
        names = list(self._pipes)
        times: dict[str, list[float]] = {name: [] for name in names}
        for case in range(warmup + rounds):
            first = case % len(names)
            for name in names[first:] + names[:first]:
                seconds = self.ask(name, "step", case)
                if case >= warmup:
                    times[name].append(seconds)
        return times

    def memory(self, rounds: int = 3) -> dict[str, int]:
        """Bytes that a step of each contestant takes beyond what it holds between steps; median over cases."""
        return {
            name: int(statistics.median(self.ask(name, "memory", case) for case in range(rounds)))
            for name in self._pipes
        }

    def peak(self, rounds: int = 3) -> dict[str, int]:
        """Most resident bytes during a step of each contestant, as the system sees its process; median over cases."""
        return {
            name: int(statistics.median(self.ask(name, "peak", case) for case in range(rounds))) for name in self._pipes
        }


def _serve(pipe: Any, build: Callable[[], Contestant], threads: int) -> None:
    import torch

    torch.set_num_threads(threads)
    contestant = build()
    while True:
        question, *arguments = pipe.recv()
        if question == "stop":
            return
        try:
            pipe.send(_answer(contestant, question, *arguments))
        except Exception as error:
            import traceback

            traceback.print_exc()
            pipe.send(RuntimeError(repr(error)))


def _answer(contestant: Contestant, question: str, case: int = 0) -> Any:
    if question == "facts":
        return contestant.facts()
    contestant.prepare(case)
    if question == "memory":
        return extra_peak_bytes(contestant.step)
    if question == "peak":
        reset_peak()
        contestant.step()
        return status_bytes("VmHWM")
    start = time.perf_counter()
    contestant.step()
    return time.perf_counter() - start


def _stop(process: Any, pipe: Any) -> None:
    if process.is_alive():
        pipe.send(("stop",))
        process.join(20)
    if process.is_alive():
        process.kill()
    pipe.close()


def extra_peak_bytes(work: Callable[[], object]) -> int:
    """Resident bytes at the highest point of `work` less those before it. Linux only."""
    release_free_memory()
    before = status_bytes("VmRSS")
    reset_peak()
    work()
    return status_bytes("VmHWM") - before


def release_free_memory() -> None:
    """Give what the allocator holds but does not use back to the system."""
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)


def reset_peak() -> None:
    """Let the process's peak start from what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")


def status_bytes(field: str) -> int:
    """A size from the process's status: VmRSS (now) or VmHWM (peak)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)
