"""Independent tasks side by side, each on one core.

Where a network's operations are cut into tiles, a core that computes a whole tile never waits for another one, as it
does at the end of each operation that is shared by all cores.
"""

from __future__ import annotations

import functools
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any

import torch


def cores(device: torch.device) -> int:
    """How many tasks run at once: torch's threads on the CPU, one elsewhere."""
    return torch.get_num_threads() if device.type == "cpu" else 1


def run_all(calls: Sequence[Callable[[], Any]], threads: int) -> list[Any]:
    """Results of independent calls, in their order."""
    if threads == 1 or len(calls) == 1:
        return [call() for call in calls]
    results: list[Any] = [None] * len(calls)
    for (number, _), result in run_as_ready(enumerate(calls), lambda item: item[1](), threads):
        if isinstance(result, Exception):
            raise result
        results[number] = result
    return results


def run_as_ready(items: Iterable, work: Callable[[Any], Any], threads: int) -> Iterator[tuple[Any, Any]]:
    """Items with what ``work`` made of each, or the exception that it raised, as they become ready.

    Items that are added to a deque while it is iterated are done as well. When the caller stops, what has begun is
    finished first.
    """
    todo = items if isinstance(items, deque) else deque(items)
    submit = _submit_here if threads == 1 else _pool(threads, os.getpid()).submit
    running: dict[Future, Any] = {}
    try:
        while todo or running:
            while todo and len(running) < threads:
                item = todo.popleft()
                running[submit(_on_one_core, work, item)] = item
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                yield running.pop(future), future.exception() or future.result()
    finally:
        wait(running)


def _on_one_core(work, item):
    with torch.inference_mode():
        return work(item)


def _submit_here(call, *arguments) -> Future:
    future: Future = Future()
    try:
        future.set_result(call(*arguments))
    except Exception as error:
        future.set_exception(error)
    return future


@functools.cache
def _pool(threads: int, process: int) -> ThreadPoolExecutor:
    """Threads in which torch uses one core; a forked process needs its own."""
    return ThreadPoolExecutor(threads, thread_name_prefix="fusion", initializer=_use_one_core)


def _use_one_core() -> None:
    """In a new thread; whoever starts tasks sets what holds for the process's libraries back in the end."""
    torch.get_num_threads()  # asks for the process's number once, which would come later and overwrite this thread's
    torch.set_num_threads(1)
