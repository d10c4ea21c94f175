"""D3PM: transitions, the posterior against Bayes by enumeration, and a toy distribution reproduced."""

import itertools
import math

import pytest
import torch

from fastgen.samplers.score import Discrete, sample_corruption

BETAS = torch.tensor([0.1, 0.3, 0.5, 0.7, 1.0], dtype=torch.float64)


def random_chain(k=4, levels=3):
    return Discrete(
        torch.rand(levels, k, k, generator=torch.Generator().manual_seed(5), dtype=torch.float64).softmax(2)
    )


CHAINS = {
    "uniform": Discrete.uniform(4, BETAS),
    "absorbing": Discrete.absorbing(4, BETAS),
    "random": random_chain(),
}


@pytest.mark.parametrize("name", CHAINS)
def test_posterior_is_bayes_by_enumeration(name):
    """All paths x0 -> ... -> x_t are weighed one by one; the posterior sums to 1 and matches."""
    chain = CHAINS[name]
    q, k, t = chain.transitions, 4, 3
    for x0, x_t in itertools.product(range(k), range(k)):
        joint = torch.zeros(k, dtype=torch.float64)
        for path in itertools.product(range(k), repeat=t - 1):  # x_1 .. x_{t-1}
            states = (x0, *path, x_t)
            weight = math.prod(q[i][states[i], states[i + 1]].item() for i in range(t))
            joint[path[-1]] += weight
        if joint.sum() == 0:
            continue
        found = chain.posterior_probs(torch.tensor([x_t]), torch.tensor([x0]), t)[0]
        assert found.sum().item() == pytest.approx(1.0, abs=1e-12)
        torch.testing.assert_close(found, joint / joint.sum(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", CHAINS)
def test_posterior_averages_over_x0(name):
    """With p(x0 | x_t) it is p(x_{t-1} | x_t) of the data, by Bayes over the whole chain."""
    chain, t = CHAINS[name], 2
    data = torch.tensor([0.4, 0.3, 0.3, 0.0], dtype=torch.float64)
    before, q, now = chain.cumulative[t - 1], chain.transitions[t - 1], chain.cumulative[t]
    x_t = torch.arange(4)
    of_x0 = data[:, None] * now  # [x0, x_t]
    of_previous = (data @ before)[:, None] * q  # [x_{t-1}, x_t]
    reached = of_previous.sum(0) > 0
    guess = (of_x0 / of_x0.sum(0)).T
    found = chain.posterior_probs(x_t, guess, t)[reached]
    torch.testing.assert_close(found, (of_previous / of_previous.sum(0)).T[reached], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["uniform", "absorbing"])
def test_reverse_chain_reproduces_a_toy_distribution(name):
    """Two correlated letters of three, with the true p(x0 | x_t) of each letter: the joint comes back as far as the
    factorised reverse can tell, the margins within 4.5 standard errors; with many levels the joint too."""
    levels, n = 60, 20000
    betas = 1 / torch.arange(levels, 0, -1, dtype=torch.float64)
    joint = torch.zeros(4, 4, dtype=torch.float64)  # the last category is the absorbing state, never in data
    joint[:3, :3] = torch.tensor([[0.30, 0.05, 0.05], [0.02, 0.25, 0.03], [0.10, 0.00, 0.20]])
    chain = Discrete.uniform(4, betas) if name == "uniform" else Discrete.absorbing(4, betas)

    def restorer(x, t):
        q = chain.cumulative[t[0]]
        weights = joint * q[:, x[:, 0]].T[:, :, None] * q[:, x[:, 1]].T[:, None]
        weights = weights / weights.sum((1, 2), keepdim=True)
        return torch.stack([weights.sum(2), weights.sum(1)], 1)

    x = sample_corruption(restorer, chain, (n, 2), seeds=torch.arange(n))
    found = torch.bincount(4 * x[:, 0] + x[:, 1], minlength=16).reshape(4, 4) / n
    for margin in (0, 1):
        truth = joint.sum(margin)
        allowed = 4.5 * (truth * (1 - truth) / n).sqrt()
        assert ((found.sum(margin) - truth).abs() <= allowed).all()
    # letters change independently within a step: a bias of the order of one over the levels
    assert ((found - joint).abs() <= 4.5 * (joint * (1 - joint) / n).sqrt() + 0.5 / levels).all()


def test_transition_matrices_of_the_paper():
    uniform, absorbing = Discrete.uniform(3, torch.tensor([0.3])), Discrete.absorbing(3, torch.tensor([0.3]), state=1)
    expected = torch.tensor([[0.8, 0.1, 0.1], [0.1, 0.8, 0.1], [0.1, 0.1, 0.8]], dtype=torch.float64)
    torch.testing.assert_close(uniform.transitions[0], expected, rtol=1e-6, atol=1e-6)
    expected = torch.tensor([[0.7, 0.3, 0.0], [0.0, 1.0, 0.0], [0.0, 0.3, 0.7]], dtype=torch.float64)
    torch.testing.assert_close(absorbing.transitions[0], expected, rtol=1e-6, atol=1e-6)
    chain = random_chain()
    torch.testing.assert_close(chain.cumulative[3], chain.transitions[0] @ chain.transitions[1] @ chain.transitions[2])


def test_corruption_has_its_frequencies():
    chain, n = random_chain(), 40000
    x0 = torch.arange(4).repeat_interleave(n // 4).reshape(n, 1)
    x = chain.corrupt(x0, 2, torch.randn(n, 1, generator=torch.Generator().manual_seed(0)))
    for start in range(4):
        found = torch.bincount(x[x0 == start], minlength=4) / (n // 4)
        truth = chain.cumulative[2][start]
        assert ((found - truth).abs() < 4.5 * (truth * (1 - truth) / (n // 4)).sqrt()).all()


def test_what_has_no_probability_is_never_drawn():
    """Also at the ends of the normals' range."""
    chain = Discrete(torch.tensor([[[0.0, 0.5, 0.5, 0.0]] * 4]))
    noise = torch.tensor([[-40.0, -6.66, 0.0, 6.66, 40.0]])
    drawn = chain.corrupt(torch.zeros(1, 5, dtype=torch.int64), 1, noise)[0]
    assert drawn.tolist() == [1, 1, 2, 2, 2]
    absorbing = Discrete.absorbing(4, BETAS)
    x_t = torch.tensor([[1, 3]])
    back = absorbing.posterior(x_t, torch.full((1, 2, 4), 0.25), 2, torch.zeros(1, 2))
    assert back[0, 0] == 1  # what is not masked stays
    assert torch.equal(absorbing.prior(torch.randn(2, 3)), torch.full((2, 3), 3))


X = torch.zeros(2, 3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: Discrete(torch.zeros(2, 3)), ValueError, r"transitions must be \[T, K, K\], got shape \(2, 3\)"),
        (lambda: Discrete(torch.ones(1, 2, 2)), ValueError, "rows of probabilities that sum to 1"),
        (lambda: Discrete.uniform(3, torch.tensor([1.5])), ValueError, r"betas must be \[T\] within \[0, 1\]"),
        (lambda: Discrete.absorbing(3, BETAS, state=3), ValueError, r"state must be in \[-3, 3\), got 3"),
        (lambda: CHAINS["uniform"].corrupt(X.float(), 1, X.float()), TypeError, "x0 must be int64 categories"),
        (lambda: CHAINS["uniform"].corrupt(X, 1, None), ValueError, "noise must be given"),
        (
            lambda: CHAINS["uniform"].posterior_probs(X, X.float(), 1),
            ValueError,
            r"x0_hat must be probabilities \(2, 3, 4\)",
        ),
        (lambda: CHAINS["uniform"].posterior_probs(X, X[:1], 1), ValueError, "x0_hat must have the shape"),
        (lambda: CHAINS["uniform"].posterior_probs(X, X, 6), ValueError, r"t must be in \[1, 5\], got 6"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
