"""Token orders of the selective scans, as index operations that hold for any H, W and D.

Tokens are numbered in row-major order of the feature map, (H, W) or (D, H, W). An order is a permutation
``p`` of these numbers: the scan's step ``l`` visits token ``p[l]``. Its inverse puts scan outputs back.

Source: Zhou and Khalvati, arXiv 2508.03008, section 2 (four-direction scan in 2D, tri-plane scan in 3D).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Direction:
    """One scan direction: the order of the axes, slowest first, and whether the order is reversed."""

    axes: tuple[int, ...]
    reverse: bool = False


DIRECTIONS: dict[str, tuple[Direction, ...]] = {
    # row-major, its reverse, column-major, its reverse
    "four-direction": (Direction((0, 1)), Direction((0, 1), True), Direction((1, 0)), Direction((1, 0), True)),
    "single": (Direction((0, 1)),),
    # plane after plane: axial (along D), coronal (along H), sagittal (along W)
    "tri-plane": (Direction((0, 1, 2)), Direction((1, 0, 2)), Direction((2, 0, 1))),
    "single-axis": (Direction((0, 1, 2)),),
}


def scan_order(shape: tuple[int, ...], direction: Direction) -> torch.Tensor:
    """Permutation (L,) that lists the tokens of a feature map of ``shape`` in the order of ``direction``."""
    order = torch.arange(_count(shape)).reshape(shape).permute(direction.axes).reshape(-1)
    return order.flip(0) if direction.reverse else order


def inverse_order(order: torch.Tensor) -> torch.Tensor:
    """Permutation (L,) with ``inverse_order(p)[p] == arange(L)``."""
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.numel(), device=order.device)
    return inverse


@functools.lru_cache(maxsize=64)
def scan_orders(shape: tuple[int, ...], scan: str, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """All orders of a scan and their inverses, each (K, L), on ``device``."""
    # the cache outlives an inference mode, and autograd refuses tensors that were made in one
    with torch.inference_mode(False):
        orders = [scan_order(shape, direction) for direction in DIRECTIONS[scan]]
        return torch.stack(orders).to(device), torch.stack([inverse_order(order) for order in orders]).to(device)


@functools.lru_cache(maxsize=64)
def scan_axes(scan: str) -> tuple[int, ...]:
    """For each direction of a scan the number of its axis order: a direction and its reverse share one."""
    axes = [direction.axes for direction in DIRECTIONS[scan]]
    distinct = sorted(set(axes), key=axes.index)
    return tuple(distinct.index(a) for a in axes)


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
