"""Layer by layer, with the same weights, what nflows, normflows, zuko and FrEIA give."""

import pytest
import torch
from torch import nn

from fastgen.flows import (
    MADE,
    ActNorm,
    ActNormConv1x1,
    AdditiveCoupling,
    AffineAutoregressive,
    AffineCoupling,
    Compose,
    ConvNet,
    Inverse,
    Permutation,
    ResidualMLP,
    Spline,
    SplineAutoregressive,
    SplineCoupling,
    Squeeze,
)
from fastgen.ops import ScaleFn

from ..backends import import_peer
from .layers import shown

X = torch.randn(7, 6, generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(3, 4, 6, 6, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def same(ours, theirs, x, bound=1e-6):
    """Output and log-det of ``ours.forward`` and of ``theirs``, and ours back again."""
    y, log_det = ours(x)
    their_y, their_log_det = theirs(x)
    torch.testing.assert_close(y, their_y, rtol=bound, atol=bound)
    their_log_det = torch.as_tensor(their_log_det).expand(len(x))
    torch.testing.assert_close(log_det, their_log_det, rtol=10 * bound, atol=10 * bound)
    assert (ours.inverse(y)[0] - x).abs().max() <= 1e-5


class TestNflows:
    transforms = import_peer("nflows.transforms")
    MASK = (0, 1, 0, 1, 1, 0)
    LISTED = (1, 3, 4)

    def net(self, features_in, features_out):
        resnet = import_peer("nflows.nn.nets").ResidualNet
        return resnet(features_in, features_out, hidden_features=16, num_blocks=2)

    def test_affine_coupling(self):
        theirs = shown(self.transforms.AffineCouplingTransform(list(self.MASK), self.net))
        network = ResidualMLP(3, 6, hidden_features=16)
        network.load_state_dict(theirs.transform_net.state_dict())
        scale = ScaleFn("sigmoid", offset=2.0, eps=1e-3)
        ours = AffineCoupling(network, mask=self.LISTED, channels=6, scale_fn=scale, layout="shift_first")
        same(ours, theirs, X)

    def test_additive_coupling(self):
        theirs = shown(self.transforms.AdditiveCouplingTransform(list(self.MASK), self.net))
        network = ResidualMLP(3, 3, hidden_features=16)
        network.load_state_dict(theirs.transform_net.state_dict())
        same(AdditiveCoupling(network, mask=self.LISTED, channels=6), theirs, X)

    def test_spline_coupling(self):
        theirs = shown(
            self.transforms.PiecewiseRationalQuadraticCouplingTransform(
                list(self.MASK), self.net, num_bins=8, tails="linear", tail_bound=2.0
            )
        )
        network = ResidualMLP(3, 3 * 23, hidden_features=16)
        network.load_state_dict(theirs.transform_net.state_dict())
        ours = SplineCoupling(network, 6, mask=self.LISTED, spline=Spline(8, 2.0, scale=16**-0.5))
        same(ours, theirs, X, bound=4e-6)

    def test_masked_autoregressive(self):
        theirs = shown(self.transforms.MaskedAffineAutoregressiveTransform(6, 16, num_blocks=2))
        network = MADE(6, 2, hidden_features=16)
        network.load_state_dict(theirs.autoregressive_net.state_dict(), strict=False)
        same(AffineAutoregressive(network, 6, scale_fn="softplus"), theirs, X)

    def test_spline_autoregressive(self):
        transform = self.transforms.MaskedPiecewiseRationalQuadraticAutoregressiveTransform
        theirs = shown(transform(6, 16, num_bins=8, tails="linear", tail_bound=2.0, num_blocks=2))
        network = MADE(6, 23, hidden_features=16)
        network.load_state_dict(theirs.autoregressive_net.state_dict(), strict=False)
        same(
            SplineAutoregressive(network, 6, spline=Spline(8, 2.0)), theirs, X, bound=4e-6
        )  # unscaled, unlike couplings

    def test_actnorm_and_its_first_batch(self):
        theirs, ours = self.transforms.ActNorm(4), ActNorm(4)
        x = 3 + 2 * IMAGES
        torch.testing.assert_close(ours(x)[0], theirs(x)[0], rtol=1e-5, atol=1e-5)
        with torch.no_grad():
            ours.log_scale.copy_(theirs.log_scale)
            ours.shift.copy_(theirs.shift)
        same(ours, theirs, x)

    def test_squeeze_and_permutation(self):
        theirs = self.transforms.SqueezeTransform()
        same(Squeeze(), theirs, IMAGES)
        order = [2, 0, 3, 1]
        same(Permutation(order), self.transforms.Permutation(torch.tensor(order)), IMAGES)


class TestNormflows:
    """Its forward leads from the latent to data."""

    flows = import_peer("normflows").flows

    def test_glow_block(self):
        """Coupling, 1x1 convolution, actnorm in its forward; our step's inverse, and the other half is transformed."""
        theirs = shown(self.flows.GlowBlock(4, 8, use_lu=False))
        coupling, conv, norm = theirs.flows
        norm.data_dep_init_done.fill_(1)
        network = ConvNet(2, 4, hidden_channels=8)
        convs = [m for m in coupling.flows[1].param_map.net if isinstance(m, nn.Conv2d)]
        for mine, layer in zip((network.first, network.middle, network.last), convs, strict=True):
            mine.load_state_dict(layer.state_dict())
        scale = ScaleFn("sigmoid", offset=2.0, divide=True)
        step = Compose(
            [ActNormConv1x1(4), Inverse(AffineCoupling(network, scale_fn=scale, layout="interleaved"))]
        ).eval()
        linear = step.layers[0]
        with torch.no_grad():  # theirs: z = W x, then exp(s) z + t; ours from data: (x - t) exp(-s), then the inverse
            linear.log_scale.copy_(-norm.s.flatten())
            linear.shift.copy_((-norm.t * torch.exp(-norm.s)).flatten())
            linear.weight.copy_(conv.W)
        with torch.no_grad():
            z, log_det = step(IMAGES)
            their_z, their_log_det = theirs.inverse(IMAGES)
            torch.testing.assert_close(z, their_z, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(log_det, their_log_det, rtol=1e-5, atol=1e-4)
            x, log_det = step.inverse(their_z)
            their_x, their_log_det = theirs(their_z)
            torch.testing.assert_close(x, their_x, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("scale_map", ["exp", "sigmoid", "sigmoid_inv"])
    def test_affine_coupling_block(self, scale_map):
        net = shown(nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 6)))
        theirs = self.flows.AffineCouplingBlock(net, scale_map=scale_map)
        scale = {
            "exp": ScaleFn("exp"),
            "sigmoid": ScaleFn("sigmoid", offset=2.0, divide=True),
            "sigmoid_inv": ScaleFn("sigmoid", offset=2.0),
        }[scale_map]
        same(AffineCoupling(net, scale_fn=scale, layout="interleaved"), theirs, X)


class TestFreia:
    def test_all_in_one_block(self):
        modules = import_peer("FrEIA.modules")
        net = shown(nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 6)))
        theirs = modules.AllInOneBlock([(6,)], subnet_constructor=lambda a, b: net, global_affine_type="EXP")
        with torch.no_grad():
            theirs.global_scale.add_(0.3 * torch.randn(1, 6))
            theirs.global_offset.add_(0.3 * torch.randn(1, 6))
        norm = ActNorm(6, initialize=False)
        norm.load_state_dict({"log_scale": theirs.global_scale.detach()[0], "shift": theirs.global_offset.detach()[0]})
        coupling = AffineCoupling(net, scale_fn=ScaleFn("tanh", bound=2.0, gain=0.1))
        ours = Compose([coupling, norm, Permutation(theirs.w_perm.argmax(1))])

        def forward(x):
            (y,), log_det = theirs([x])
            return y, log_det

        same(ours, forward, X)


class TestZuko:
    def test_masked_autoregressive(self):
        zuko = import_peer("zuko.flows.autoregressive")
        theirs = shown(zuko.MaskedAutoregressiveTransform(6, hidden_features=(16, 16)))

        class Hyper(nn.Module):
            def forward(self, x):
                return theirs.hyper(x).unflatten(-1, (6, 2)).flip(-1).flatten(1)  # theirs is shift, scale

        transform = theirs()
        same(AffineAutoregressive(Hyper(), 6), lambda x: transform.call_and_ladj(x), X)
