"""Where the network runs and how much memory it may take there."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch

from ..errors import DeviceError

GIB = 2**30


def choose_device(choice: str = "auto") -> tuple[torch.device, str]:
    """The device and, in words, why it was taken.

    Args:
        choice: ``"auto"`` (a CUDA GPU where there is one, else the CPU), ``"cpu"``, ``"cuda"`` or ``"mps"``.

    Raises:
        DeviceError: the device was asked for and cannot be used.
    """
    if choice == "cpu":
        return torch.device("cpu"), "asked for" + _slower()
    if choice == "mps":
        if not torch.backends.mps.is_available():
            raise DeviceError(
                "device 'mps' was asked for, but there is no Apple GPU that torch can use; use --device cpu"
            )
        return torch.device("mps"), "asked for"
    if choice not in ("auto", "cuda"):
        raise DeviceError(f"device {choice!r} is unknown; use auto, cpu, cuda or mps")
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
        return torch.device("cuda"), f"asked for ({name})" if choice == "cuda" else f"CUDA GPU found: {name}"
    if torch.version.cuda is None and torch.version.hip is None:
        why = f"torch {torch.__version__} is a CPU build"
    else:
        why = "the driver reports none"
    if choice == "cuda":
        raise DeviceError(f"device 'cuda' was asked for, but no CUDA GPU was found: {why}; use --device cpu or auto")
    return torch.device("cpu"), f"no CUDA GPU found: {why}{_slower()}"


def _slower() -> str:
    """What a user of the CPU can change about its speed; looked for without importing it."""
    return (
        "" if importlib.util.find_spec("numba") else "; numba is not installed, with it fusing is 2 to 8 times faster"
    )


def free_memory(device: torch.device) -> float | None:
    """Bytes that are free on ``device``; None where the system does not say."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    if device.type == "cpu":
        try:
            lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
            (kib,) = (line.split()[1] for line in lines if line.startswith("MemAvailable"))
            return float(kib) * 1024
        except (OSError, ValueError):
            return None
    return None


def has_bfloat16(device: torch.device) -> bool:
    """Whether convolutions in bfloat16 are worth it on ``device``: without instructions for it they are emulated."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    return (
        device.type == "cpu" and torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception of torch or numpy says that memory ran out."""
    if isinstance(error, MemoryError):
        return True
    words = ("out of memory", "not enough memory", "allocate memory", "could not create a memory", "bad allocation")
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words)
