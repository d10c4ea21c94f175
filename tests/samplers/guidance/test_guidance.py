"""Each guidance against its formula in float64, against diffusers' guiders, and inside the loop."""

import math

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastgen.samplers import (
    DDIM,
    AutoGuidance,
    ClassifierFreeGuidance,
    ClassifierGuidance,
    PerpNegGuidance,
    ProjectedGuidance,
    ZeroStarGuidance,
    sample,
)
from fastgen.samplers.guidance.base import Call

SHAPE = (3, 2, 4, 4)
COND, UNCOND, NEGATIVE = ({"y": torch.full((3,), v)} for v in (1.0, 0.2, -0.7))


class Model:
    def __init__(self, learned: bool = False) -> None:
        self.calls: list[int] = []
        self.learned = learned

    def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        self.calls.append(len(x))
        shift = y.to(x.dtype).reshape(-1, 1, 1, 1)
        out = torch.tanh(x) * (1 + shift) + 0.3 * shift * torch.sin(5 * x)
        return torch.cat([out, 0.1 * out + shift], 1) if self.learned else out


def inputs() -> tuple[Tensor, Tensor]:
    return torch.randn(SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(2)), torch.full((3,), 500)


def outputs(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(Model()(x, t, **side) for side in (COND, UNCOND, NEGATIVE))


def inner(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum((1, 2, 3), keepdim=True)


def test_classifier_free_gives_both_halves_to_the_kernel():
    x, t = inputs()
    guidance = ClassifierFreeGuidance(Model(), COND, UNCOND, 3.0)
    cond, uncond = guidance(x, t, Call(3, 10))
    expected = outputs(x, t)
    torch.testing.assert_close((cond, uncond), expected[:2])
    assert guidance.scale(Call(3, 10)) == 3.0


@pytest.mark.parametrize("phi", [0.3, 1.0])
def test_rescale(phi):
    from diffusers.guiders.guider_utils import rescale_noise_cfg

    x, t = inputs()
    cond, uncond, _ = outputs(x, t)
    expected = rescale_noise_cfg(uncond + 3 * (cond - uncond), cond, phi)
    result, none = ClassifierFreeGuidance(Model(), COND, UNCOND, 3.0, rescale=phi)(x, t)
    assert none is None
    torch.testing.assert_close(result, expected)


def test_interval_spares_the_unconditional_half():
    model = Model()
    guidance = ClassifierFreeGuidance(model, COND, UNCOND, 3.0, interval=(0.25, 0.75))
    sample(None, SHAPE, DDIM(), steps=9, seeds=[1, 2, 3], guidance=guidance, progress=False)
    assert model.calls == [3, 3, 6, 6, 6, 6, 6, 3, 3]


def test_zero_star():
    from diffusers import ClassifierFreeZeroStarGuidance

    x, t = inputs()
    cond, uncond, _ = outputs(x, t)
    s = inner(cond, uncond) / inner(uncond, uncond)
    guidance = ZeroStarGuidance(Model(), COND, UNCOND, 3.0, zero_init_calls=2)
    torch.testing.assert_close(guidance(x, t, Call(2, 10))[0], s * uncond + 3 * (cond - s * uncond))
    assert guidance(x, t, Call(1, 10))[0].eq(0).all()
    peer = ClassifierFreeZeroStarGuidance(guidance_scale=3.0, zero_init_steps=0)
    peer.set_state(step=5, num_inference_steps=10, timestep=torch.tensor(500))
    torch.testing.assert_close(guidance(x, t, Call(5, 10))[0], peer.forward(cond, uncond).pred, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("eta", "threshold", "momentum"), [(0.0, None, 0.0), (0.3, 2.0, 0.0), (0.2, 3.0, -0.5)])
def test_projected(eta, threshold, momentum):
    from diffusers.guiders.adaptive_projected_guidance import MomentumBuffer, normalized_guidance

    guidance = ProjectedGuidance(Model(), COND, UNCOND, 4.0, eta=eta, norm_threshold=threshold, momentum=momentum)
    for _ in range(2):  # the second trajectory begins anew
        buffer = MomentumBuffer(momentum)
        x, t = inputs()
        for i in range(3):
            cond, uncond, _ = outputs(x, t)
            # diffusers' original formulation adds w times the update to cond; the paper's weight is w - 1
            expected = normalized_guidance(
                cond, uncond, 3.0, buffer, eta, threshold or 0.0, use_original_formulation=True
            )
            torch.testing.assert_close(guidance(x, t, Call(i, 3))[0], expected)
            x = 0.5 * x + 0.1


def test_perp_neg():
    x, t = inputs()
    cond, uncond, negative = outputs(x, t)
    d, n = cond - uncond, negative - uncond
    expected = uncond + 3 * (d - 0.6 * (n - inner(n, d) / inner(d, d) * d))
    guidance = PerpNegGuidance(Model(), COND, UNCOND, [NEGATIVE], 3.0, weights=[0.6])
    torch.testing.assert_close(guidance(x, t)[0], expected)


def test_autoguidance():
    x, t = inputs()
    weak = Model()
    result, other = AutoGuidance(Model(), lambda x, t, y: 0.5 * weak(x, t, y), COND, 2.0)(x, t)
    cond = outputs(x, t)[0]
    torch.testing.assert_close((result, other), (cond, 0.5 * cond))


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction", "flow_prediction"])
def test_classifier_guidance_is_exact_for_gaussians(kind):
    """Data N(0, 1), label p(y|x0) = N(y; x0, s^2): the guided score at w = 1 is the posterior's, in closed form."""
    s2, y = 0.4, 0.9
    alpha, sigma = (0.7, 0.3) if kind == "flow_prediction" else (0.8, 0.6)
    variance = alpha**2 + sigma**2
    x, t = inputs()

    def to_output(x0: Tensor) -> Tensor:
        eps = (x - alpha * x0) / sigma
        return {
            "epsilon": eps, "sample": x0, "v_prediction": alpha * eps - sigma * x0, "flow_prediction": eps - x0,
        }[kind]  # fmt: skip

    def log_prob(x: Tensor, t: Tensor) -> Tensor:  # p(y | x) = N(y; E[x0 | x], Var[x0 | x] + s2)
        mean, spread = alpha * x / variance, sigma**2 / variance + s2
        return (-((y - mean) ** 2) / (2 * spread)).sum((1, 2, 3))

    prior = alpha * x / variance
    gain = (sigma**2 / variance) / (sigma**2 / variance + s2)
    posterior = prior + gain * (y - prior)
    guidance = ClassifierGuidance(lambda x, t: to_output(prior), log_prob, guidance_scale=1.0)
    result, _ = guidance(x, t, Call(0, 1, alpha, sigma, kind))
    torch.testing.assert_close(result, to_output(posterior))


def test_classifier_with_labels_in_the_loop():
    """Inside no_grad, and towards the class."""
    labels = torch.tensor([0, 1, 1])

    def classifier(x: Tensor, t: Tensor) -> Tensor:
        m = x.mean((1, 2, 3))
        return torch.stack([-m, m], 1) * 8

    guidance = ClassifierGuidance(lambda x, t: 0.9 * x, classifier, labels=labels, guidance_scale=4.0)
    out = sample(None, SHAPE, DDIM(clip_sample=False), steps=50, seeds=[1, 2, 3], guidance=guidance, progress=False)
    assert (classifier(out, labels).argmax(1) == labels).all() and not out.requires_grad


@pytest.mark.parametrize(
    "make",
    [
        lambda m: ClassifierFreeGuidance(m, COND, UNCOND, 3.0, rescale=0.5),
        lambda m: ZeroStarGuidance(m, COND, UNCOND, 3.0, zero_init_calls=0),
        lambda m: ProjectedGuidance(m, COND, UNCOND, 3.0, momentum=-0.5, norm_threshold=2.0),
        lambda m: PerpNegGuidance(m, COND, UNCOND, [NEGATIVE], 3.0),
        lambda m: ClassifierGuidance(m, lambda x, t: -x.square().sum((1, 2, 3)), COND, 2.0),
    ],
)
def test_learned_variance_passes_through_and_nothing_waits(make):
    class NoWaiting(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            assert "_local_scalar_dense" not in str(func) and "nonzero" not in str(func)
            return func(*args, **(kwargs or {}))

    x, t = inputs()
    with NoWaiting():
        learned = make(Model(learned=True))(x, t, Call(1, 10, 0.8, 0.6))[0]
        plain = make(Model())(x, t, Call(1, 10, 0.8, 0.6))[0]
    torch.testing.assert_close(learned[:, :2], plain)
    torch.testing.assert_close(learned[:, 2:], Model(learned=True)(x, t, **COND)[:, 2:])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ClassifierFreeGuidance(Model(), COND, {}, 3.0), "the same names"),
        (lambda: ClassifierFreeGuidance(Model(), COND, {"y": 1.0}, 3.0), "must be a tensor in both"),
        (lambda: ClassifierFreeGuidance(Model(), COND, UNCOND, 3.0, interval=(0.7, 0.2)), "interval must"),
        (lambda: ClassifierFreeGuidance(Model(), COND, UNCOND, 3.0, rescale=2.0), "rescale must"),
        (lambda: ProjectedGuidance(Model(), COND, UNCOND, 3.0, norm_threshold=0.0), "norm_threshold must"),
        (lambda: PerpNegGuidance(Model(), COND, UNCOND, [NEGATIVE], 3.0, weights=[1, 2]), "weights must be one"),
        (
            lambda: sample(None, SHAPE, steps=2, guidance=AutoGuidance(Model(), Model(), COND), guidance_scale=2.0),
            "has its own scale",
        ),
        (lambda: sample(None, SHAPE, steps=2), "model may be None only"),
        (
            lambda: ClassifierGuidance(lambda x, t: x, lambda x, t: x)(*inputs()),
            "log_prob must return",
        ),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_the_loop_scales_by_the_guidance():
    x, _ = inputs()
    common = {"steps": 4, "noise": x.float(), "progress": False}
    plain = sample(Model(), SHAPE, DDIM(), model_kwargs=COND, uncond_kwargs=UNCOND, guidance_scale=2.5, **common)
    given = sample(None, SHAPE, DDIM(), guidance=ClassifierFreeGuidance(Model(), COND, UNCOND, 2.5), **common)
    assert torch.equal(plain, given) and math.isfinite(float(plain.sum()))
