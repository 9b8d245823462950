"""The inference plan against the module: layer by layer and as a whole, in tiles, in both precisions."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ClinicalFMambaLib.config import ModelConfig
from ClinicalFMambaLib.errors import Cancelled, InputError
from ClinicalFMambaLib.inference import plan as plan_module
from ClinicalFMambaLib.inference.device import has_bfloat16
from ClinicalFMambaLib.inference.intensity import apply_window, choose_window
from ClinicalFMambaLib.inference.plan import build_plan, memory_needed
from ClinicalFMambaLib.models.clinicalfmamba import ClinicalFMamba
from ClinicalFMambaLib.pretrained import find_weights, load_model
from ClinicalFMambaLib.volumes import read_volume


def network(dimension: int, seed: int = 0, **options) -> ClinicalFMamba:
    """Random weights, batch-norm statistics and norms that are far from those of a fresh network."""
    torch.manual_seed(seed)
    config = {"channels": (8, 8, 16), "mamba_layers": 2, "d_state": 4, **options}
    model = ClinicalFMamba(ModelConfig(dimension=dimension, **config)).eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (nn.BatchNorm2d, nn.BatchNorm3d)):
                module.running_mean.normal_(0, 0.3)
                module.running_var.uniform_(0.3, 2)
            if isinstance(module, (nn.BatchNorm2d, nn.BatchNorm3d, nn.LayerNorm)):
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(0, 0.3)
        # so that each branch counts and the sigmoid's whole range is used
        model.head.weight.mul_(4 if model.config.cmca else 10)
        if model.cmca_ab is not None:
            model.cmca_ab.query.weight.mul_(3)
            model.cmca_ba.query.weight.mul_(3)
        maps = []
        hook = model.head.register_forward_hook(lambda module, inputs, output: maps.append(output))
        model(*pair(*[24] * dimension))
        hook.remove()
        model.head.bias.sub_(maps[0].transpose(0, 1).flatten(1).mean(1))
    return model


def pair(*size, batch=1, seed=0):
    return torch.rand(2, batch, 1, *size, generator=torch.Generator().manual_seed(seed))


def nothing(fraction):
    pass


CASES = [
    (2, (40, 61), 2, {}),
    (2, (8, 8), 1, {}),
    (2, (3, 50), 1, {}),
    (2, (64, 48), 3, {"cmca": False}),
    (2, (56, 72), 1, {"scan": "single"}),
    (2, (32, 32), 1, {"mamba_layers": 0}),
    (2, (48, 40), 1, {"dilations": (2, 1, 4), "d_conv": 3, "expand": 1}),
    (3, (17, 24, 33), 1, {}),
    (3, (1, 20, 24), 1, {}),
    (3, (16, 16, 16), 2, {"cmca": False}),
    (3, (40, 32, 24), 1, {"scan": "single-axis"}),
    (3, (32, 24, 40), 1, {"mamba_layers": 0}),
    (2, (40, 61), 2, {"head": "blend"}),
    (2, (32, 48), 1, {"head": "blend", "cmca": False}),
    (3, (17, 24, 33), 1, {"head": "blend"}),
]


@pytest.mark.parametrize("tile_bytes", [2**30, 20_000, 1], ids=["whole", "tiles", "smallest"])
@pytest.mark.parametrize(("dimension", "size", "batch", "options"), CASES, ids=str)
def test_plan_is_the_module(dimension, size, batch, options, tile_bytes):
    model = network(dimension, **options)
    a, b = pair(*size, batch=batch)
    with torch.no_grad():
        expected = model(a, b)
    assert expected.std() > 0.03, "a flat output would hide differences"
    plan = build_plan(model)
    plan.tile_bytes = tile_bytes
    fused = plan(a, b)
    assert fused.shape == expected.shape and fused.dtype == torch.float32
    torch.testing.assert_close(fused, expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(
    ("dimension", "size", "batch", "options", "lit"),
    [
        (2, (96, 120), 3, {}, ((30, 61), (0, 50))),
        (2, (96, 120), 1, {"dilations": (3, 1, 1)}, ((47, 48), (119, 120))),
        (3, (64, 72, 40), 1, {}, ((20, 45), (30, 40), (11, 40))),
        (3, (64, 72, 40), 1, {}, ((0, 0), (0, 0), (0, 0))),
        (3, (32, 16, 40), 1, {}, ((9, 10), (0, 16), (30, 31))),
        (3, (8, 64, 40), 2, {"dilations": (3, 1, 1)}, ((0, 8), (30, 31), (30, 31))),
    ],
    ids=str,
)
def test_black_around_the_head_is_not_computed(dimension, size, batch, options, lit, threads):
    model = network(dimension, **options)
    a, b = torch.zeros(2, batch, 1, *size)
    values = pair(*(high - low for low, high in lit), batch=batch) if lit[0][1] else torch.zeros(2, batch, 1, 0, 0, 0)
    for x, value in zip((a, b), values):
        x[(..., *(slice(low, high) for low, high in lit))] = value
    b = b.roll(1, -1) * (0.5 if lit[0][1] > lit[0][0] + 1 else 0)  # the second one lies elsewhere, or is all black
    with torch.no_grad():
        expected = model(a, b)
    plan, before = build_plan(model), torch.get_num_threads()
    plan.tile_bytes = 20_000
    try:
        torch.set_num_threads(threads)
        fused = plan(a, b)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(fused, expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("dimension", [2, 3])
def test_threads_change_rounding_only(dimension):
    plan, before = build_plan(network(dimension)), torch.get_num_threads()
    a, b = pair(*{2: (64, 72), 3: (24, 32, 40)}[dimension], batch=2)
    plan.tile_bytes = 20_000
    results = []
    try:
        for threads in (1, 2, 7):
            torch.set_num_threads(threads)
            results.append(plan(a, b))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], atol=1e-6, rtol=0)
    assert torch.equal(plan(a, b), plan(a, b))


@pytest.mark.parametrize("dimension", [2, 3])
def test_default_widths(dimension):
    model = network(dimension, channels=(32, 64, 128), mamba_layers=5, d_state=8)
    a, b = pair(*{2: (72, 64), 3: (24, 32, 16)}[dimension])
    with torch.no_grad():
        expected = model(a, b)
    assert (build_plan(model)(a, b) - expected).abs().max() < 1e-4


@pytest.mark.parametrize("dimension", [2, 3])
def test_bfloat16_is_near(dimension):
    model = network(dimension)
    model.head.weight.data.div_(4)
    a, b = pair(*{2: (64, 72), 3: (24, 32, 16)}[dimension])
    plan = build_plan(model, "bfloat16")
    with torch.no_grad():
        difference = (plan(a, b) - model(a, b)).abs().max()
    assert 0 < difference < 1e-2
    assert plan.precision == "bfloat16"


@pytest.mark.parametrize("backend", ["chunked", "numba"])
def test_both_forms_of_the_scan(backend, monkeypatch):
    if backend == "numba":
        pytest.importorskip("numba", reason="numba is not installed: the compiled scan is NOT TESTED")
    monkeypatch.setattr(plan_module, "CHUNK", 64)
    model = network(3)
    a, b = pair(40, 32, 56)
    plan = build_plan(model)
    plan.scan_backend = backend
    with torch.no_grad():
        torch.testing.assert_close(plan(a, b), model(a, b), atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    ("model", "first", "second", "box"),
    [
        ("mri-mri-3d", "brats/*/t2.nii.gz", "brats/*/flair.nii.gz", ((40, 104), (80, 176), (70, 166))),
        (
            "mri-mri-3d",
            "volumes/kirby21/t1.nii.gz",
            "volumes/kirby21/flair.nii.gz",
            ((88, 160), (88, 160), (45, 117)),
        ),
        ("mri-ct-2d", "aanlib/CT-MRI/MRI/*.png", "aanlib/CT-MRI/CT/*.png", ((0, 1), (0, 256), (0, 256))),
    ],
)
def test_real_volumes(shared_data, model, first, second, box):
    """The bundled weights on patients: the whole volumes take the module minutes, so a part of each."""
    paths = [sorted(shared_data.glob(pattern))[0] for pattern in (first, second)]
    volumes = [read_volume(path) for path in paths]
    arrays = [apply_window(v.array, choose_window(v)) for v in volumes]
    a, b = (torch.from_numpy(x[tuple(slice(*edge) for edge in box)].copy())[None, None] for x in arrays)
    if model.endswith("2d"):
        a, b = a[:, :, 0], b[:, :, 0]
    module = load_model(find_weights(model)[1])[0]
    with torch.no_grad():
        expected = module(a, b)
    assert expected.std() > 0.05
    assert (build_plan(module)(a, b) - expected).abs().max() < 1e-3
    if has_bfloat16(a.device):
        assert (build_plan(module, "bfloat16")(a, b) - expected).abs().max() < 1e-2


# ------------------------------------------------------------------------------------------------- layers


@pytest.mark.parametrize(("dimension", "size"), [(2, (40, 24)), (3, (16, 24, 32))])
def test_encoder_layers(dimension, size):
    model = network(dimension)
    plan = build_plan(model)
    a, b = pair(*size)
    sources = torch.cat([a, b])
    padded = nn.functional.pad(sources, [2, 2] * dimension)
    with torch.no_grad():
        stem = model.encoder[0][0](model.stem(sources))
        inside = padded[(..., *[slice(1, -1)] * dimension)]
        torch.testing.assert_close(plan.stem_down(inside), stem, atol=1e-5, rtol=0)
        box, shape = tuple((0, n // 2) for n in size), [n // 2 for n in size]
        block, same = plan.blocks[0](stem, box, shape)
        assert same == box
        torch.testing.assert_close(block, model.encoder[0][1](stem), atol=1e-5, rtol=0)
        # a tile that touches the lower edge of the first axis and the upper one of the last axis
        box = ((0, 6), *((2, n - 1) for n in shape[1:-1]), (3, shape[-1]))
        part = stem[(..., *(slice(low, high) for low, high in box))]
        block, inner = plan.blocks[0](part, box, shape)
        expected = model.encoder[0][1](stem)[(..., *(slice(low, high) for low, high in inner))]
        assert inner[0][0] == 0 and inner[-1][1] == shape[-1]
        torch.testing.assert_close(block, expected, atol=1e-5, rtol=0)
        plan.tile_bytes = 10_000
        deep = plan.encode(padded, size, nothing)
        torch.testing.assert_close(deep, torch.cat([model.encode(x)[1] for x in (a, b)]), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("dimension", "size"), [(2, (5, 4)), (3, (3, 4, 5))])
def test_upsampling_in_phases(dimension, size):
    model = network(dimension)
    plan = build_plan(model)
    x = torch.randn(2, 16, *size)
    with torch.no_grad():
        y = plan_module._interleave(plan.ups[0](nn.functional.pad(x, [1, 1] * dimension)), dimension)
        inside = y[(..., *[slice(1, -1)] * dimension)]
        torch.testing.assert_close(inside, model.decoder[0](x), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("dimension", "size"), [(2, (16, 24)), (3, (8, 16, 24))])
@pytest.mark.parametrize("cmca", [True, False])
def test_decoder_head_and_cmca(dimension, size, cmca):
    model = network(dimension, cmca=cmca)
    plan = build_plan(model)
    a, b = pair(*size, batch=2)
    padded = nn.functional.pad(torch.cat([a, b]), [2, 2] * dimension)
    tokens = torch.randn(2, 16, *(n // 8 for n in size))
    with torch.no_grad():
        features = model.decoder(tokens)
        weights = None
        if cmca:
            shallow_a, shallow_b = model.stem(a), model.stem(b)
            expected = torch.stack([model.cmca_ab.weights(shallow_b), model.cmca_ba.weights(shallow_a)])
            weights = plan.cmca.weights(padded, size)
            torch.testing.assert_close(weights.float(), expected, atol=1e-5, rtol=0)
            features = features + model.cmca_ab(shallow_a, shallow_b) + model.cmca_ba(shallow_b, shallow_a)
        expected = torch.sigmoid(model.head(features))
        torch.testing.assert_close(plan.decode(tokens, padded, weights, size, nothing), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dimension", [2, 3])
def test_mamba_layers(dimension):
    model = network(dimension)
    plan = build_plan(model)
    a, b = torch.randn(2, 2, 16, *(3, 4, 5)[:dimension])
    with torch.no_grad():
        got = plan.fuse_tokens(torch.cat([a, b]), nothing)
        torch.testing.assert_close(got, model.fuse_tokens(a, b), atol=1e-5, rtol=0)


# ----------------------------------------------------------------------------------------------- behaviour


def test_the_plan_keeps_its_weights_when_the_model_changes():
    model = network(2)
    a, b = pair(32, 32)
    plan = build_plan(model)
    before = plan(a, b)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert torch.equal(plan(a, b), before)


@pytest.mark.parametrize("tile_bytes", [2**30, 5000])
def test_progress_grows_to_one_and_stops_on_request(tile_bytes):
    plan = build_plan(network(3))
    plan.tile_bytes = tile_bytes
    a, b = pair(24, 32, 16)
    seen = []
    plan(a, b, seen.append)
    assert seen == sorted(seen) and seen[0] > 0 and seen[-1] == pytest.approx(1)
    if tile_bytes == 5000:
        assert len(seen) > 20

    def stop(fraction):
        raise Cancelled("enough")

    with pytest.raises(Cancelled):
        plan(a, b, stop)


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
@pytest.mark.parametrize(("stage", "index", "most"), [("blocks", 0, 2500), ("ups", 2, 400)])
def test_running_out_of_memory_halves_the_tile_and_goes_on(stage, index, most, error, monkeypatch):
    plan = build_plan(network(3))
    a, b = pair(32, 40, 24)
    whole = plan(a, b)
    usual = plan.tile_bytes
    monkeypatch.setattr(plan_module, "MIN_TILE_BYTES", 1)
    layers = list(getattr(plan, stage))
    original, refused, seen = layers[index], [], []

    def narrow(x, *args):
        if x[0, 0].numel() > most:
            refused.append(x.shape)
            raise error
        return original(x, *args)

    narrow.__dict__.update(original.__dict__)
    layers[index] = narrow
    monkeypatch.setattr(plan, stage, layers)
    torch.testing.assert_close(plan(a, b, seen.append), whole, atol=1e-6, rtol=0)
    assert refused and plan.tile_bytes < usual
    assert seen == sorted(seen) and seen[-1] == pytest.approx(1)


def test_tiles_that_cannot_be_halved_raise(monkeypatch):
    plan = build_plan(network(2))

    def full(*args):
        raise MemoryError

    full.__dict__.update(plan.ups[-1].__dict__)
    monkeypatch.setattr(plan, "ups", [*plan.ups[:-1], full])
    with pytest.raises(MemoryError):
        plan(*pair(32, 32))


def test_other_errors_are_not_taken_for_a_shortage(monkeypatch):
    plan, calls = build_plan(network(2)), []

    def broken(*args):
        calls.append(1)
        raise RuntimeError("a bug")

    broken.__dict__.update(plan.ups[-1].__dict__)
    monkeypatch.setattr(plan, "ups", [*plan.ups[:-1], broken])
    with pytest.raises(RuntimeError, match="a bug"):
        plan(*pair(32, 32))
    assert len(calls) == 1


def test_memory_needed_grows_with_batch_and_tiles():
    config = ModelConfig(dimension=3)
    shape = (160, 240, 240)
    one = memory_needed(config, shape)
    assert one < memory_needed(config, shape, 2)
    assert memory_needed(config, shape, 1, 2**20) < one
    # the bars: BraTS volumes in 1.5 GiB, clinical ones in 4 GiB
    assert memory_needed(config, shape) < 1.5 * 2**30
    assert memory_needed(config, (160, 512, 512)) < 4 * 2**30


def test_same_input_same_bytes():
    plan = build_plan(network(3))
    a, b = pair(24, 17, 30)
    assert torch.equal(plan(a, b), plan(a, b))


def test_bad_calls_are_refused():
    model = network(2)
    with pytest.raises(InputError, match="precision"):
        build_plan(model, "float8")
    with pytest.raises(InputError, match="two inputs of one shape"):
        build_plan(model)(torch.rand(1, 1, 8, 8), torch.rand(1, 1, 8, 16))
