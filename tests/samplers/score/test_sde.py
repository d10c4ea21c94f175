"""Closed forms against numerical integration, and the wrappers against their formulas."""

import math

import pytest
import torch

from fastgen.samplers.score import VE, VP, SubVP, perturb, score_from_denoiser, score_from_noise

SDES = [VP(), VP(0.5, 3.0), VE(), VE(0.1, 4.0), SubVP(), SubVP(0.2, 5.0)]


@pytest.mark.parametrize("sde", SDES, ids=str)
def test_marginals_integrate_drift_and_diffusion(sde):
    """dm/dt = f m and dv/dt = 2 f v + g^2 from t = 0, by RK4 in steps of 1/4000."""
    mean, std = sde.marginal(0.0)
    assert mean == 1.0
    state, steps = (mean, std**2), 4000

    def slope(t, state):
        f, g = sde.drift_and_diffusion(t)
        return f * state[0], 2 * f * state[1] + g * g

    def moved(state, h, k):
        return tuple(a + h * b for a, b in zip(state, k, strict=True))

    for i in range(steps):
        t, h = i / steps, 1 / steps
        k1 = slope(t, state)
        k2 = slope(t + h / 2, moved(state, h / 2, k1))
        k3 = slope(t + h / 2, moved(state, h / 2, k2))
        k4 = slope(min(t + h, 1.0), moved(state, h, k3))
        state = tuple(a + h / 6 * (p + 2 * q + 2 * r + s) for a, p, q, r, s in zip(state, k1, k2, k3, k4, strict=True))
        if (i + 1) % 1000 == 0:
            mean, std = sde.marginal((i + 1) / steps)
            assert state[0] == pytest.approx(mean, rel=1e-9)
            assert state[1] == pytest.approx(std**2, rel=1e-6)


@pytest.mark.parametrize("sde", SDES, ids=str)
def test_transitions_compose(sde):
    for s, t, u in [(0.1, 0.4, 0.9), (0.0, 0.5, 1.0)]:
        (a1, g1), (a2, g2), (a, g) = sde.transition(s, t), sde.transition(t, u), sde.transition(s, u)
        assert a1 * a2 == pytest.approx(a, rel=1e-12)
        assert a2**2 * g1**2 + g2**2 == pytest.approx(g**2, rel=1e-9)


@pytest.mark.parametrize("sde", SDES, ids=str)
def test_tensors_of_times_give_what_floats_give(sde):
    times = [0.0, 0.3, 1.0]
    for function in (sde.marginal, sde.drift_and_diffusion):
        of_tensor = function(torch.tensor(times, dtype=torch.float64))
        for k in range(2):
            assert of_tensor[k].tolist() == pytest.approx([function(t)[k] for t in times], rel=1e-12)


def test_values_of_the_paper():
    assert VP().marginal(1.0)[0] == pytest.approx(math.exp(-5.025), rel=1e-12)
    assert VE().marginal(0.0)[1] == pytest.approx(0.01) and VE().marginal(1.0)[1] == pytest.approx(50.0)
    assert SubVP().marginal(0.5)[1] == pytest.approx(VP().marginal(0.5)[1] ** 2, rel=1e-12)
    assert VE().prior_std == 50.0 and VP().prior_std == SubVP().prior_std == 1.0


@pytest.mark.parametrize("sde", [VP(), VE()], ids=str)
def test_prior_log_prob_is_torchs(sde):
    x = torch.randn(4, 2, 3, dtype=torch.float64) * sde.prior_std
    expected = torch.distributions.Normal(0, sde.prior_std).log_prob(x).sum((1, 2))
    torch.testing.assert_close(sde.prior_log_prob(x), expected, check_dtype=False)


@pytest.mark.parametrize("sde", [VP(), VE(), SubVP()], ids=str)
def test_wrappers_give_the_conditional_score(sde):
    """With the true noise, or the true clean sample, the score is that of N(m x0, s^2)."""
    x0, noise = torch.randn(3, 2, 2, dtype=torch.float64), torch.randn(3, 2, 2, dtype=torch.float64)
    t = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    x = perturb(x0, t, noise, sde).requires_grad_()
    mean, std = (v.reshape(-1, 1, 1) for v in sde.marginal(t))
    (expected,) = torch.autograd.grad(torch.distributions.Normal(mean * x0, std).log_prob(x).sum(), x)
    torch.testing.assert_close(score_from_noise(lambda x, t: noise, sde)(x.detach(), t), expected)
    torch.testing.assert_close(score_from_denoiser(lambda x, t: x0, sde)(x.detach(), t), expected)


def test_frozen_and_comparable():
    assert VP() == VP(0.1, 20) and hash(VE()) == hash(VE()) and VP() != SubVP()
    with pytest.raises(AttributeError):
        VP().beta_min = 1.0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: VP(2.0, 1.0), "VP: the betas must satisfy .* beta_min=2.0"),
        (lambda: SubVP(-1.0), "SubVP: the betas"),
        (lambda: VE(0.0), "VE: the sigmas must satisfy .* sigma_min=0.0"),
        (lambda: VE(2.0, 1.0), "VE: the sigmas"),
        (lambda: VP().marginal(1.5), r"t must be in \[0, 1.0\], got 1.5"),
        (lambda: VE().drift_and_diffusion(-0.1), r"t must be in"),
        (lambda: VP().transition(0.5, 0.2), "s must not be after t"),
        (lambda: perturb(torch.zeros(2, 3), torch.zeros(2), torch.zeros(2), VP()), "noise must have the shape"),
        (lambda: perturb(torch.zeros(2, 3), torch.zeros(3), torch.zeros(2, 3), VP()), "t must be one a sample"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
