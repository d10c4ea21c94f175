"""`InvertibleConv1x1`: both parametrisations, the inverse that is kept, singular matrices, and as a module."""

import copy
import pickle

import pytest
import torch
from torch import Tensor

from fastgen.nn import ActNorm, InvertibleConv1x1

KINDS = ("direct", "plu")


def images(seed: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(4, 12, 5, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def made(kind: str, **options) -> InvertibleConv1x1:
    """One whose matrix is no rotation."""
    module = InvertibleConv1x1(12, parametrization=kind, **options)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3))
    return module


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("actnorm", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_there_and_back(kind, actnorm, dtype):
    module, x = made(kind, dtype=dtype), images(dtype=dtype)
    norm = ActNorm(12, dtype=dtype) if actnorm else None
    y, log_det = module(x, actnorm=norm)
    z, of_norm = (x, 0.0) if norm is None else norm(x)
    torch.testing.assert_close(y, torch.einsum("oc,nchw->nohw", module.matrix(), z))
    expected = 30 * torch.linalg.slogdet(module.matrix().double()).logabsdet + of_norm
    torch.testing.assert_close(log_det, expected.to(dtype).expand(4))
    bound = 1e-12 if dtype == torch.float64 else 1e-5
    for mode in (torch.enable_grad, torch.no_grad):
        with mode():
            back, negative = module.inverse(y, actnorm=norm)
            assert (back - x).abs().max() <= bound and torch.equal(negative, -log_det)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_the_parameters(kind):
    module, x = made(kind, dtype=torch.float64), images(dtype=torch.float64)[:2, :, :2, :2]
    norm = ActNorm(12, dtype=torch.float64)
    norm(x)
    names = [name for name, _ in module.named_parameters()]

    def function(x, log_scale, *values):
        given = {**dict(zip(names, values, strict=True)), "norm.log_scale": log_scale}
        own = {name: value for name, value in given.items() if name in names}
        with torch.nn.utils.stateless._reparametrize_module(norm, {"log_scale": log_scale}):
            y, log_det = torch.func.functional_call(module, own, (x,), {"actnorm": norm})
        return y[:, :3], log_det

    leaves = [t.detach().clone().requires_grad_() for t in (x, norm.log_scale, *module.parameters())]
    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)


@pytest.mark.parametrize("kind", KINDS)
def test_the_kept_inverse_follows_the_parameters(kind):
    module, x = made(kind), images()
    with torch.no_grad():
        for _ in range(2):
            y, _ = module(x)
            assert (module.inverse(y)[0] - x).abs().max() <= 1e-5
            kept = module._inverse
            module.inverse(y)
            assert module._inverse is kept
            for parameter in module.parameters():
                parameter += 0.03
    module.load_state_dict(made(kind).state_dict())
    with torch.no_grad():
        assert (module.inverse(module(x)[0])[0] - x).abs().max() <= 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_a_matrix_that_is_given(kind):
    module, weight = InvertibleConv1x1(12, parametrization=kind), torch.randn(12, 12)
    module.set_weight(weight)
    torch.testing.assert_close(module.matrix(), weight, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"InvertibleConv1x1\(12\): weight is singular"):
        module.set_weight(torch.ones(12, 12))
    with pytest.raises(ValueError, match=r"weight must be \[C, C\] with C = 12, got shape \(3, 3\)"):
        module.set_weight(torch.eye(3))


def test_singular_matrices_name_the_layer():
    module = torch.nn.ModuleDict({"mix": InvertibleConv1x1(12)})
    state = module.state_dict() | {"mix.weight": torch.ones(12, 12)}
    with pytest.raises(RuntimeError, match=r"InvertibleConv1x1\(12\): mix.weight is singular"):
        module.load_state_dict(state)
    for mode in (torch.enable_grad, torch.no_grad):
        with mode(), pytest.raises(ValueError, match=r"InvertibleConv1x1\(12\): .*singular"):
            module["mix"].inverse(images())
    with pytest.raises(ValueError, match=r"parametrization must be one of \('direct', 'plu'\), got 'qr'"):
        InvertibleConv1x1(12, parametrization="qr")


@pytest.mark.parametrize("kind", KINDS)
def test_print_pickle_deepcopy_meta(kind):
    module, x = made(kind), images()
    with torch.no_grad():
        expected = module.inverse(module(x)[0])[0]
        for twin in (pickle.loads(pickle.dumps(module)), copy.deepcopy(module)):
            assert twin._inverse is None and torch.equal(twin.inverse(twin(x)[0])[0], expected)
    assert repr(module) == f"InvertibleConv1x1(12{'' if kind == 'direct' else ', parametrization=' + repr(kind)})"
    meta = InvertibleConv1x1(12, parametrization=kind, device="meta")
    assert meta(x.to("meta"))[0].shape == meta.inverse(x.to("meta"))[0].shape == x.shape
    meta.to_empty(device="cpu").load_state_dict(module.state_dict())
    assert torch.equal(meta(x)[0], module(x)[0])


@pytest.mark.parametrize("kind", KINDS)
def test_compiled(kind):
    torch._dynamo.reset()
    module, x = made(kind), images()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), module(x))


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_normflows(kind):
    flows = pytest.importorskip("normflows").flows
    torch.manual_seed(0)
    theirs, ours = flows.Invertible1x1Conv(12, use_lu=kind == "plu"), InvertibleConv1x1(12, parametrization=kind)
    ours.set_weight((theirs._assemble_W() if kind == "plu" else theirs.W).detach())
    x = images()
    for a, b in zip(ours(x), theirs.inverse(x), strict=True):  # normflows' inverse is towards the latents
        torch.testing.assert_close(a, b.expand(a.shape), rtol=1e-5, atol=1e-5)
    for a, b in zip(ours.inverse(x), theirs(x), strict=True):
        torch.testing.assert_close(a, b.expand(a.shape), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("parametrization", ["direct", "plu"])
def test_the_matrices_of_bfloat16_are_float32_or_as_they_are(parametrization):
    torch.manual_seed(0)
    layer = InvertibleConv1x1(6, parametrization=parametrization).bfloat16().requires_grad_(False)
    matrix, inverse = layer.matrix(), layer.inverse_matrix()
    assert matrix.dtype == (torch.bfloat16 if parametrization == "direct" else torch.float32)
    assert inverse.dtype == torch.float32
    torch.testing.assert_close(matrix.double() @ inverse.double(), torch.eye(6).double(), rtol=0, atol=1e-5)
