"""Levels and splits: the two ways to a density agree, and images that cannot be squeezed or split are refused."""

import pytest
import torch

from fastgen.flows import ActNormConv1x1, Compose, Flow, MultiScale, Split, Squeeze, StandardNormal
from fastgen.models.glow import SplitPrior, TopPrior

from .layers import make


@pytest.mark.parametrize("name", ["MultiScale", "MultiScale without priors"])
def test_log_prob_is_that_of_the_latent(name):
    transform, x, _ = make(name)
    z, log_det = transform(x)
    base = StandardNormal((16,))
    torch.testing.assert_close(transform.log_prob(x), base.log_prob(z) + log_det, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(Flow(transform, base).log_prob(x), transform.log_prob(x))


def test_the_parts_of_the_latent():
    transform, x, _ = make("MultiScale without priors")
    assert transform.shapes((1, 4, 4)) == [(2, 2, 2), (8, 1, 1)]
    z, _ = transform(x)
    h, _ = transform.levels[0](x)
    assert torch.equal(z[:, :8], h[:, 2:].flatten(1))


def test_an_inverse_needs_the_shape():
    transform = MultiScale([Squeeze()], [])
    z = torch.randn(2, 16)
    with pytest.raises(ValueError, match="MultiScale: inverse needs the shape of the image"):
        transform.inverse(z)
    x, _ = transform.inverse(z, shape=(1, 4, 4))
    assert torch.equal(transform(x)[0], z)
    with pytest.raises(ValueError, match=r"MultiScale: latent must be \[N, 64\], got shape \(2, 16\)"):
        transform.inverse(z, shape=(1, 8, 8))


def test_a_context_a_level():
    class Channels(torch.nn.Module):
        def forward(self, kept, context):
            return context

    splits = [Split(2, 4, Channels()), Split(0, 8, TopPrior(8, None))]
    transform = MultiScale([Squeeze(), Squeeze()], splits, (1, 4, 4))
    x, context = torch.randn(2, 1, 4, 4), (torch.ones(2, 4, 2, 2), torch.zeros(2))
    z, _ = transform(x, context)
    h, _ = Squeeze()(x)
    torch.testing.assert_close(z[:, :8], ((h[:, 2:] - 1) / torch.e).flatten(1))
    torch.testing.assert_close(transform.inverse(z, context)[0], x)


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda: MultiScale([Squeeze()], [], (1, 5, 4)), r"level 0 cannot squeeze 5 x 4 by 2, for an image of shape \(1, 5, 4\)"),
        (lambda: MultiScale([Squeeze()], [Split(2, 6)], (1, 4, 4)), "level 0 gives 4 channels, its split takes 6"),
        (lambda: MultiScale([Squeeze()], [Split(2, 4)] * 2), "1 levels and 2 splits do not alternate"),
        (lambda: MultiScale([Squeeze()], [], (4, 4)), r"shape must be \[C, H, W\], got \(4, 4\)"),
        (lambda: Split(4, 4), r"Split: keep must be in \[0, C\) with C = 4, got 4"),
        (lambda: Split(2, 4)(torch.zeros(1, 3, 2, 2)), r"Split: input must be \[N, 4, \*\], got shape \(1, 3, 2, 2\)"),
        (lambda: Split(2, 4, SplitPrior(2, 3))(torch.zeros(1, 4, 2, 2)), r"Split: prior must give \[N, 4, \*\], got shape"),
        (lambda: Squeeze()(torch.zeros(1, 1, 3, 4)), "squeeze: factor must divide height and width"),
    ],
)  # fmt: skip
def test_errors(run, message):
    with pytest.raises(ValueError, match=message):
        run()


def test_a_singular_matrix_is_named():
    layer = ActNormConv1x1(3, initialize=False)
    with torch.no_grad():
        layer.weight.zero_()
    x = torch.randn(2, 3, 2, 2)
    with pytest.raises(ValueError, match=r"^ActNormConv1x1\(3\): .*weight of shape \(3, 3\) is singular"):
        layer.inverse(x)
    flow = Flow(MultiScale([Compose([layer])], [], (3, 2, 2)), StandardNormal((12,)))
    with pytest.warns(RuntimeWarning, match=r"layer 0 \(ActNormConv1x1\) of level 0 is singular$"):
        flow.log_prob(x)
