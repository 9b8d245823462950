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
- tokens pass through the Mamba layers chunk after chunk with a carried state;
- what the first level makes of black air around the head is known beforehand: only the head's box is computed.

What lies between two levels of resolution is computed in tiles with exact halos. Maps of the whole volume exist only
at a quarter of the resolution and below, so that memory hardly grows with the volume and nothing is approximated.
Tiles, modalities and scans are tasks of one core each (:mod:`.tasks`).

Source: Zhou and Khalvati, arXiv 2508.03008, section 2, for the network.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from ..config import PRECISIONS, ModelConfig
from ..errors import InputError
from ..models.blocks import SLOPE
from ..models.clinicalfmamba import STRIDE, ClinicalFMamba, fused_from_maps, pad_to_stride
from ..models.mamba import DirectionalScan
from ..ops.scan_order import DIRECTIONS, scan_axes
from ..ops.selective_scan import available_backends, selective_scan
from ..ops.token_scan import causal_conv_silu, scan_tokens
from .device import is_out_of_memory
from .tasks import cores, run_all, run_as_ready

logger = logging.getLogger(__name__)

STAGES = ("encoder", "mamba", "pools", "decoder")
# Bytes of the largest map of a tile. What a tile leaves is used again by the next one as long as the C library keeps
# it (see :mod:`..allocator`), and memory fresh from the system costs as much time as the convolution that fills it.
TILE_BYTES = 12 * 2**20
# A GPU has no such memory to keep, and each of its calls costs as much as a small tile.
GPU_TILE_BYTES = 256 * 2**20
MIN_TILE_BYTES = 2**20
# Maps of this size that live at once in a tile, with their halos.
_MAPS_OF_A_TILE = 12
# A map that is smaller than this is not cut for the sake of one more core.
_WORTH_A_CORE = 2**20
# Voxels of one piece of CMCA's maximum, whose 32 maps stay in the second-level cache.
_POOL_VOXELS = 8192
_GPU_POOL_VOXELS = GPU_TILE_BYTES // 128
# Tokens of one chunk of a scan, times sequences: 4 MiB for each of its float32 maps of two modalities.
CHUNK = 2048

Box = tuple[tuple[int, int], ...]
Tile = tuple[slice, Box]  # some samples of a batch, and a part of their volume
Tick = Callable[[float], None]


def usual_tile(device: torch.device) -> int:
    """The ``tile_bytes`` of a plan on ``device`` where memory is plenty."""
    return TILE_BYTES if device.type == "cpu" else GPU_TILE_BYTES


def build_plan(model: ClinicalFMamba, precision: str = "float32") -> FusionPlan:
    """The inference plan of ``model``, on its device; see :class:`FusionPlan`."""
    return FusionPlan(model, precision)


