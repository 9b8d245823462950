"""A network that starts from a smaller one computes at first what that one computes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ClinicalFMambaLib.config import ModelConfig
from ClinicalFMambaLib.errors import InputError
from ClinicalFMambaLib.models.clinicalfmamba import ClinicalFMamba
from ClinicalFMambaLib.training.warm_start import warm_start

SMALL = ModelConfig(channels=(4, 4, 8), mamba_layers=1)


def network(config, seed):
    """A network whose batch norms have seen something."""
    torch.manual_seed(seed)
    model = ClinicalFMamba(config)
    x = torch.rand(2, 1, *[24] * config.dimension)
    model(x, x.flip(-1))
    return model.eval()


@pytest.mark.parametrize("dimension", [2, 3])
def test_a_deeper_network_starts_as_the_shallower_one(dimension):
    config = replace(SMALL, dimension=dimension, scan="")
    shallow, deep = network(config, 0), network(replace(config, mamba_layers=3), 1)
    warm_start(deep, shallow)
    x = torch.rand(1, 1, *[16] * dimension)
    with torch.no_grad():
        assert torch.equal(deep(x, 1 - x), shallow(x, 1 - x))


def test_a_3d_network_starts_as_the_2d_one_on_each_slice():
    flat, volume = network(SMALL, 0), network(replace(SMALL, dimension=3, scan=""), 1)
    warm_start(volume, flat)
    image = torch.rand(1, 1, 24, 16)
    stack = image[:, :, None].expand(1, 1, 16, 24, 16)
    with torch.no_grad():
        shallow, deep = volume.encode(stack)
        expected_shallow, expected_deep = flat.encode(image)
        decoded, expected_decoded = volume.decoder(deep), flat.decoder(expected_deep)
    for got, expected in ((shallow, expected_shallow), (deep, expected_deep), (decoded, expected_decoded)):
        torch.testing.assert_close(got, expected[:, :, None].expand_as(got), atol=1e-5, rtol=1e-4)


def test_scan_parameters_come_from_the_direction_that_runs_alike():
    flat, volume = network(SMALL, 0), network(replace(SMALL, dimension=3, scan=""), 1)
    warm_start(volume, flat)
    a, b = flat.fusion_ab, volume.fusion_ab
    inner = SMALL.d_inner
    # axial and coronal planes are read row by row, as images are; sagittal planes along H, as columns are
    for direction, source in enumerate((0, 0, 2)):
        assert torch.equal(b.directions.x_proj[direction], a.directions.x_proj[source])
    rows, columns, gate = a.in_proj.weight.split(inner)
    assert torch.equal(b.in_proj.weight, torch.cat([rows, rows, columns, gate]))


@pytest.mark.parametrize(
    ("model", "source"),
    [
        (SMALL, replace(SMALL, mamba_layers=2)),
        (SMALL, replace(SMALL, channels=(4, 4, 4))),
        (SMALL, replace(SMALL, scan="single")),
        (SMALL, replace(SMALL, dimension=3, scan="")),
        (SMALL, replace(SMALL, cmca=False)),
    ],
    ids=["deeper", "wider", "other scan", "3D", "without CMCA"],
)
def test_another_architecture_is_refused(model, source):
    with pytest.raises(InputError, match="another architecture"):
        warm_start(ClinicalFMamba(model), ClinicalFMamba(source))
