"""Tasks side by side: order, errors, one core each, and what happens when the caller stops."""

from __future__ import annotations

import threading
import time
from collections import deque

import pytest
import torch

from ClinicalFMambaLib.inference.tasks import cores, run_all, run_as_ready


@pytest.fixture(autouse=True)
def threads_kept():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_results_come_in_order(threads):
    def call(number):
        time.sleep(0.01 * (number % 2))
        return number, torch.is_inference_mode_enabled()

    calls = [lambda n=n: call(n) for n in range(9)]
    with torch.inference_mode():
        assert run_all(calls, threads) == [(n, True) for n in range(9)]
    assert run_all([], threads) == []


def test_each_task_has_one_core():
    torch.set_num_threads(3)
    assert set(run_all([torch.get_num_threads] * 8, 3)) == {1}
    assert torch.get_num_threads() == 3  # of this thread
    assert cores(torch.device("cpu")) == 3 and cores(torch.device("cuda")) == 1


def test_tasks_run_side_by_side():
    together = threading.Barrier(2, timeout=60)
    run_all([together.wait, together.wait], 2)


@pytest.mark.parametrize("threads", [1, 2])
def test_an_error_is_raised(threads):
    def fail():
        raise MemoryError("full")

    with pytest.raises(MemoryError, match="full"):
        run_all([lambda: 1, fail, lambda: 2], threads)


@pytest.mark.parametrize("threads", [1, 3])
def test_items_can_be_added_on_the_way(threads):
    items, done = deque([8]), []
    for item, error in run_as_ready(items, lambda n: 1 / (n - 5), threads):
        done.append(item)
        if item > 4:
            items += [item - 1, item - 3]
        assert isinstance(error, ZeroDivisionError) == (item == 5)
    assert sorted(done) == sorted([8, 7, 5, 6, 4, 4, 2, 5, 3, 4, 2])


def test_what_has_begun_is_finished_when_the_caller_stops():
    finished = []

    def work(number):
        time.sleep(0.05)
        finished.append(number)

    with pytest.raises(KeyboardInterrupt):
        for _ in run_as_ready(range(100), work, 2):
            raise KeyboardInterrupt
    count = len(finished)
    time.sleep(0.15)
    assert len(finished) == count < 10
