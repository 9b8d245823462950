"""The inference plan: a trained network turned once into a form that computes the same output faster.

Exact rewritings of :class:`..models.clinicalfmamba.ClinicalFMamba`; only rounding differs:

- batch norm is folded into the convolution before it, layer norm's scale and shift into the projection behind it;
- the stem and the first stride-2 convolution have nothing between them: one 4×4 convolution with stride 2, so that
  the stem's 32 maps at full resolution are never made;
- a 3×3 convolution after nearest ×2 upsampling sees only 2×2 different pixels: it becomes one 2×2 convolution at the
  low resolution with an output channel for each phase (27 to 8 products in 3D);
- the head reads these phases as they are, by a 2×2 convolution whose output channels are the phases of the result;
- CMCA is linear once its channel weights are known, and the head behind it too: together one 5×5 convolution of the
  sources. Its border, where the head sees zeros, is corrected by what the convolution would see beyond the edge;
- CMCA's pools are those of one 3×3 convolution of a source: the maximum is taken tile after tile, the mean is a
  product of the kernel with sums over the source;
- both modalities pass through the Mamba layers together, chunk after chunk of tokens with a carried state.

What lies between two levels of resolution is computed in tiles with exact halos. Maps of the whole volume exist only
at a quarter of the resolution and below, so that memory hardly grows with the volume and nothing is approximated.

Source: Zhou and Khalvati, arXiv 2508.03008, section 2, for the network.
"""

from __future__ import annotations

import functools
import itertools
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from ..config import ModelConfig
from ..errors import InputError
from ..models.blocks import SLOPE
from ..models.clinicalfmamba import STRIDE, ClinicalFMamba, fused_from_maps, pad_to_stride
from ..models.mamba import DirectionalScan
from ..ops.scan_order import DIRECTIONS, scan_axes
from ..ops.selective_scan import available_backends, selective_scan
from ..ops.token_scan import causal_conv_silu, scan_tokens
from .device import is_out_of_memory

logger = logging.getLogger(__name__)

STAGES = ("encoder", "mamba", "pools", "decoder")
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Bytes of the largest map of a tile. What a tile leaves is used again by the next one as long as the C library keeps
# it (32 MiB at most), and memory fresh from the system costs as much time as the convolution that fills it.
TILE_BYTES = 24 * 2**20
MIN_TILE_BYTES = 2**20
# Maps of this size that live at once in a tile, with their halos.
_MAPS_OF_A_TILE = 12
# Tokens of one chunk of a scan, times sequences: 4 MiB for each of its float32 maps of two modalities.
CHUNK = 2048

Box = tuple[tuple[int, int], ...]
Tick = Callable[[float], None]


def build_plan(model: ClinicalFMamba, precision: str = "float32") -> FusionPlan:
    """The inference plan of ``model``, on its device; see :class:`FusionPlan`."""
    return FusionPlan(model, precision)


