"""`affine_coupling` and `additive_coupling` against the layers of nflows, normflows, zuko and FrEIA, to 1e-6 in float32."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from fastgen.ops import ScaleFn, additive_coupling, affine_coupling

from ..backends import import_peer
from .numerics import randn

SHAPES = [(5, 8), (3, 6, 4, 5)]


class Fixed(nn.Module):
    """A conditioner that says the same whatever it is given."""

    def __init__(self, parameters: Tensor) -> None:
        super().__init__()
        self.parameters_ = parameters

    def forward(self, *_: object) -> Tensor:
        return self.parameters_


def tensors(shape: tuple[int, ...], channels: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """An input, and what its conditioner says in so many channels."""
    beside = (shape[0], channels, *shape[2:])
    return randn(*shape, seed=seed).float(), randn(*beside, seed=seed + 1).float()


def same(ours: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor | float]) -> None:
    (y, log_det), (expected, expected_log_det) = ours, theirs
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-6)
    expected_log_det = torch.as_tensor(expected_log_det, dtype=torch.float32).expand(log_det.shape)
    torch.testing.assert_close(log_det, expected_log_det, rtol=1e-6, atol=1e-6 * max(1, y[0].numel()) ** 0.5)


# nflows' own, and the general activation of its later versions, which the released one has in a comment.
NFLOWS = {
    "sigmoid": (lambda raw: torch.sigmoid(raw + 2) + 1e-3, ScaleFn("sigmoid", offset=2, eps=1e-3)),
    "softplus": (lambda raw: (softplus(raw) + 1e-3).clamp(0, 3), ScaleFn("softplus", eps=1e-3, bound=3)),
}


@pytest.mark.isa
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("activation", NFLOWS)
def test_nflows_affine(shape, activation):
    coupling = import_peer("nflows.transforms.coupling")
    x, parameters = tensors(shape, shape[1])
    layer = coupling.AffineCouplingTransform(torch.arange(shape[1]) % 2, lambda *_: Fixed(parameters))
    scale, fn = NFLOWS[activation]
    if activation == "softplus":
        half = shape[1] // 2
        layer._scale_and_shift = lambda p: (scale(p[:, half:]), p[:, :half])
    options = {"scale_fn": fn, "layout": "shift_first", "mask": layer.transform_features}
    same(affine_coupling(x, parameters, **options), layer(x))
    same(affine_coupling(x, parameters, **options, inverse=True), layer.inverse(x))


@pytest.mark.isa
@pytest.mark.parametrize("shape", SHAPES)
def test_nflows_additive(shape):
    coupling = import_peer("nflows.transforms.coupling")
    x, parameters = tensors(shape, shape[1] // 2)
    layer = coupling.AdditiveCouplingTransform(torch.arange(shape[1]) % 2, lambda *_: Fixed(parameters))
    for inverse, call in ((False, layer), (True, layer.inverse)):
        y, log_det = call(x)
        assert torch.equal(additive_coupling(x, parameters, mask=layer.transform_features, inverse=inverse), y)
        assert not log_det.any()


@pytest.mark.isa
def test_nflows_autoregressive():
    autoregressive = import_peer("nflows.transforms.autoregressive")
    layer = autoregressive.MaskedAffineAutoregressiveTransform(8, 16)
    x, parameters = tensors((5, 8), 16)
    options = {"scale_fn": "softplus", "layout": "interleaved_scale_first"}
    same(affine_coupling(x, parameters, **options), layer._elementwise_forward(x, parameters))
    same(affine_coupling(x, parameters, **options, inverse=True), layer._elementwise_inverse(x, parameters))


@pytest.mark.isa
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("name", "fn"), [("exp", "exp"), ("sigmoid", ScaleFn("sigmoid", offset=2, divide=True)), ("sigmoid_inv", "sigmoid")]
)
def test_normflows_affine(shape, name, fn):
    coupling = import_peer("normflows.flows.affine.coupling")
    x, parameters = tensors(shape, shape[1])
    block = coupling.AffineCouplingBlock(Fixed(parameters), scale_map=name)
    options = {"scale_fn": fn, "layout": "interleaved", "mask": "second_half"}
    same(affine_coupling(x, parameters, **options), block(x))
    same(affine_coupling(x, parameters, **options, inverse=True), block.inverse(x))


@pytest.mark.isa
@pytest.mark.parametrize("mask", ["checkerboard", "checkerboard_inverse"])
def test_normflows_masked(mask):
    coupling = import_peer("normflows.flows.affine.coupling")
    x, raw = tensors((3, 4, 5, 6), 4)
    shift = randn(3, 4, 5, 6, seed=7).float()
    odd = (torch.arange(5)[:, None] + torch.arange(6)) % 2
    kept = (odd if mask == "checkerboard" else 1 - odd).expand(4, 5, 6).float()
    layer = coupling.MaskedAffineFlow(kept, Fixed(shift), Fixed(raw))
    same(affine_coupling(x, raw, shift, mask=mask), layer(x))
    same(affine_coupling(x, raw, shift, mask=mask, inverse=True), layer.inverse(x))


@pytest.mark.isa
def test_normflows_autoregressive():
    autoregressive = import_peer("normflows.flows.affine.autoregressive")
    layer = autoregressive.MaskedAffineAutoregressive(8, 16)
    x, parameters = tensors((5, 8), 16)
    options = {"scale_fn": ScaleFn("sigmoid", offset=2, eps=1e-3), "layout": "interleaved_scale_first"}
    same(affine_coupling(x, parameters, **options), layer._elementwise_forward(x, parameters))
    same(affine_coupling(x, parameters, **options, inverse=True), layer._elementwise_inverse(x, parameters))


@pytest.mark.isa
def test_zuko():
    transforms = import_peer("zuko.transforms")
    x, raw = tensors((5, 8), 4)
    shift = randn(5, 4, seed=9).float()
    mask = torch.tensor([True, False, True, True, False, False, True, False])
    layer = transforms.CouplingTransform(
        lambda _: transforms.DependentTransform(transforms.MonotonicAffineTransform(shift, raw), 1), mask
    )
    options = {"scale_fn": "soft_clip", "mask": layer.idx_b}
    same(affine_coupling(x, raw, shift, **options), layer.call_and_ladj(x))
    same(affine_coupling(x, raw, shift, **options, inverse=True), layer.inv.call_and_ladj(x))


@pytest.mark.isa
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("clamp", "kind"), [("ATAN", "atan"), ("TANH", "tanh"), ("SIGMOID", "sigmoid_centered")])
def test_freia_one_sided(shape, clamp, kind):
    layers = import_peer("FrEIA.modules.coupling_layers")
    x, parameters = tensors(shape, shape[1])
    layer = layers.AffineCouplingOneSided(
        [shape[1:]], subnet_constructor=lambda *_: Fixed(parameters), clamp=2.0, clamp_activation=clamp
    )
    options = {"scale_fn": ScaleFn(kind, bound=2), "mask": "second_half"}
    for inverse in (False, True):
        (y,), log_det = layer((x,), rev=inverse)
        same(affine_coupling(x, parameters, **options, inverse=inverse), (y, log_det))


@pytest.mark.isa
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("block", ["GLOWCouplingBlock", "RNVPCouplingBlock", "GINCouplingBlock"])
def test_freia_blocks(shape, block):
    """Both halves, one after the other."""
    layers = import_peer("FrEIA.modules.coupling_layers")
    half = shape[1] // 2
    x, _ = tensors(shape, shape[1])
    said = iter(range(4))
    channels = half if block == "RNVPCouplingBlock" else shape[1]
    layer = getattr(layers, block)(
        [shape[1:]], subnet_constructor=lambda *_: Fixed(tensors(shape, channels, seed=10 + next(said))[1]), clamp=2.0
    )
    if block == "RNVPCouplingBlock":
        halves = {
            "first_half": (layer.subnet_s2.parameters_, layer.subnet_t2.parameters_),
            "second_half": (layer.subnet_s1.parameters_, layer.subnet_t1.parameters_),
        }
    else:
        halves = {"first_half": (layer.subnet2.parameters_,), "second_half": (layer.subnet1.parameters_,)}
    fn = ScaleFn("atan", bound=2, center="channels" if block == "GINCouplingBlock" else None)
    for inverse in (False, True):
        y, total = x, torch.zeros(len(x))
        for mask in ("second_half", "first_half") if inverse else ("first_half", "second_half"):
            y, log_det = affine_coupling(y, *halves[mask], scale_fn=fn, mask=mask, inverse=inverse)
            total = total + log_det
        (expected,), expected_log_det = layer((x,), rev=inverse)
        same((y, total), (expected, expected_log_det))


@pytest.mark.isa
@pytest.mark.parametrize("gin", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_freia_all_in_one(shape, gin):
    block = import_peer("FrEIA.modules.all_in_one_block")
    half = shape[1] // 2
    x, parameters = tensors((shape[0], half, *shape[2:]), 2 * half)
    layer = block.AllInOneBlock([shape[1:]], subnet_constructor=lambda *_: nn.Identity(), gin_block=gin)
    fn = ScaleFn("tanh", bound=2, gain=0.1, center="sample" if gin else None)
    for inverse in (False, True):
        expected = layer._affine(x, parameters.clone(), rev=inverse)  # which changes what its conditioner said
        same(affine_coupling(x, parameters, scale_fn=fn, inverse=inverse), expected)


@pytest.mark.isa
def test_later_freia_all_in_one():
    """The formula of versions behind the released one: 2 tanh(0.1 a / 2), the shift times 0.1."""
    x, parameters = tensors((5, 8), 16)
    raw, shift = (0.1 * parameters).chunk(2, 1)
    log = 2 * torch.tanh(raw / 2)
    fn = ScaleFn("soft_tanh", bound=2, gain=0.1)
    same(affine_coupling(x, parameters, scale_fn=fn), (x * torch.exp(log) + shift, log.sum(1)))
    same(affine_coupling(x, parameters, scale_fn=fn, inverse=True), ((x - shift) * torch.exp(-log), -log.sum(1)))