class FusionPlan:
    """Computes what ``model.eval()(a, b)`` does.

    Args:
        model: a trained network; its weights are copied.
        precision: ``"float32"``, or ``"bfloat16"`` for the large convolutions of encoder and decoder; stem, 1×1
            convolutions, scans, pools and CMCA stay in single precision.

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
        self.tile_bytes = usual_tile(device)
        self.seconds: dict[str, float] = {}
        self._cores = 1
        with torch.no_grad():
            self.dtype = dtype = getattr(torch, precision)
            stem = (model.stem.weight.double(), model.stem.bias.double())
            self.stem_down = _Conv(*_compose_stride2(stem, model.encoder[0][0]), torch.float32, stride=2)
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
        with torch.inference_mode(), self._one_core_each():
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
            weights = stage(self.cmca.weights(padded, shape, self._cores) if self.cmca is not None else None)
            tick(0.65)
            fused = stage(self.decode(tokens, padded, weights, shape, lambda f: tick(0.65 + 0.35 * f)))
            self.seconds = {name: end - start for name, start, end in zip(STAGES, times, times[1:])}
            return fused[(..., *(slice(n) for n in size))]

    @contextlib.contextmanager
    def _one_core_each(self) -> Iterator[None]:
        """Tasks instead of operations share the cores: torch's own threads would wait for work on the same cores."""
        threads, self._cores = torch.get_num_threads(), cores(self.device)
        try:
            if self._cores > 1:
                torch.set_num_threads(1)
            yield
        finally:
            self._cores = 1
            torch.set_num_threads(threads)

    def _pad(self, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, tuple[int, ...]]:
        """Both sources, each padded to the network's stride, with two zeros around: what the 5×5 convolution reaches.

        Returns (2B, 1, D + 4, H + 4, W + 4), or 2D, and the shape without the zeros.
        """
        shape = tuple(n + -n % STRIDE for n in a.shape[2:])
        padded = torch.zeros((2 * len(a), 1, *(n + 4 for n in shape)), device=self.device)
        inside = padded[(..., *(slice(2, 2 + n) for n in shape))]
        for part, source in ((slice(0, len(a)), a), (slice(len(a), None), b)):
            if self.device.type == "cuda" and source.device.type == "cpu":
                source = source.pin_memory()  # the second one is copied there while the first one travels
            inside[part] = pad_to_stride(source.to(self.device, non_blocking=True).float())
        return padded, shape

    def _tiles(self, samples: int, shape: Sequence[int], bytes_each: float, even: bool, region=None) -> deque[Tile]:
        """Cut a map into tiles of about ``tile_bytes``, and into one for each core at least where that is worth it.

        Args:
            samples: of the batch. shape: of one of them. bytes_each: of one voxel.
            region: the box that some samples need, where that is not all of it; see :meth:`_lit`.
        """
        threads = self._cores
        at_once = int(self.tile_bytes / (math.prod(shape) * bytes_each))
        groups = -(-samples // max(1, min(at_once, -(-samples // threads))))
        tiles: deque[Tile] = deque()
        for part in _slices(samples, groups):
            box = region(part) if region else tuple((0, n) for n in shape)
            edges = [high - low for low, high in box]
            if 0 in edges:
                continue
            each = bytes_each * (part.stop - part.start)
            share = math.prod(edges) * each * groups / threads
            limit = min(self.tile_bytes, max(share, _WORTH_A_CORE)) / each
            for inner in _boxes(edges, limit, even):
                tiles.append((part, tuple((o + low, o + high) for (o, _), (low, high) in zip(box, inner))))
        return tiles

    def _in_tiles(self, tiles: deque[Tile], even: bool, work: Callable[[slice, Box], None], tick: Tick) -> None:
        """Call ``work`` for all tiles; where memory runs out, halve those that are left and go on."""

        def voxels(tile: Tile) -> int:
            return (tile[0].stop - tile[0].start) * math.prod(high - low for low, high in tile[1])

        done, total = 0, sum(map(voxels, tiles))
        for tile, error in run_as_ready(tiles, lambda tile: work(*tile), self._cores):
            if isinstance(error, Exception):
                halves = [(part, half) for part, box in (tile, *tiles) for half in _halves(box, even)]
                whole = len(halves) == 1 + len(tiles)
                if not is_out_of_memory(error) or whole or self.tile_bytes < MIN_TILE_BYTES:
                    raise error
                tiles.clear()
                tiles += halves
                self.tile_bytes //= 2
                logger.warning("memory ran out: going on with tiles of %.1f MiB", self.tile_bytes / 2**20)
                continue
            done += voxels(tile)
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

        def first(samples: slice, box: Box) -> torch.Tensor:
            # the half-resolution voxel h reads the source at 2h - 1 ... 2h + 2
            return self.stem_down(_view(padded[samples], tuple((2 * low + 1, 2 * high + 3) for low, high in box)))

        source, out = first, None
        for level, block in enumerate(self.blocks):
            here = [n // 2 ** (level + 1) for n in shape]
            last = level == len(self.blocks) - 1
            down = None if last else self.downs[level]
            step = 1 if last else 2
            out_shape = [n // step for n in here]
            channels = block.channels if last else down.channels
            out = _empty((padded.shape[0], channels, *out_shape), self.dtype, self.device)
            region = functools.partial(self._lit, padded, out) if level == 0 else None
            bytes_each = block.channels * 4 * step**self.dimension  # gates are float32 whatever the precision
            tiles = self._tiles(padded.shape[0], out_shape, bytes_each, not last, region)
            work = functools.partial(_encode_tile, source, block, down, here, out)
            start, share = ((0, 0.55), (0.55, 0.3), (0.85, 0.15))[level]
            self._in_tiles(tiles, not last, work, lambda f, start=start, share=share: tick(start + share * f))
            source = functools.partial(_part, out)
        return out

    def _lit(self, padded: torch.Tensor, out: torch.Tensor, samples: slice) -> Box:
        """The part of the first level's output that depends on voxels that are not zero; the rest of it is filled.

        A voxel i reads the source at 4i - 2h - 1 ... 4i + 2h + 4, where h is the block's halo.
        """
        shape, halo = out.shape[2:], 1 + self.blocks[0].dilation
        size = 2 * -(-halo // 2) + 1  # of a black volume whose middle does not see its edges
        sources = padded[samples]
        box = []
        for axis, n in enumerate(shape, start=2):
            lit = torch.amax(sources, [k for k in range(sources.dim()) if k != axis]).nonzero()
            # two zeros are around the source
            low, high = (int(lit[0]) - 2, int(lit[-1]) - 2) if len(lit) else (0, -4 * n)
            low, high = max(0, -((2 * halo + 4 - low) // 4)), min(n, (high + 2 * halo + 1) // 4 + 1)
            box.append((low, max(low, high)))
        if min(shape) < size:
            return tuple((0, n) for n in shape)
        if any((low, high) != (0, n) for (low, high), n in zip(box, shape)):
            self._fill_black(out[samples], size)
        return tuple(box)

    def _fill_black(self, out: torch.Tensor, size: int) -> None:
        """Fill with what the first level makes of a black volume: it depends only on how far the edges are."""
        black = torch.zeros((1, 1, *[4 * size + 4] * self.dimension), device=self.device)
        table = _empty((1, out.shape[1], *[size] * self.dimension), self.dtype, self.device)

        def source(samples: slice, box: Box) -> torch.Tensor:
            return self.stem_down(_view(black, tuple((2 * low + 1, 2 * high + 3) for low, high in box)))

        everything = slice(0, 1), tuple((0, size) for _ in range(self.dimension))
        _encode_tile(source, self.blocks[0], self.downs[0], [2 * size] * self.dimension, table, *everything)
        table = table[0].movedim(0, -1).contiguous()
        edge = size // 2
        first, *others = ([min(i, edge) if i < n - edge else size - n + i for i in range(n)] for n in out.shape[2:])
        for axis, index in enumerate(others, start=1):
            table = table.index_select(axis, torch.tensor(index, device=self.device))
        target = out.movedim(1, -1)
        for i, row in enumerate(first):
            target[:, i] = table[row]

    # ----------------------------------------------------------------------------------------------- tokens

    def fuse_tokens(self, features: torch.Tensor, tick: Tick) -> torch.Tensor:
        """Latent Mamba layers, both Fusion Mambas, mean and linear: (2B, C, ...) to (B, C, ...) in float32."""
        shape = tuple(features.shape[2:])
        x = features.movedim(1, -1).float().flatten(1, -2).contiguous()
        x = x.unflatten(0, (2, -1))  # (2, B, L, C)
        for number, layer in enumerate(self.layers):
            x = layer(x, shape, self.config.scan, self.scan_backend, self._cores)
            tick((number + 1) / (len(self.layers) + 1))
        x = self.fusion(x, shape, self.config.scan, self.scan_backend, self._cores)
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
        deep = F.pad(tokens.to(self.dtype), [1, 1] * dimension)
        quarter = _empty((batch, first.channels // 2**dimension, *(n // 4 + 2 for n in shape)), self.dtype, self.device)

        def first_tile(samples: slice, box: Box) -> None:
            part = first(_part(deep, samples, tuple((low, high + 1) for low, high in box)))
            _part(quarter, samples, tuple((2 * low, 2 * high) for low, high in box)).copy_(_interleave(part, dimension))

        shape_of_phases = [n // 8 + 1 for n in shape]
        tiles = self._tiles(batch, shape_of_phases, first.channels * quarter.element_size(), False)
        self._in_tiles(tiles, False, first_tile, lambda f: tick(0.1 * f))
        _clear_outside(quarter, [(-1, n // 4 + 1) for n in shape], [n // 4 for n in shape])
        half = [n // 2 for n in shape]
        fused = torch.empty((batch, 1, *shape), device=self.device)
        branch = self.cmca.branch(padded, shape, weights) if weights is not None else None
        tiles = self._tiles(batch, half, third.channels * quarter.element_size(), True)

        def decode_tile(samples: slice, box: Box) -> None:
            # voxel p of the padded quarter-resolution map is at p + 1
            part = _part(quarter, samples, tuple((low // 2, high // 2 + 2) for low, high in box))
            around = [(low - 1, high + 1) for low, high in box]
            part = _clear_outside(_interleave(second(part), dimension), around, half)
            part = _clear_phases(third(part), box, half)
            logits = self.head(part).float()
            if branch is not None:
                logits += branch.phases(samples, box)
            logits = _interleave(logits, dimension)
            place = tuple((2 * low, 2 * high) for low, high in box)
            if branch is not None:
                branch.correct_border(logits, samples, place)
            inside = tuple((low + 2, high + 2) for low, high in place)
            a, b = (_part(x, samples, inside) for x in padded.split(batch))
            _part(fused, samples, place).copy_(fused_from_maps(logits, a, b))

        self._in_tiles(tiles, True, decode_tile, lambda f: tick(0.1 + 0.9 * f))
        return fused


def memory_needed(
    config: ModelConfig, shape: Sequence[int], batch: int = 1, tile_bytes: float = TILE_BYTES, element_size: int = 4
) -> float:
    """Bytes that a plan takes for ``batch`` pairs of ``shape``, (H, W) or (D, H, W); an estimate from above.

    Counts both sources and the result, what exists at once of the maps of the whole volume, and for each of torch's
    threads a chunk of the scan and the maps of a tile.
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
    threads = torch.get_num_threads()
    tile = min(threads * tile_bytes, 2 * element_size * c0 * voxels / 2**dimension)
    tokens = min(threads * CHUNK, 2 * eighth)
    chunk = 4 * tokens * config.d_inner * (8 + 2 * config.d_state)
    # two sources and their padded copies, the result and its copy
    return 6 * 4 * voxels + max(stages) + chunk + _MAPS_OF_A_TILE * tile


def largest_tile(config: ModelConfig, shape: Sequence[int], budget: float, usual: int) -> int | None:
    """The ``tile_bytes``, from ``usual`` downwards, with which one pair fits into ``budget`` bytes, or None."""
    tile = usual
    while memory_needed(config, shape, 1, tile) > budget:
        if tile <= MIN_TILE_BYTES:
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
        self.channels, self.dtype = weight.shape[0], dtype
        self.stride, self.dilation, self.activation = [stride] * dimension, [dilation] * dimension, activation
        self.convolve = {2: F.conv2d, 3: F.conv3d}[dimension]
        self.direct = weight.device.type == "cpu" and _has_pointwise()
        if self.direct and weight.shape[1] == 1:
            # the layout of one channel is ambiguous, and only a packed weight makes the output channels last
            pack = {2: torch._C._nn.mkldnn_reorder_conv2d_weight, 3: torch._C._nn.mkldnn_reorder_conv3d_weight}
            self.weight = pack[dimension](self.weight.to_mkldnn(), [0] * dimension, self.stride, self.dilation)

    def __call__(self, x: torch.Tensor, padding: Sequence[int] | None = None) -> torch.Tensor:
        padding = list(padding or [0] * (x.dim() - 2))
        x = x.to(self.dtype).contiguous(memory_format=_channels_last(x.dim() - 2))
        if self.direct:
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
        # cheap, and in bfloat16 the gates of a whole head differed by up to 0.01 of the output's range
        self.point = _Conv(*_folded(*block.point[:2]), torch.float32, activation=True)
        self.dilated = _Conv(*_parameters(block.dilated), dtype, dilation=self.dilation)

    def __call__(self, x: torch.Tensor, box: Box, shape: Sequence[int]) -> tuple[torch.Tensor, Box]:
        """From a tile at ``box`` of a map of ``shape`` to the part of it that is right, and its box."""
        gate = self.point(x)
        # one type for what follows: products and sums of mixed types are not vectorised
        x, gate = (t.to(self.local.dtype) for t in (x, gate))
        local, inner = _convolve_tile(x, box, shape, self.local, 1)
        local.mul_(_crop(gate, box, inner))
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


def _part(x: torch.Tensor, samples: slice, box: Box) -> torch.Tensor:
    return _view(x[samples], box)


def _view(x: torch.Tensor, box: Box) -> torch.Tensor:
    return x[(..., *(slice(low, high) for low, high in box))]


def _encode_tile(source, block: _GatedBlock, down, here, out, samples: slice, box: Box) -> None:
    """One tile of a level, from a gated block's input to the next level's input.

    Args:
        source: the block's input for some samples and a box. down: the convolution behind it, or None.
        here: shape of the level. out: what is written.
    """
    step = 1 if down is None else 2
    halo = 1 + block.dilation
    wanted = tuple((step * low, step * high) for low, high in box)
    around = tuple((max(0, low - halo), min(n, high + halo)) for (low, high), n in zip(wanted, here))
    deep = _crop(*block(source(samples, around), around, here), wanted)
    _part(out, samples, box).copy_(deep if down is None else down(deep))


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


def _slices(length: int, parts: int) -> list[slice]:
    """Cut a range into so many slices of nearly the same length."""
    cuts = [length * k // parts for k in range(parts + 1)]
    return [slice(*cut) for cut in zip(cuts, cuts[1:])]


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
        # without bias, which is added in double precision
        self.reference = [
            (_Conv(w[:, None], torch.zeros_like(b), torch.float32), w.flatten(1), b) for w, b in references
        ]
        self.query = torch.stack([w for w, _ in queries])  # (2, C, 3, 3)
        self.query_bias = torch.stack([b for _, b in queries])  # (2, C)
        self.head_weight = head[0]  # (O, C, 3, 3)

    def weights(self, padded: torch.Tensor, shape: Sequence[int], threads: int = 1) -> torch.Tensor:
        """Channel weights (2, B, C) of both sources' features, in double precision."""
        batch = padded.shape[0] // 2
        piece = _POOL_VOXELS if padded.device.type == "cpu" else _GPU_POOL_VOXELS
        boxes = list(_boxes(shape, piece, even=True))
        share = -(-len(boxes) * 2 * batch // threads)
        calls = []
        for number in range(2 * batch):
            x, (conv, _, _) = padded[number, 0], self.reference[number // batch]
            calls.append(functools.partial(_shifted_sums, x, shape))
            calls += [
                functools.partial(_largest, x, boxes[start : start + share], conv)
                for start in range(0, len(boxes), share)
            ]
        results = run_all(calls, threads)
        each = len(calls) // (2 * batch)
        pooled = []
        for number in range(2 * batch):
            sums, *tops = results[number * each : (number + 1) * each]
            _, exact, bias = self.reference[number // batch]
            mean = exact @ sums.flatten() / math.prod(shape)
            pooled.append(mean + bias + torch.stack(tops).amax(0).double() + bias)
        pooled = torch.stack(pooled).unflatten(0, (2, batch))
        return torch.sigmoid(pooled.flip(0))

    def branch(self, padded: torch.Tensor, shape: Sequence[int], weights: torch.Tensor) -> _Branch:
        return _Branch(self, padded, shape, weights)


def _largest(x: torch.Tensor, boxes: Sequence[Box], conv: _Conv) -> torch.Tensor:
    """Maximum (C,) over some boxes of a 3×3 convolution without bias of a source with two zeros around."""
    top = conv.bias.new_full((conv.channels,), -math.inf)
    for box in boxes:
        part = _view(x, tuple((low + 1, high + 3) for low, high in box))
        if part.device.type == "cpu" and not part.any():
            top.clamp_(min=0)
        else:
            torch.maximum(top, conv(part[None, None]).movedim(1, -1).flatten(0, -2).amax(0), out=top)
    return top


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

    def phases(self, samples: slice, box: Box) -> torch.Tensor:
        """The branch at half-resolution voxels, its phases as channels, (B, phases, ...)."""
        part = _view(self.padded, tuple((2 * low, 2 * high + 4) for low, high in box))
        out = []
        for sample in range(samples.start, samples.stop):
            x = part[:, sample].unsqueeze(1)
            for axis in range(self.dimension):
                x = x.unflatten(2 + 2 * axis, (-1, 2))
            # (2, 1, n, 2, n, 2, ...) to (2 × phases, n, n, ...)
            spatial = [2 + 2 * axis for axis in range(self.dimension)]
            x = x.permute(0, 1, *(axis + 1 for axis in spatial), *spatial)
            x = x.reshape(1, -1, *(x.shape[2 + self.dimension :]))
            out.append(self.convs[sample](x))
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

    def correct_border(self, logits: torch.Tensor, samples: slice, place: Box) -> None:
        """Take from a tile of the output at ``place``, in place, what came from beyond the volume."""
        for sample, faces in enumerate(self.borders[samples]):
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

    def __call__(self, x: torch.Tensor, shape: tuple[int, ...], scan: str, backend: str, threads: int = 1):
        """(2, B, L, C) to the same, in place; with ``threads`` tasks at once."""
        sets, batch, length, width = x.shape
        normed = F.layer_norm(x, (width,), eps=self.eps)
        # a kernel of a GPU takes everything at once; cores take modalities, then samples, then directions
        modalities = [slice(0, 2)] if x.device.type != "cpu" else [slice(0, 1), slice(1, 2)]
        wanted = -(-threads // len(modalities))
        samples = _slices(batch, min(batch, wanted))
        directions = list(enumerate(zip(DIRECTIONS[scan], scan_axes(scan))))
        groups = min(len(directions), -(-wanted // len(samples)))
        totals = [x.new_zeros((sets, batch, length, self.out_proj.shape[2])) for _ in range(groups)]
        run_all(
            [
                functools.partial(
                    self._scan_some, normed, m, part, directions[g::groups], shape, total[m, part], backend
                )
                for m in modalities
                for part in samples
                for g, total in enumerate(totals)
            ],
            threads,
        )
        for other in totals[1:]:
            totals[0] += other
        chunks = _slices(length, -(-length // self._step(x, batch)))
        share = -(-len(chunks) // wanted)
        run_all(
            [
                functools.partial(self._gate, x, normed, totals[0], m, chunks[start : start + share], len(directions))
                for m in range(sets)
                for start in range(0, len(chunks), share)
            ],
            threads,
        )
        return x

    @staticmethod
    def _step(x: torch.Tensor, batch: int) -> int:
        """Tokens of one chunk."""
        return x.shape[2] if x.device.type != "cpu" else max(64, CHUNK // batch)

    def _scan_some(self, normed, modalities: slice, samples: slice, directions, shape, total, backend: str) -> None:
        """Add to ``total`` (M, B, L, E) the scans of some modalities and samples in some directions."""
        mine, length = normed[modalities, samples], normed.shape[2]
        inner, step = total.shape[3], self._step(normed, samples.stop - samples.start)
        chunks = _slices(length, -(-length // step))
        for k, (direction, axis) in directions:
            ordered = _ordered(mine, shape, direction)
            other = _ordered(normed[:, samples].flip(0)[modalities], shape, direction) if self.fusion else None
            y = torch.empty_like(total)
            state = y.new_zeros((*y.shape[:2], self.states, inner))
            tail = y.new_zeros((*y.shape[:2], self.conv[k][0].shape[1] - 1, inner))
            context_tail = torch.zeros_like(tail)
            weights = [w[modalities] for w in self.projections[axis]]
            conv = [w[modalities] for w in self.conv[k]]
            if self.fusion:
                context = [w[modalities] for w in self.context[axis]]
                context_conv = [w[modalities] for w in self.context_conv[k]]
            for chunk in chunks:
                u = causal_conv_silu(_project(ordered[:, :, chunk], *weights), *conv, tail, backend)
                chooser = u
                if self.fusion:
                    chooser = _project(other[:, :, chunk], *context)
                    chooser = causal_conv_silu(chooser, *context_conv, context_tail, backend)
                chosen = _project(chooser, self.x_proj[k][modalities])
                self._scan(k, modalities, u, chosen, state, y[:, :, chunk], backend)
            _add_back(total, y, shape, direction)

    def _gate(self, x, normed, total, m, chunks, directions: int) -> None:
        """Norm, gate and projection of some tokens of a modality, added to ``x``."""
        weight, bias = (w[m] for w in self.projections[-1])
        # the mean over directions is left out: layer norm takes scale away but for its epsilon
        eps = self.out_eps * directions**2
        for chunk in chunks:
            gate = _linear(normed[m, :, chunk].flatten(0, 1), weight, bias).unflatten(0, (x.shape[1], -1))
            y = F.layer_norm(total[m, :, chunk], total.shape[3:], *self.out_norm[m], eps)
            y.mul_(F.silu(gate, inplace=True))
            x[m, :, chunk] += _linear(y.flatten(0, 1), self.out_proj[m]).unflatten(0, (x.shape[1], -1))

    def _scan(self, k: int, modalities: slice, u, chosen, state, y, backend: str) -> None:
        """Scan one chunk in direction ``k`` into ``y``, (M, B, L, E)."""
        low_rank, B, C = zip(*(x.split([self.rank, self.states, self.states], -1) for x in chosen))
        A, D = self.A[k][modalities], self.D[k][modalities]
        dt = (self.dt_proj[k][modalities], self.dt_bias[k][modalities])
        if backend != "mamba-ssm":
            scan_tokens(u, low_rank, A, B, C, D, state, dt=dt, out=y, backend=backend)
            return
        # whole sequences: its kernel starts from zero
        A, D = A.mT.flatten(0, 1), D.flatten()
        delta = _project(low_rank, dt[0].mT, dt[1])

        def channels(x):
            return torch.stack(x, 1).transpose(2, 3)  # (B, M, E, L)

        scanned = selective_scan(
            channels(u).flatten(1, 2),
            F.softplus(channels(delta)).flatten(1, 2),
            A,
            channels(B),
            channels(C),
            D,
            backend=backend,
        )
        y.copy_(scanned.unflatten(1, (len(u), -1)).permute(1, 0, 3, 2))


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