class FusionPlan:
    """Computes what ``model.eval()(a, b)`` does.

    Args:
        model: a trained network; its weights are copied.
        precision: ``"float32"``, or ``"bfloat16"`` for the convolutions of encoder and decoder; scans, pools and CMCA
            stay in single precision.

    Shape:
        a, b: (B, 1, H, W) or (B, 1, D, H, W) float32 in [0, 1], of any size; returns the same shape in float32.

    Attributes:
        config, precision, scan_backend: what it computes with.
        tile_bytes: size of the largest map of a tile; smaller ones take less memory and more time.
        seconds: of each of the :data:`STAGES` of the last call.
    """

    def __init__(self, model: ClinicalFMamba, precision: str = "float32"):
        if precision not in PRECISIONS:
            raise InputError(f"precision {precision!r} is unknown; use one of {', '.join(PRECISIONS)}")
        self.config = config = model.config
        self.precision = precision
        self.dimension = config.dimension
        device = next(model.parameters()).device
        self.device = device
        self.scan_backend = available_backends(device)[0]
        self.tile_bytes = TILE_BYTES
        self.seconds: dict[str, float] = {}
        with torch.no_grad():
            dtype = PRECISIONS[precision]
            stem = (model.stem.weight.double(), model.stem.bias.double())
            self.stem_down = _Conv(*_compose_stride2(stem, model.encoder[0][0]), dtype, stride=2)
            self.downs = [_Conv(*_parameters(level[0]), dtype, stride=2) for level in model.encoder[1:]]
            self.blocks = [_GatedBlock(level[1], dtype) for level in model.encoder]
            self.ups = [
                _Conv(*_phases(*_folded(block.conv, block.norm)), dtype, activation=True) for block in model.decoder
            ]
            head = _parameters(model.head)
            self.head = _Conv(_head_of_phases(head[0]), head[1].repeat(2**self.dimension), dtype)
            self.cmca = _Cmca(model, stem, head) if config.cmca else None
            pairs = list(zip(model.latent_a, model.latent_b))
            self.layers = [_MambaPair(*pair) for pair in pairs]
            self.fusion = _MambaPair(model.fusion_ab, model.fusion_ba)
            self.mix = (model.mix.weight.detach().clone(), model.mix.bias.detach().clone())

    def __call__(self, a: torch.Tensor, b: torch.Tensor, tick: Tick | None = None) -> torch.Tensor:
        """Fuse.

        Args:
            tick: called with the fraction done after each tile; may raise to stop.

        Raises:
            InputError: shapes that do not fit the network.
        """
        if a.shape != b.shape or a.dim() != self.dimension + 2 or a.shape[1] != 1:
            raise InputError(
                f"a {self.dimension}D model needs two inputs of one shape; got {tuple(a.shape)} and {tuple(b.shape)}"
            )
        tick = tick or (lambda fraction: None)
        with torch.inference_mode():
            size = a.shape[2:]
            padded, shape = self._pad(a, b)
            times = [time.perf_counter()]

            def stage(result):
                if self.device.type == "cuda":
                    torch.cuda.synchronize(self.device)
                times.append(time.perf_counter())
                return result

            tokens = stage(self.encode(padded, shape, lambda f: tick(0.4 * f)))
            tokens = stage(self.fuse_tokens(tokens, lambda f: tick(0.4 + 0.2 * f)))
            weights = stage(self.cmca.weights(padded, shape) if self.cmca is not None else None)
            tick(0.65)
            fused = stage(self.decode(tokens, padded, weights, shape, lambda f: tick(0.65 + 0.35 * f)))
            self.seconds = {name: end - start for name, start, end in zip(STAGES, times, times[1:])}
            return fused[(..., *(slice(n) for n in size))]

    def _pad(self, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, tuple[int, ...]]:
        """Both sources, each padded to the network's stride, with two zeros around: what the 5×5 convolution reaches.

        Returns (2B, 1, D + 4, H + 4, W + 4), or 2D, and the shape without the zeros.
        """
        shape = tuple(n + -n % STRIDE for n in a.shape[2:])
        padded = torch.zeros((2 * len(a), 1, *(n + 4 for n in shape)), device=self.device)
        inside = padded[(..., *(slice(2, 2 + n) for n in shape))]
        inside[: len(a)] = pad_to_stride(a.to(self.device).float())
        inside[len(a) :] = pad_to_stride(b.to(self.device).float())
        return padded, shape

    def _in_tiles(
        self, shape: Sequence[int], bytes_each: float, even: bool, work: Callable[[Box], None], tick: Tick
    ) -> None:
        """Call ``work`` for boxes that cover ``shape``; where memory runs out, halve them and go on."""
        boxes = list(_boxes(shape, self.tile_bytes / bytes_each, even))
        done, total = 0, math.prod(shape)
        while boxes:
            box = boxes[0]
            try:
                work(box)
            except (MemoryError, RuntimeError) as error:
                halves = [part for box in boxes for part in _halves(box, even)]
                if not is_out_of_memory(error) or len(halves) == len(boxes) or self.tile_bytes < MIN_TILE_BYTES:
                    raise
                boxes, self.tile_bytes = halves, self.tile_bytes // 2
                logger.warning("memory ran out: going on with tiles of %.1f MiB", self.tile_bytes / 2**20)
                continue
            del boxes[0]
            done += math.prod(high - low for low, high in box)
            tick(done / total)

    # ---------------------------------------------------------------------------------------------- encoder

    def encode(self, padded: torch.Tensor, shape: Sequence[int], tick: Tick) -> torch.Tensor:
        """Feature maps at 1/8 resolution.

        Args:
            padded: both sources with two zeros around, (2B, 1, D + 4, H + 4, W + 4) or 2D.
            shape: (D, H, W) of one source.

        Returns:
            (2B, C, D/8, H/8, W/8).
        """

        def first(box: Box) -> torch.Tensor:
            # the half-resolution voxel h reads the source at 2h - 1 ... 2h + 2
            part = padded[(..., *(slice(2 * low + 1, 2 * high + 3) for low, high in box))]
            return self.stem_down(part)

        source, out = first, None
        for level, block in enumerate(self.blocks):
            here = [n // 2 ** (level + 1) for n in shape]
            last = level == len(self.blocks) - 1
            down = None if last else self.downs[level]
            step = 1 if last else 2
            out_shape = [n // step for n in here]
            channels = block.channels if last else down.channels
            out = _empty((padded.shape[0], channels, *out_shape), self.stem_down.weight.dtype, self.device)
            bytes_each = padded.shape[0] * block.channels * out.element_size() * step**self.dimension
            work = functools.partial(_encode_tile, source, block, down, here, out)
            start, share = ((0, 0.55), (0.55, 0.3), (0.85, 0.15))[level]
            self._in_tiles(
                out_shape, bytes_each, not last, work, lambda f, start=start, share=share: tick(start + share * f)
            )
            source = functools.partial(_view, out)
        return out

    # ----------------------------------------------------------------------------------------------- tokens

    def fuse_tokens(self, features: torch.Tensor, tick: Tick) -> torch.Tensor:
        """Latent Mamba layers, both Fusion Mambas, mean and linear: (2B, C, ...) to (B, C, ...) in float32."""
        shape = tuple(features.shape[2:])
        x = features.movedim(1, -1).float().flatten(1, -2).contiguous()
        x = x.unflatten(0, (2, -1))  # (2, B, L, C)
        for number, layer in enumerate(self.layers):
            x = layer(x, shape, self.config.scan, self.scan_backend)
            tick((number + 1) / (len(self.layers) + 1))
        x = self.fusion(x, shape, self.config.scan, self.scan_backend)
        tick(1.0)
        mixed = F.linear((x[0] + x[1]) / 2, *self.mix)
        return mixed.unflatten(1, shape).movedim(-1, 1)

    # ---------------------------------------------------------------------------------------------- decoder

    def decode(self, tokens: torch.Tensor, padded: torch.Tensor, weights, shape: Sequence[int], tick: Tick):
        """Decoder, CMCA, head and sigmoid.

        Args:
            tokens: (B, C, D/8, H/8, W/8).
            padded: as for :meth:`encode`.
            weights: of :meth:`_Cmca.weights`, or None.

        Returns:
            (B, 1, D, H, W) float32.
        """
        first, second, third = self.ups
        dimension, batch = self.dimension, tokens.shape[0]
        quarter = F.pad(tokens.to(first.weight.dtype), [1, 1] * dimension)
        quarter = _clear_outside(
            _interleave(first(quarter), dimension), [(-1, n // 4 + 1) for n in shape], [n // 4 for n in shape]
        )
        half = [n // 2 for n in shape]
        fused = torch.empty((batch, 1, *shape), device=self.device)
        branch = self.cmca.branch(padded, shape, weights) if weights is not None else None
        bytes_each = batch * third.channels * third.weight.element_size()

        def decode_tile(box: Box) -> None:
            # voxel p of the padded quarter-resolution map is at p + 1
            part = quarter[(..., *(slice(low // 2, high // 2 + 2) for low, high in box))]
            around = [(low - 1, high + 1) for low, high in box]
            part = _clear_outside(_interleave(second(part), dimension), around, half)
            part = _clear_phases(third(part), box, half)
            logits = self.head(part).float()
            if branch is not None:
                logits += branch.phases(box)
            logits = _interleave(logits, dimension)
            place = tuple((2 * low, 2 * high) for low, high in box)
            if branch is not None:
                branch.correct_border(logits, place)
            a, b = _view(padded, tuple((low + 2, high + 2) for low, high in place)).split(batch)
            _view(fused, place).copy_(fused_from_maps(logits, a, b))

        self._in_tiles(half, bytes_each, True, decode_tile, tick)
        return fused


def memory_needed(
    config: ModelConfig, shape: Sequence[int], batch: int = 1, tile_bytes: float = TILE_BYTES, element_size: int = 4
) -> float:
    """Bytes that a plan takes for ``batch`` pairs of ``shape``, (H, W) or (D, H, W); an estimate from above.

    Counts both sources and the result, what exists at once of the maps of the whole volume, a chunk of the scan and
    the maps of a tile.
    """
    dimension = config.dimension
    voxels = batch * math.prod(n + -n % STRIDE for n in shape)
    c0, c1, c2 = config.channels
    quarter, eighth = voxels / 4**dimension, voxels / 8**dimension
    stages = (
        2 * element_size * (c1 * quarter + c2 * eighth),  # encoder
        2 * 4 * eighth * (4 * c2 + 2 * config.d_inner),  # Mamba: x, normed, two orders; scan's output and their sum
        2 * element_size * c1 * quarter + 4 * voxels,  # decoder
    )
    tile = min(tile_bytes, 2 * element_size * c0 * voxels / 2**dimension)
    tokens = min(CHUNK, eighth)
    chunk = 2 * 4 * tokens * config.d_inner * (8 + 2 * config.d_state)
    # two sources and their padded copies, the result and its copy
    return 6 * 4 * voxels + max(stages) + chunk + _MAPS_OF_A_TILE * tile


def largest_tile(
    config: ModelConfig,
    shape: Sequence[int],
    budget: float,
    usual: int = TILE_BYTES,
    least: int = MIN_TILE_BYTES,
) -> int | None:
    """The ``tile_bytes``, from ``usual`` down to ``least``, with which one pair fits into ``budget`` bytes, or None."""
    tile = usual
    while memory_needed(config, shape, 1, tile) > budget:
        if tile <= least:
            return None
        tile //= 2
    return tile


# ------------------------------------------------------------------------------------------- convolutions


class _Conv:
    """A convolution without padding unless asked for, channels last, with LeakyReLU behind it if ``activation``."""

    def __init__(self, weight, bias, dtype, *, stride=1, dilation=1, activation=False):
        dimension = weight.dim() - 2
        self.weight = weight.to(dtype).contiguous(memory_format=_channels_last(dimension))
        self.bias = bias.to(dtype)
        self.channels = weight.shape[0]
        self.stride, self.dilation, self.activation = [stride] * dimension, [dilation] * dimension, activation
        self.convolve = {2: F.conv2d, 3: F.conv3d}[dimension]

    def __call__(self, x: torch.Tensor, padding: Sequence[int] | None = None) -> torch.Tensor:
        padding = list(padding or [0] * (x.dim() - 2))
        x = x.to(self.weight.dtype).contiguous(memory_format=_channels_last(x.dim() - 2))
        if x.device.type == "cpu" and _has_pointwise():
            # conv2d and conv3d take a slow path for small inputs, and write the activation in a second pass
            unary = ("leaky_relu", [SLOPE]) if self.activation else ("none", [])
            y = torch.ops.mkldnn._convolution_pointwise(
                x, self.weight, self.bias, padding, self.stride, self.dilation, 1, *unary, ""
            )
            return y.contiguous(memory_format=_channels_last(x.dim() - 2))
        y = self.convolve(x, self.weight, self.bias, self.stride, padding, self.dilation)
        return F.leaky_relu_(y, SLOPE) if self.activation else y


def _has_pointwise() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_convolution_pointwise")


def _channels_last(dimension: int) -> torch.memory_format:
    return torch.channels_last if dimension == 2 else torch.channels_last_3d


class _GatedBlock:
    """:class:`..models.blocks.DilatedGatedConvBlock` on a tile."""

    def __init__(self, block, dtype):
        self.channels = block.dilated.weight.shape[0]
        self.dilation = block.dilated.dilation[0]
        self.local = _Conv(*_folded(*block.local[:2]), dtype, activation=True)
        self.point = _Conv(*_folded(*block.point[:2]), dtype, activation=True)
        self.dilated = _Conv(*_parameters(block.dilated), dtype, dilation=self.dilation)

    def __call__(self, x: torch.Tensor, box: Box, shape: Sequence[int]) -> tuple[torch.Tensor, Box]:
        """From a tile at ``box`` of a map of ``shape`` to the part of it that is right, and its box."""
        local, inner = _convolve_tile(x, box, shape, self.local, 1)
        local.mul_(_crop(self.point(x), box, inner))
        y, inner = _convolve_tile(local, inner, shape, self.dilated, self.dilation)
        return y.add_(_crop(x, box, inner)), inner


def _convolve_tile(x, box: Box, shape, conv: _Conv, halo: int):
    """Convolve with zeros beyond the volume's edge and drop what would need voxels beyond the tile's."""
    edges = [(low == 0, high == n) for (low, high), n in zip(box, shape)]
    padding = [halo if any(edge) else 0 for edge in edges]
    y = conv(x, padding)
    inner = tuple(
        (low if at_low else low + halo, high if at_high else high - halo)
        for (low, high), (at_low, at_high) in zip(box, edges)
    )
    have = tuple((low - p + halo, high + p - halo) for (low, high), p in zip(box, padding))
    return _crop(y, have, inner), inner


def _crop(x: torch.Tensor, box: Box, wanted: Box) -> torch.Tensor:
    """The part ``wanted`` of a tile at ``box``, as a view."""
    return x[(..., *(slice(w[0] - b[0], w[1] - b[0]) for b, w in zip(box, wanted)))]


def _view(x: torch.Tensor, box: Box) -> torch.Tensor:
    return x[(..., *(slice(low, high) for low, high in box))]


def _encode_tile(source: Callable[[Box], torch.Tensor], block: _GatedBlock, down, here, out, box: Box) -> None:
    """One tile of a level, from a gated block's input to the next level's input; ``here`` is the level's shape."""
    step = 1 if down is None else 2
    halo = 1 + block.dilation
    wanted = tuple((step * low, step * high) for low, high in box)
    around = tuple((max(0, low - halo), min(n, high + halo)) for (low, high), n in zip(wanted, here))
    deep = _crop(*block(source(around), around, here), wanted)
    _view(out, box).copy_(deep if down is None else down(deep))


def _empty(shape, dtype, device) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=device, memory_format=_channels_last(len(shape) - 2))


def _boxes(shape: Sequence[int], voxels: float, even: bool) -> Iterator[Box]:
    """Cut ``shape`` into boxes of at most about ``voxels``, halving the longest edge; edges of 2 or 4 at least."""
    edges = list(shape)
    least = 4 if even else 2
    while math.prod(edges) > voxels and max(edges) > least:
        longest = edges.index(max(edges))
        half = -(-edges[longest] // 2)
        edges[longest] = max(least, half + half % 2 if even else half)
    axes = [[(low, min(low + edge, n)) for low in range(0, n, edge)] for n, edge in zip(shape, edges)]
    return itertools.product(*axes)


def _halves(box: Box, even: bool) -> list[Box]:
    """A box in two along its longest edge, or as it is where it is as small as :func:`_boxes` makes them."""
    edges = [high - low for low, high in box]
    longest = edges.index(max(edges))
    low, high = box[longest]
    middle = low + edges[longest] // 2
    middle -= middle % 2 if even else 0
    if edges[longest] <= (4 if even else 2) or middle <= low:
        return [box]
    return [(*box[:longest], part, *box[longest + 1 :]) for part in ((low, middle), (middle, high))]


# ---------------------------------------------------------------------------------- folding and composing


def _parameters(conv) -> tuple[torch.Tensor, torch.Tensor]:
    weight = conv.weight.double()
    return weight, weight.new_zeros(weight.shape[0]) if conv.bias is None else conv.bias.double()


def _folded(conv, norm) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and bias of a convolution with the batch norm behind it."""
    weight, bias = _parameters(conv)
    scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    shift = norm.bias.double() + (bias - norm.running_mean.double()) * scale
    return weight * scale.reshape(-1, *[1] * (weight.dim() - 1)), shift


def _compose_stride2(stem, down) -> tuple[torch.Tensor, torch.Tensor]:
    """Stem and stride-2 convolution as one 4×4 convolution with stride 2 of the source with one zero around.

    The stride-2 convolution reads the stem's map inside the volume only, so this is exact at the border as well.
    """
    weight, bias = _parameters(down)
    dimension = weight.dim() - 2
    convolve = {2: F.conv2d, 3: F.conv3d}[dimension]
    flipped = weight.flip(tuple(range(2, weight.dim())))
    composed = convolve(stem[0].transpose(0, 1), flipped, padding=1).transpose(0, 1)
    return composed, bias + torch.einsum("oc...,c->o", weight, stem[1])


# Which of the three taps falls onto which of the two low-resolution pixels, [phase, pixel, tap]. The output 2j - 1
# (phase 0) and 2j (phase 1) see the pixels j - 1 and j.
_TAPS = torch.tensor([[[1, 1, 0], [0, 0, 1]], [[1, 0, 0], [0, 1, 1]]], dtype=torch.float64)
# The head's output 2i (phase 0) and 2i + 1 (phase 1) from the phases at j = i and j = i + 1: [out, j, phase, tap].
_HEAD_TAPS = torch.zeros(2, 2, 2, 3, dtype=torch.float64)
for _out, _tap in itertools.product(range(2), range(3)):
    _position = _out + _tap  # of the input, counted from 2i - 1
    _HEAD_TAPS[_out, _position // 2, _position % 2, _tap] = 1


def _phases(weight: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A 3×3 convolution after nearest ×2 upsampling as a 2×2 convolution; channels are (phase, channel)."""
    taps = _TAPS.to(weight.device)
    if weight.dim() == 4:
        out = torch.einsum("apx,bqy,ocxy->abocpq", taps, taps, weight)
        out = out.flatten(0, 2)
    else:
        out = torch.einsum("apx,bqy,drz,ocxyz->abdocpqr", taps, taps, taps, weight)
        out = out.flatten(0, 3)
    return out, bias.repeat(2 ** (weight.dim() - 2))


def _head_of_phases(weight: torch.Tensor) -> torch.Tensor:
    """The head, (O, C, 3, 3), as (phases of the output × O, phases of the input × C, 2, 2)."""
    taps = _HEAD_TAPS.to(weight.device)
    if weight.dim() == 4:
        out = torch.einsum("apux,bqvy,ocxy->abouvcpq", taps, taps, weight)
        return out.flatten(0, 2).flatten(1, 3)
    out = torch.einsum("apux,bqvy,drwz,ocxyz->abdouvwcpqr", taps, taps, taps, weight)
    return out.flatten(0, 3).flatten(1, 4)


def _interleave(y: torch.Tensor, dimension: int) -> torch.Tensor:
    """(B, phases × C, J, ...) to (B, C, 2J, ...): the phases of each j become neighbours."""
    batch, channels = y.shape[:2]
    size = y.shape[2:]
    y = y.movedim(1, -1).reshape(batch, *size, *[2] * dimension, channels // 2**dimension)
    order = [0]
    for axis in range(dimension):
        order += [1 + axis, 1 + dimension + axis]
    y = y.permute(*order, 1 + 2 * dimension)
    return y.reshape(batch, *(2 * n for n in size), -1).movedim(-1, 1)


def _clear_outside(x: torch.Tensor, box: Sequence[tuple[int, int]], shape: Sequence[int]) -> torch.Tensor:
    """Zero, in place, what a tile at ``box`` holds beyond a volume of ``shape``."""
    for axis, ((low, high), n) in enumerate(zip(box, shape), start=2):
        if low < 0:
            x.narrow(axis, 0, -low).zero_()
        if high > n:
            x.narrow(axis, x.shape[axis] - (high - n), high - n).zero_()
    return x


def _clear_phases(y: torch.Tensor, box: Box, shape: Sequence[int]) -> torch.Tensor:
    """Zero, in place, the outputs -1 and 2N of a map of phases at j = box: the head sees zeros there."""
    dimension = len(shape)
    phases = y.movedim(1, -1).unflatten(-1, (*[2] * dimension, -1))
    for axis, ((low, high), n) in enumerate(zip(box, shape)):
        for edge, index, phase in ((low == 0, 0, 0), (high == n, y.shape[2 + axis] - 1, 1)):
            if edge:
                phases.select(1 + axis, index).select(dimension + axis, phase).zero_()
    return y


# --------------------------------------------------------------------------------------------------- CMCA


class _Cmca:
    """Both cross-modal channel attentions: channel weights from pools, then one linear function of the sources."""

    def __init__(self, model: ClinicalFMamba, stem, head):
        self.dimension = model.config.dimension

        def compose(conv):
            weight, bias = _parameters(conv)
            weight = weight.flatten(1)
            return torch.einsum("oc,ci...->oi...", weight, stem[0])[:, 0], bias + weight @ stem[1]

        # the weights of a's channels come from b, and the other way round
        references = [compose(model.cmca_ba.reference), compose(model.cmca_ab.reference)]
        queries = [compose(model.cmca_ab.query), compose(model.cmca_ba.query)]
        self.reference = [(w.flatten(1).float(), w.flatten(1), b) for w, b in references]
        self.query = torch.stack([w for w, _ in queries])  # (2, C, 3, 3)
        self.query_bias = torch.stack([b for _, b in queries])  # (2, C)
        self.head_weight = head[0]  # (O, C, 3, 3)

    def weights(self, padded: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
        """Channel weights (2, B, C) of both sources' features, in double precision."""
        batch = padded.shape[0] // 2
        pooled = []
        for modality, (kernel, exact, bias) in enumerate(self.reference):
            for sample in range(batch):
                x = padded[modality * batch + sample, 0]
                mean = exact @ _shifted_sums(x, shape).flatten() / math.prod(shape)
                pooled.append(mean + bias + _largest(x, shape, kernel).double() + bias)
        pooled = torch.stack(pooled).unflatten(0, (2, batch))
        return torch.sigmoid(pooled.flip(0))

    def branch(self, padded: torch.Tensor, shape: Sequence[int], weights: torch.Tensor) -> _Branch:
        return _Branch(self, padded, shape, weights)


def _windows(x: torch.Tensor) -> torch.Tensor:
    """(3^d, voxels) from a block with one more voxel on each side."""
    dimension = x.dim()
    for axis in range(dimension):
        x = x.unfold(axis, 3, 1)
    return x.permute(*range(dimension, 2 * dimension), *range(dimension)).reshape(3**dimension, -1)


def _largest(x: torch.Tensor, shape: Sequence[int], kernel: torch.Tensor) -> torch.Tensor:
    """Maximum over all voxels of a 3×3 convolution (C, 9) of a source with two zeros around, without its map."""
    tops = []
    for box in _boxes(shape, 16384, even=True):
        windows = _windows(_view(x, tuple((low + 1, high + 3) for low, high in box)))
        tops.append(_linear(kernel, windows.T).amax(1))
    return torch.stack(tops).amax(0)


def _shifted_sums(x: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """Sum over all voxels of the source moved by -1, 0 and 1 along each axis, (3, 3) or (3, 3, 3) in double."""
    x = x[tuple(slice(2, 2 + n) for n in shape)]
    for _ in range(len(shape)):
        total, first, last = x.sum(0, dtype=torch.float64), x[0].double(), x[-1].double()
        x = torch.stack([total - last, total, total - first], -1)
    return x


class _Branch:
    """CMCA and head of one pair as a convolution of its sources, for each sample of the batch."""

    def __init__(self, cmca: _Cmca, padded: torch.Tensor, shape: Sequence[int], weights: torch.Tensor):
        self.dimension, self.shape = cmca.dimension, tuple(shape)
        self.batch = padded.shape[0] // 2
        self.padded = padded.unflatten(0, (2, self.batch))[:, :, 0]  # (2, B, ...)
        self.convs, self.borders = [], []
        for sample in range(self.batch):
            scaled = cmca.query * weights[:, sample].reshape(2, -1, *[1] * self.dimension)  # (2, C, 3, 3)
            bias = (cmca.query_bias * weights[:, sample]).sum(0)  # (C,)
            kernel = _full_convolution(scaled, cmca.head_weight)  # (O, 2, 5, 5)
            constant = cmca.head_weight.flatten(2).sum(2) @ bias
            weight = _space_to_depth_kernel(kernel)
            self.convs.append(_Conv(weight, constant.repeat(2**self.dimension), torch.float32))
            self.borders.append(self._border(cmca, sample, scaled, bias))

    def phases(self, box: Box) -> torch.Tensor:
        """The branch at half-resolution voxels, its phases as channels, (B, phases, ...)."""
        part = _view(self.padded, tuple((2 * low, 2 * high + 4) for low, high in box))
        out = []
        for sample, conv in enumerate(self.convs):
            x = part[:, sample].unsqueeze(1)
            for axis in range(self.dimension):
                x = x.unflatten(2 + 2 * axis, (-1, 2))
            # (2, 1, n, 2, n, 2, ...) to (2 × phases, n, n, ...)
            spatial = [2 + 2 * axis for axis in range(self.dimension)]
            x = x.permute(0, 1, *(axis + 1 for axis in spatial), *spatial)
            x = x.reshape(1, -1, *(x.shape[2 + self.dimension :]))
            out.append(conv(x))
        return torch.cat(out)

    def _border(self, cmca: _Cmca, sample: int, scaled: torch.Tensor, bias: torch.Tensor) -> list:
        """For each face of the volume what the composed convolution adds from beyond it, on the face's voxels.

        Every voxel of the shell around the volume belongs to one face: the faces of the first axis reach over the
        edges, those of the next ones less so.
        """
        shallow = _Conv(scaled.transpose(0, 1), bias, torch.float32)  # (C, 2, 3, 3)
        source = self.padded[:, sample][None]
        faces = []
        for axis in range(self.dimension):
            for high in (False, True):
                n = self.shape[axis]
                region = [slice(1, m + 3) if k < axis else slice(0, m + 4) for k, m in enumerate(self.shape)]
                region[axis] = slice(n + 1, n + 4) if high else slice(0, 3)
                beyond = shallow(source[(..., *region)])
                taps = cmca.head_weight.narrow(2 + axis, 2 if high else 0, 1)
                head = _Conv(taps, taps.new_zeros(len(taps)), torch.float32)
                padding = [1 if k < axis else 0 for k in range(self.dimension)]
                faces.append((axis, n - 1 if high else 0, head(beyond, padding)[0]))
        return faces

    def correct_border(self, logits: torch.Tensor, place: Box) -> None:
        """Take from a tile of the output at ``place``, in place, what came from beyond the volume."""
        for sample, faces in enumerate(self.borders):
            for axis, index, face in faces:
                low, high = place[axis]
                if low <= index < high:
                    at = tuple((0, 1) if k == axis else p for k, p in enumerate(place))
                    logits[sample].narrow(1 + axis, index - low, 1).sub_(_view(face, at))


def _full_convolution(scaled: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
    """Kernel (O, 2, 5, 5) of the convolution (2, C, 3, 3) followed by the head (O, C, 3, 3)."""
    convolve = {4: F.conv2d, 5: F.conv3d}[head.dim()]
    flipped = head.flip(tuple(range(2, head.dim())))
    return convolve(scaled, flipped, padding=2).transpose(0, 1)


def _space_to_depth_kernel(kernel: torch.Tensor) -> torch.Tensor:
    """A 5×5 kernel (O, 2, 5, 5) on 2×2 blocks of voxels: (phases of the output × O, 2 × phases of the input, 3, 3)."""
    taps = torch.zeros(2, 2, 3, 5, dtype=kernel.dtype, device=kernel.device)  # [out, in, block, tap]
    for out, inside, block in itertools.product(range(2), range(2), range(3)):
        tap = 2 * (block - 1) + inside - out + 2
        if 0 <= tap < 5:
            taps[out, inside, block, tap] = 1
    if kernel.dim() == 4:
        return torch.einsum("apux,bqvy,omxy->abompquv", taps, taps, kernel).flatten(0, 2).flatten(1, 3)
    out = torch.einsum("apux,bqvy,drwz,omxyz->abdompqruvw", taps, taps, taps, kernel)
    return out.flatten(0, 3).flatten(1, 4)


# -------------------------------------------------------------------------------------------------- Mamba


class _MambaPair:
    """The Mamba layers of both modalities as one, latent or fusion; the fusion's context is the other modality."""

    def __init__(self, first: nn.Module, second: nn.Module):
        layers = (first, second)
        self.fusion = hasattr(first, "context_proj")
        self.eps, self.out_eps = first.norm.eps, first.out_norm.eps
        self.projections = _after_norm(layers, "norm", "in_proj", first.axis_count + 1)
        self.context = _after_norm(layers, "context_norm", "context_proj", first.axis_count) if self.fusion else None
        scans: list[DirectionalScan] = [layer.directions for layer in layers]
        self.rank, self.states = scans[0].rank, scans[0].states
        directions = scans[0].x_proj.shape[0]

        def stacked(get):
            """K × (2, ...) from the parameters of both modalities."""
            return list(torch.stack([get(scan).detach() for scan in scans], 1).contiguous().clone())

        def by_direction(x):
            return x.unflatten(0, (directions, -1))

        def taps(x):
            return by_direction(x[:, 0]).mT

        self.conv = list(zip(stacked(lambda s: taps(s.conv.weight)), stacked(lambda s: by_direction(s.conv.bias))))
        self.context_conv = None
        if self.fusion:
            self.context_conv = list(
                zip(
                    stacked(lambda s: taps(s.context_conv.weight)),
                    stacked(lambda s: by_direction(s.context_conv.bias)),
                )
            )
        self.x_proj = stacked(lambda s: s.x_proj)
        self.dt_proj = stacked(lambda s: s.dt_proj.mT)
        self.dt_bias = stacked(lambda s: by_direction(s.dt_bias))
        self.A = stacked(lambda s: by_direction(-torch.exp(s.A_log)).mT)
        self.D = stacked(lambda s: by_direction(s.D))
        self.out_norm = [
            (layer.out_norm.weight.detach().clone(), layer.out_norm.bias.detach().clone()) for layer in layers
        ]
        self.out_proj = torch.stack([layer.out_proj.weight.detach() for layer in layers])

    def __call__(self, x: torch.Tensor, shape: tuple[int, ...], scan: str, backend: str) -> torch.Tensor:
        """(2, B, L, C) to the same."""
        sets, batch, length, width = x.shape
        inner = self.out_proj.shape[2]
        normed = F.layer_norm(x, (width,), eps=self.eps)
        total = x.new_zeros((sets, batch, length, inner))
        step = length if x.device.type != "cpu" else max(64, CHUNK // batch)
        chunks = [slice(start, min(start + step, length)) for start in range(0, length, step)]
        directions = DIRECTIONS[scan]
        for k, (direction, axis) in enumerate(zip(directions, scan_axes(scan))):
            ordered = _ordered(normed, shape, direction)
            y = torch.empty_like(total)
            taps = self.conv[k][0].shape[1] - 1
            tail, context_tail = x.new_zeros((2, sets, batch, taps, inner))
            state = x.new_zeros((sets, batch, self.states, inner))
            for chunk in chunks:
                part = ordered[:, :, chunk]
                u = _project(part, *self.projections[axis])
                u = causal_conv_silu(u, *self.conv[k], tail, backend)
                chooser = u
                if self.fusion:
                    chooser = _project(part.unbind()[::-1], *self.context[axis])
                    chooser = causal_conv_silu(chooser, *self.context_conv[k], context_tail, backend)
                chosen = _project(chooser, self.x_proj[k])
                self._scan(k, u, chosen, state, y[:, :, chunk], backend)
            _add_back(total, y, shape, direction)
        for chunk in chunks:
            gates = _project(normed[:, :, chunk], *self.projections[-1])
            for m, (gate, affine) in enumerate(zip(gates, self.out_norm)):
                # the mean over directions is left out: layer norm takes scale away but for its epsilon
                eps = self.out_eps * len(directions) ** 2
                F.silu(gate, inplace=True).mul_(F.layer_norm(total[m, :, chunk], (inner,), *affine, eps))
            for m, y in enumerate(_project(gates, self.out_proj)):
                x[m, :, chunk] += y
        return x

    def _scan(self, k: int, u, chosen, state, y, backend: str) -> None:
        """Scan one chunk in direction ``k`` into ``y``, (2, B, L, E)."""
        low_rank, B, C = zip(*(x.split([self.rank, self.states, self.states], -1) for x in chosen))
        if backend != "mamba-ssm":
            dt = (self.dt_proj[k], self.dt_bias[k])
            scan_tokens(u, low_rank, self.A[k], B, C, self.D[k], state, dt=dt, out=y, backend=backend)
            return
        # whole sequences: its kernel starts from zero
        A, D = self.A[k].mT.flatten(0, 1), self.D[k].flatten()
        delta = _project(low_rank, self.dt_proj[k].mT, self.dt_bias[k])

        def channels(x):
            return torch.stack(x, 1).transpose(2, 3)  # (B, 2, E, L)

        scanned = selective_scan(
            channels(u).flatten(1, 2),
            F.softplus(channels(delta)).flatten(1, 2),
            A,
            channels(B),
            channels(C),
            D,
            backend=backend,
        )
        y.copy_(scanned.unflatten(1, (2, -1)).permute(1, 0, 3, 2))


def _after_norm(layers, norm: str, linear: str, parts: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Weight (2, E, C) and bias (2, E) of each part of a projection behind a layer norm without scale and shift."""
    weights, biases = [], []
    for layer in layers:
        scale, shift = getattr(layer, norm).weight.double(), getattr(layer, norm).bias.double()
        weight = getattr(layer, linear).weight.double()
        weights.append((weight * scale).float())
        biases.append((weight @ shift).float())
    weights, biases = (torch.stack(x).detach().chunk(parts, 1) for x in (weights, biases))
    return [(w.contiguous(), b.contiguous()) for w, b in zip(weights, biases)]


def _project(x: Sequence[torch.Tensor], weight: torch.Tensor, bias: torch.Tensor | None = None) -> list[torch.Tensor]:
    """Tokens (B, L, C) of each modality times (2, E, C), plus (2, E): two (B, L, E)."""
    return [
        _linear(tokens.flatten(0, 1), w, None if bias is None else bias[m]).unflatten(0, tokens.shape[:2])
        for m, (tokens, w) in enumerate(zip(x, weight))
    ]


def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    if x.device.type == "cpu" and _has_pointwise():
        # MKL's matrix product reaches less than half of oneDNN's speed on processors that are not Intel's
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


def _ordered(x: torch.Tensor, shape: tuple[int, ...], direction) -> torch.Tensor:
    """Tokens (M, B, L, C) in the order of a scan direction."""
    axes = [2 + axis for axis in direction.axes]
    x = x.unflatten(2, shape).permute(0, 1, *axes, 2 + len(shape)).flatten(2, -2)
    return x.flip(2) if direction.reverse else x


def _add_back(total: torch.Tensor, y: torch.Tensor, shape: tuple[int, ...], direction) -> None:
    """Add tokens in the order of a scan direction to those in row-major order."""
    y = y.flip(2) if direction.reverse else y
    axes = [2 + axis for axis in direction.axes]
    target = total.unflatten(2, shape).permute(0, 1, *axes, 2 + len(shape))
    target.add_(y.unflatten(2, target.shape[2:-1]))
