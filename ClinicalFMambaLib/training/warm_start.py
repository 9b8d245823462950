"""Start one network from another: a deeper one from a shallower, a 3D one from a 2D one.

A 2D training step costs a tenth of a 3D one, and a network with one latent Mamba layer a third of one with five, so
most of the learning is done small. What the small network lacks starts as the identity.

Source of the inflation: Carreira and Zisserman, "Quo Vadis, Action Recognition?", CVPR 2017, section 2.4, here with the
kernel in the central slice alone, so that the 3D network starts as the 2D network on each slice.
"""

from __future__ import annotations

import dataclasses
import re

import torch

from ..config import ModelConfig
from ..errors import InputError
from ..models.clinicalfmamba import ClinicalFMamba
from ..ops.scan_order import DIRECTIONS, scan_axes

LAYER = re.compile(r"(latent_[ab])\.(\d+)\.(.*)")


def warm_start(model: ClinicalFMamba, source: ClinicalFMamba) -> None:
    """Fill ``model`` with what ``source`` has learnt.

    Args:
        model: the network to be trained.
        source: the same architecture, or one with fewer latent Mamba layers, or 2D where ``model`` is 3D. Layers that
            it lacks begin as the identity: their output projection is zero.

    Raises:
        InputError: the two differ in anything else.
    """
    wanted = dataclasses.replace(
        source.config, dimension=model.config.dimension, scan=model.config.scan, mamba_layers=model.config.mamba_layers
    )
    shrinks = source.config.mamba_layers > model.config.mamba_layers or source.config.dimension > model.config.dimension
    same_scan = source.config.scan == model.config.scan or source.config.dimension < model.config.dimension
    if wanted != model.config or shrinks or not same_scan:
        raise InputError(
            f"the weights to start from are of another architecture: {source.config.to_json()}; "
            f"this preset's model is {model.config.to_json()}"
        )
    state = source.state_dict()
    if source.config.dimension < model.config.dimension:
        state = _inflate(state, model.state_dict(), source.config, model.config)
    missing = model.load_state_dict(state, strict=False).missing_keys
    with torch.no_grad():
        for name in missing:
            if name.endswith("out_proj.weight"):
                model.get_parameter(name).zero_()


def _inflate(state: dict, target: dict, config_2d: ModelConfig, config_3d: ModelConfig) -> dict:
    """The 2D network's tensors in the shapes of the 3D one's."""
    nearest_axis, nearest_direction = _correspondence(config_2d.scan, config_3d.scan)
    inner = config_2d.d_inner
    inflated = {}
    for name, tensor in state.items():
        shape = target[name].shape
        if "in_proj" in name or "context_proj" in name:
            parts = tensor.split(inner)
            axes = len(set(scan_axes(config_2d.scan)))
            tensor = torch.cat([*(parts[k] for k in nearest_axis), *parts[axes:]])
        elif ".directions." in name:
            directions = len(DIRECTIONS[config_2d.scan])
            parts = tensor.reshape(directions, tensor.shape[0] // directions, *tensor.shape[1:])
            tensor = parts[list(nearest_direction)].flatten(0, 1)
        elif tensor.dim() == 4:
            tensor = _along_depth(tensor)
        inflated[name] = tensor.reshape(shape)
    return inflated


def _along_depth(kernel: torch.Tensor) -> torch.Tensor:
    """(O, I, K, K) to (O, I, K, K, K): an odd kernel in the central slice, a stride-2 kernel as the mean of two."""
    size = kernel.shape[-1]
    volume = kernel.new_zeros(*kernel.shape[:2], size, size, size)
    if size % 2:
        volume[:, :, size // 2] = kernel
    else:
        volume[:] = kernel[:, :, None] / size
    return volume


def _correspondence(scan_2d: str, scan_3d: str) -> tuple[list[int], list[int]]:
    """For each axis order and each direction of the 3D scan the 2D one that runs along the same axis last."""
    last_2d = [d.axes[-1] for d in DIRECTIONS[scan_2d]]
    # the in-plane axes H, W are axes 0, 1 in 2D and 1, 2 in 3D
    directions = [last_2d.index(d.axes[-1] - 1) if d.axes[-1] - 1 in last_2d else 0 for d in DIRECTIONS[scan_3d]]
    axes_2d, axes_3d = scan_axes(scan_2d), scan_axes(scan_3d)
    axes = [axes_2d[directions[axes_3d.index(k)]] for k in range(len(set(axes_3d)))]
    return axes, directions
