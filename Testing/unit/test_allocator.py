"""Freed memory is kept by the process."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

# Faults of pages while 4 blocks of 20 MiB come and go, after a first round.
_PROGRAM = """
import resource, sys
import numpy as np
from ClinicalFMambaLib.allocator import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
def blocks():
    return [np.ones(20 * 2**20, np.uint8) for _ in range(4)] and None
blocks()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
blocks()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="keeping freed memory is asked of glibc only: NOT TESTED")
@pytest.mark.parametrize(
    ("how", "setting", "keeps"),
    [("keep", {}, True), ("leave", {}, False), ("keep", {"MALLOC_TRIM_THRESHOLD_": "131072"}, False)],
    ids=["kept", "not asked", "the user's own setting"],
)
def test_freed_memory_is_used_again(how, setting, keeps):
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_") and k != "GLIBC_TUNABLES"}
    path = os.pathsep.join(p for p in sys.path if p)
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, how],
        env={**inherited, "PYTHONPATH": path, **setting},
        capture_output=True,
        text=True,
        check=True,
    )
    assert (int(done.stdout) < 100) == keeps
