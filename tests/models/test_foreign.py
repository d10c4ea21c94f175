"""State dicts of public ports: each loads unchanged, tells its sizes, and is the same function, in float64 to rounding."""

import copy

import pytest
import torch
import torch.nn.functional as F

from fastgen.models import GatedPixelCNN, PixelCNN, PixelCNNPlusPlus, PixelSNAIL
from fastgen.ops import logistic_mixture

from ..modules import max_difference, randomize
from . import foreign_pixel_cnn_pp as pp
from . import foreign_pytorch_generative as pg
from . import foreign_uva_tutorial as uva

ROUNDING = 1e-12  # sums of at most some hundred terms, layer after layer, of values of order 1
PORTS = {
    "pixel_cnn": (
        PixelCNN,
        lambda: pg.PixelCNN(1, 1, 3, 4, 5),
        {"channels": 8, "num_blocks": 3, "distribution": "bernoulli"},
    ),
    "pixel_cnn_levels": (PixelCNN, lambda: pg.PixelCNN(1, 6, 2, 4, 5), {"distribution": "categorical", "levels": 6}),
    "gated": (GatedPixelCNN, lambda: pg.GatedPixelCNN(1, 1, 2, 6, 5), {"channels": 6, "head_channels": 5, "levels": 2}),
    "gated_two_channels": (GatedPixelCNN, lambda: pg.GatedPixelCNN(2, 2, 2, 6, 5), {"in_channels": 2}),
    "snail": (PixelSNAIL, lambda: pg.PixelSNAIL(1, 1, 6, 2, 2, 3, 5), {"num_residual": 2, "key_channels": 3}),
}


def weights(port, seed=0):
    """The port with random weights, masked ones too, in float64; its state, with the shape buffers of a model in use."""
    randomize(port, seed).double().eval()
    for name, parameter in port.named_parameters():
        if name.endswith("weight_g"):
            parameter.data.abs_().add_(0.5)
    return port


@pytest.mark.parametrize("name", PORTS)
def test_pytorch_generative(name):
    cls, make, sizes = PORTS[name]
    port = weights(make())
    model = cls.from_state_dict(port.state_dict())
    assert model.config.items() >= sizes.items()
    x = torch.randint(2, (3, model.in_channels, 9, 8), generator=torch.Generator().manual_seed(0)).double()
    with torch.no_grad():
        expected = port(x)
        state = port.state_dict()
        assert "_c" in state and (cls is GatedPixelCNN or any(key.endswith("mask") for key in state))
        fresh = cls.from_config(model.config).double().eval()
        assert fresh.load_state_dict(state).missing_keys == []
        for ours in (model, fresh):
            result = ours(2 * x - 1)
            assert expected.std() > 0.02 and max_difference(result.reshape(expected.shape), expected) <= ROUNDING
        if model.distribution == "bernoulli":
            nats = -F.binary_cross_entropy_with_logits(expected, x, reduction="none").sum((1, 2, 3))
            assert max_difference(model.log_prob(2 * x - 1), nats) <= 1e-10


@pytest.mark.parametrize(("channels", "dilations"), [(1, uva.DILATIONS), (2, (1, 3))])
def test_the_uva_tutorial(channels, dilations):
    port = weights(uva.PixelCNN(channels, 6, dilations))
    options = {} if len(dilations) == 7 else {"dilations": dilations}
    model = GatedPixelCNN.from_state_dict(port.state_dict(), **options)
    assert (
        model.config.items()
        >= {"dilations": list(dilations), "channels": 6, "levels": 256, "unit_range": False}.items()
    )
    levels = torch.randint(256, (2, channels, 9, 8), generator=torch.Generator().manual_seed(0))
    x = levels.double() / 255 * 2 - 1
    with torch.no_grad():
        expected = port(levels)
        assert expected.std() > 0.1 and max_difference(model(x), expected) <= ROUNDING
        nats = -F.cross_entropy(expected, levels, reduction="none").sum((1, 2, 3))
        assert max_difference(model.log_prob(x), nats) <= 1e-10
        assert torch.equal(model.indices(x), levels) and torch.equal(model.indices(x.float()), levels)


@pytest.mark.filterwarnings("ignore:.*weight_norm")
@pytest.mark.parametrize("channels", [1, 3])
def test_pixel_cnn_pp(channels):
    port = weights(pp.PixelCNN(2, 4, 3, channels))
    model = PixelCNNPlusPlus.from_state_dict({f"module.{key}": value for key, value in port.state_dict().items()})
    assert model.config.items() >= {"in_channels": channels, "channels": 4, "num_resnet": 2, "mixtures": 3}.items()
    levels = torch.randint(256, (2, channels, 8, 12), generator=torch.Generator().manual_seed(0))
    levels[0, :, :3], levels[1, :, :2] = 0, 255
    x = levels.double() / 127.5 - 1
    with torch.no_grad():
        expected = port(x)
        result = model(x)
        assert expected.std() > 0.1 and max_difference(result, expected) <= ROUNDING
        plain = copy.deepcopy(model)
        plain.load_state_dict(port.state_dict())
        assert torch.equal(plain(x), result)
        logits = (
            0.3 * result / result.abs().max()
        )  # so that no value is so unlikely that either formula loses it to rounding
        nats = [
            sum(pp.loss_of_a_pixel(logits[n, :, i, j], x[n, :, i, j].tolist()) for i in range(8) for j in range(12))
            for n in range(2)
        ]
        ours = logistic_mixture(logits, x, levels=256)
        assert max_difference(ours, torch.tensor(nats, dtype=torch.float64)) <= 1e-9 * ours.abs().max()
        assert torch.equal(model.log_prob(x), -logistic_mixture(result, x, levels=256))


def test_what_a_port_does_not_have_is_named():
    port = weights(pg.GatedPixelCNN(1, 1, 2, 6, 5))
    state = port.state_dict()
    del state["_gated_layers.1._link.bias"]
    model = GatedPixelCNN.from_state_dict(port.state_dict())
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "layers.1.link.bias"'):
        model.load_state_dict(state)
    with pytest.raises(RuntimeError, match=r'Unexpected key\(s\) in state_dict: "_tail.weight"'):
        model.load_state_dict({**port.state_dict(), "_tail.weight": torch.zeros(1)})


def test_a_model_inside_another_module():
    port = weights(pg.PixelCNN(1, 1, 2, 4, 5))
    model = PixelCNN.from_state_dict(port.state_dict())
    outer = torch.nn.Sequential(PixelCNN.from_config(model.config).double())
    outer.load_state_dict({f"0.{key}": value for key, value in port.state_dict().items()})
    x = torch.ones(1, 1, 5, 5, dtype=torch.float64)
    assert torch.equal(outer(x), model(x))
