"""Configuration: one frozen dataclass for each thing that can be configured."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass

from .errors import InputError

HEADS = ("image", "blend")
SCANS = {2: ("four-direction", "single"), 3: ("tri-plane", "single-axis")}


@dataclass(frozen=True)
class ModelConfig:
    """Architecture of a ClinicalFMamba network; stored inside each checkpoint.

    Source: Zhou and Khalvati, arXiv 2508.03008, section 2. Defaults are the paper's.

    Attributes:
        dimension: 2 for images, 3 for volumes.
        channels: width of the three encoder levels; the last one is the token width.
        dilations: dilation rate of the DGCB at each level.
        mamba_layers: latent Mamba layers for each modality.
        d_state: state size N of the selective scan.
        expand: inner width E of a Mamba layer over the token width.
        d_conv: taps of the causal depth-wise convolution.
        scan: ``"four-direction"`` or ``"single"`` in 2D, ``"tri-plane"`` or ``"single-axis"`` in 3D.
        cmca: whether the cross-modal channel attention branch exists.
        head: ``"image"``, the paper's sigmoid of one map, or ``"blend"``, a weighted mean of the two sources plus a
            residual, which keeps their sharpness; see :func:`.models.clinicalfmamba.fused_from_maps`.
    """

    dimension: int = 2
    channels: tuple[int, int, int] = (32, 64, 128)
    dilations: tuple[int, int, int] = (1, 3, 5)
    mamba_layers: int = 5
    d_state: int = 8
    expand: int = 2
    d_conv: int = 4
    scan: str = ""
    cmca: bool = True
    head: str = "image"

    def __post_init__(self):
        if self.dimension not in SCANS:
            raise InputError(f"dimension must be 2 or 3, not {self.dimension!r}")
        object.__setattr__(self, "scan", self.scan or SCANS[self.dimension][0])
        object.__setattr__(self, "channels", tuple(self.channels))
        object.__setattr__(self, "dilations", tuple(self.dilations))
        if self.scan not in SCANS[self.dimension]:
            raise InputError(f"a {self.dimension}D model scans {' or '.join(SCANS[self.dimension])}, not {self.scan!r}")
        if self.head not in HEADS:
            raise InputError(f"a model's head is one of {', '.join(HEADS)}, not {self.head!r}")
        if len(self.channels) != 3 or len(self.dilations) != 3:
            raise InputError("channels and dilations need three values, one for each encoder level")
        numbers = (*self.channels, *self.dilations, self.d_state, self.expand, self.d_conv)
        if min(numbers) < 1 or self.mamba_layers < 0:
            raise InputError("widths, dilations and sizes must be positive; mamba_layers must not be negative")

    @property
    def head_channels(self) -> int:
        """Maps that the head makes: the image, or the weight and the residual."""
        return 2 if self.head == "blend" else 1

    @property
    def dt_rank(self) -> int:
        """Rank of the projection that makes the step size Δ: ceil(token width / 16)."""
        return -(-self.channels[-1] // 16)

    @property
    def d_inner(self) -> int:
        """Inner channels E of a Mamba layer."""
        return self.expand * self.channels[-1]

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> ModelConfig:
        """Inverse of :meth:`to_json`; raises :class:`InputError` for text that is no such configuration."""
        try:
            return cls(**json.loads(text))
        except (TypeError, json.JSONDecodeError) as error:
            raise InputError(f"not the configuration of a ClinicalFMamba model: {error}") from error


PLANES = ("auto", "axial", "coronal", "sagittal")
DEVICES = ("auto", "cpu", "cuda", "mps")
PRECISIONS = ("float32", "bfloat16")


@dataclass(frozen=True)
class FusionOptions:
    """How one pair is fused; see :meth:`.inference.engine.FusionEngine.fuse`.

    Attributes:
        model: ``"auto"`` (by the pair's modalities), the name of a bundled model, or the path of a .safetensors file.
        device: ``"auto"``, ``"cpu"``, ``"cuda"`` or ``"mps"``; ``"auto"`` leaves it to the engine.
        window_a, window_b: ``"auto"``, a CT preset, ``"LO,HI"`` or (lo, hi) in the volume's own units.
        modality_a, modality_b: ``"CT"``, ``"MR"``, ``"SPECT"`` or ``"PET"``; ``""`` reads or guesses it.
        plane: of the slices that a 2D model sees; ``"auto"`` takes the one with the finest pixels.
        resample: whether B is interpolated onto A's grid where the grids differ; otherwise they are refused.
        max_memory_gib: bound on the network's memory in GiB; None takes what is free.
        check_registration: whether small shifts of B are tried, to warn when B looks shifted.
        precision: ``"float32"``, or ``"bfloat16"`` for the convolutions, which takes less time where the processor has
            it and moves the result by less than 0.01 of its range.
    """

    model: str = "auto"
    device: str = "auto"
    window_a: str | tuple[float, float] = "auto"
    window_b: str | tuple[float, float] = "auto"
    modality_a: str = ""
    modality_b: str = ""
    plane: str = "auto"
    resample: bool = False
    max_memory_gib: float | None = None
    check_registration: bool = True
    precision: str = "float32"

    def __post_init__(self):
        if self.device not in DEVICES:
            raise InputError(f"device {self.device!r} is unknown; use one of {', '.join(DEVICES)}")
        if self.plane not in PLANES:
            raise InputError(f"plane {self.plane!r} is unknown; use one of {', '.join(PLANES)}")
        if self.precision not in PRECISIONS:
            raise InputError(f"precision {self.precision!r} is unknown; use one of {', '.join(PRECISIONS)}")
        for field in ("modality_a", "modality_b"):
            object.__setattr__(self, field, parse_modality(getattr(self, field)))
        if self.max_memory_gib is not None and not 0 < self.max_memory_gib < float("inf"):
            raise InputError(f"the memory bound must be a positive number of GiB, not {self.max_memory_gib}")


def parse_modality(text: str) -> str:
    """``"CT"``, ``"MR"``, ``"SPECT"``, ``"PET"`` or ``""`` from what users and model cards write.

    Raises:
        InputError: an unknown modality.
    """
    from .volumes import MODALITIES  # here, because volumes needs numpy

    upper = text.strip().upper()
    upper = "MR" if upper == "MRI" else upper
    if upper and upper not in MODALITIES:
        raise InputError(f"modality {text!r} is unknown; use one of {', '.join(MODALITIES)}")
    return upper
