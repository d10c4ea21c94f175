"""`TarFlow`: ml-tarflow's weights give its results; densities, both directions, guidance, iteration, files."""

import copy
import math
import pickle

import pytest
import torch
from torch import Tensor

from fastgen.flows import CausalTransformerFlow, GaussSeidelJacobi, Guidance, Passes
from fastgen.models import TarFlow

from . import foreign_tarflow as published

LABELS = torch.tensor([2, 0, -1])
# Sizes of the published model, and the patch.
CONFIGS = {
    "gray": {},
    "labels": {"classes": 3, "layers": 2},
    "colors": {"in_channels": 3, "image_size": 6, "patch_size": 2, "channels": 128, "blocks": 3},
    "volumes kept, labels": {"nvp": False, "classes": 3, "image_size": 6},
    "one patch": {"image_size": 2},
    "narrow": {"expansion": 1, "in_channels": 3, "image_size": 8, "patch_size": 4},
}


def make(
    name: str, dtype: torch.dtype = torch.float64
) -> tuple[dict[str, Tensor], TarFlow, Tensor, Tensor | None, int]:
    """Published weights, our model of them, images, labels and the size of a patch."""
    config = CONFIGS[name]
    state = published.make_state(**config, dtype=dtype)
    channels, size = config.get("in_channels", 1), config.get("image_size", 4)
    x = torch.randn(3, channels, size, size, generator=torch.Generator().manual_seed(1)).to(dtype)
    labels = LABELS if config.get("classes") else None
    return state, TarFlow.from_state_dict(state), x, labels, config.get("patch_size", 2)


def noise_of(model: TarFlow, n: int = 3) -> Tensor:
    return torch.randn((n, *model.base.shape), generator=torch.Generator().manual_seed(2), dtype=torch.float64)


@pytest.mark.parametrize("name", CONFIGS)
def test_published_weights_give_published_results(name):
    state, model, x, labels, patch = make(name)
    expected, mean_log_det = published.forward(state, x, labels, patch)
    outputs, log_det = model.trace(x, labels)
    close(outputs, expected)
    close(log_det, mean_log_det * x[0].numel())
    close(model(x, labels), (expected[-1], mean_log_det * x[0].numel()))
    close(model.loss(x, labels), published.loss(expected, mean_log_det))


@pytest.mark.parametrize("name", CONFIGS)
def test_the_inverse_is_published_too(name):
    state, model, _, labels, patch = make(name)
    noise = noise_of(model)
    with torch.no_grad():
        x, log_det = model.inverse(noise * state["var"].sqrt(), labels)
        close(x, published.reverse(state, noise, labels, patch))
        z, forward_log_det = model(x, labels)
    close(z, noise * state["var"].sqrt())
    close(log_det, -forward_log_det)


GUIDED = [
    ({"guidance": 1.3}, Guidance(1.3)),
    ({"guidance": 2.0, "guided": "a"}, Guidance(2.0, shift=False)),
    ({"guidance": 2.0, "guided": "b", "annealed": True}, Guidance(2.0, log_scale=False, annealed=True)),
    (
        {"guidance": 1.0, "attention_temperature": 0.6, "annealed": True},
        Guidance(1.0, annealed=True, attention_temperature=0.6),
    ),
    ({}, Guidance(0.0, attention_temperature=0.5)),
]


@pytest.mark.parametrize("way", ["one call", "layers", "iteration"])
@pytest.mark.parametrize("case", range(len(GUIDED)))
@pytest.mark.parametrize("name", ["labels", "volumes kept, labels"])
def test_guidance(name, case, way):
    state, model, _, labels, patch = make(name)
    theirs, ours = GUIDED[case]
    noise = noise_of(model)
    expected = published.reverse(state, noise, labels, patch, **theirs)
    jacobi = GaussSeidelJacobi(segments=2, tolerance=0.0) if way == "iteration" else None
    with torch.set_grad_enabled(way == "layers"):
        close(model.inverse(noise * state["var"].sqrt(), labels, guidance=ours, jacobi=jacobi)[0], expected)


@pytest.mark.parametrize("name", CONFIGS)
def test_in_float32(name):
    state, model, x, labels, patch = make(name, torch.float32)
    exact = {key: t.double() for key, t in state.items()}
    noise = noise_of(model)
    with torch.no_grad():
        z, _ = model(x, labels)
        images, _ = model.inverse(noise.float() * state["var"].sqrt(), labels)
        back, _ = model.inverse(z, labels)
    torch.testing.assert_close(
        z.double(), published.forward(exact, x.double(), labels, patch)[0][-1], rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(images.double(), published.reverse(exact, noise, labels, patch), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(back, x, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["gray", "labels", "volumes kept, labels"])
def test_the_log_det_is_that_of_the_jacobian(name):
    _, model, x, labels, _ = make(name)
    _, log_det = model(x, labels)
    for n in range(len(x)):
        own = None if labels is None else labels[n : n + 1]
        jacobian = torch.autograd.functional.jacobian(lambda y, own=own: model(y[None], own)[0].flatten(), x[n])
        expected = torch.linalg.slogdet(jacobian.flatten(1))[1]
        torch.testing.assert_close(log_det[n], expected, rtol=1e-9, atol=1e-9)


def test_log_prob_is_a_normal_density_and_the_log_det():
    state, model, x, labels, _ = make("volumes kept, labels")
    z, log_det = model(x, labels)
    normal = torch.distributions.Normal(0, state["var"].sqrt())
    close(model.log_prob(x, labels), normal.log_prob(z).sum((1, 2)) + log_det)


def test_gradients_reach_everything():
    _, model, x, labels, _ = make("labels")
    model.loss(x, labels).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    parameters = [model.blocks[0].proj_in.weight, model.blocks[1].attn_blocks[0].attention.qkv.weight]
    for parameter in parameters:
        direction = torch.randn_like(parameter)
        with torch.no_grad():
            parameter += 1e-6 * direction
            high = model.loss(x, labels)
            parameter -= 2e-6 * direction
            low = model.loss(x, labels)
            parameter += 1e-6 * direction
        torch.testing.assert_close((parameter.grad * direction).sum(), (high - low) / 2e-6, rtol=1e-5, atol=1e-9)


def test_the_inverse_can_be_differentiated():
    """Token after token by the layers: their gradients are those of the inverse of the Jacobian."""
    _, model, x, labels, _ = make("labels")
    z = model(x, labels)[0].detach().requires_grad_()
    back, log_det = model.inverse(z, labels)
    close(back, x)
    direction = torch.randn_like(x)
    (gradient,) = torch.autograd.grad((back * direction).sum(), z, retain_graph=True)
    y = x.clone().requires_grad_()
    (through,) = torch.autograd.grad(model(y, labels)[0], y, gradient)
    close(through, direction)
    log_det.sum().backward()
    assert model.blocks[0].proj_out.weight.grad.abs().sum() > 0


def test_ways_back_are_one():
    """One call, layer by layer over a cache, and passes until nothing changes."""
    _, model, _, labels, _ = make("labels")
    z = noise_of(model)
    with torch.no_grad():
        expected = model.inverse(z, labels)
        for segments in (1, 2, 3, 7):
            close(model.inverse(z, labels, jacobi=GaussSeidelJacobi(segments, tolerance=0.0)), expected)
    close(model.inverse(z, labels), expected)


def test_iteration_tells_its_passes_and_keeps_its_tolerance():
    config = {"image_size": 16, "classes": 3}
    model = TarFlow.from_state_dict(published.make_state(**config))
    z = noise_of(model)
    with torch.no_grad():
        expected, _ = model.inverse(z, LABELS)
        for guess in ("latent", "zeros"):
            errors, counts = [], []
            for tolerance in (1e-2, 1e-5, 1e-9):
                passes: list[Passes] = []
                options = GaussSeidelJacobi(4, tolerance=tolerance, guess=guess)
                x, _ = model.inverse(z, LABELS, jacobi=options, passes=passes)
                errors.append(float((x - expected).abs().max()))
                counts.append(sum(p.total for p in passes))
                assert len(passes) == 2
                for p in passes:
                    assert sum(p.tokens) == 63 and len(p.tokens) == 4
                    assert all(c <= tolerance or n == t for c, n, t in zip(p.change, p.passes, p.tokens, strict=True))
            assert counts[0] < counts[1] < counts[2] < 2 * 63
            assert errors[0] > errors[1] > errors[2]
            assert all(e <= 100 * t for e, t in zip(errors, (1e-2, 1e-5, 1e-9), strict=True))


def test_iteration_of_some_blocks():
    _, model, _, labels, _ = make("labels")
    z, passes = noise_of(model), []
    with torch.no_grad():
        x, _ = model.inverse(z, labels, jacobi={1: GaussSeidelJacobi(tolerance=0.0)}, passes=passes)
        close(x, model.inverse(z, labels)[0])
        few: list[Passes] = []
        model.inverse(z, labels, jacobi=GaussSeidelJacobi(max_passes=1), passes=few)
    assert len(passes) == 1 and [p.passes for p in few] == [[1], [1]]


def test_samples_depend_on_their_seeds_alone():
    _, model, _, labels, _ = make("labels", torch.float32)
    together = model.sample(3, labels, seeds=[5, 6, 7])
    for n, seed in enumerate((5, 6, 7)):
        alone = model.sample(1, labels[n : n + 1], seeds=[seed])
        assert torch.equal(alone[0], together[n])
    assert not torch.equal(model.sample(3, labels, seeds=[5, 6, 8])[2], together[2])
    torch.manual_seed(0)
    first = model.sample(3, labels)
    torch.manual_seed(0)
    assert torch.equal(model.sample(3, labels), first)


def test_temperature():
    """At 0 all samples of a label are that of the latent 0."""
    _, model, _, labels, _ = make("labels")
    x = model.sample(3, labels, seeds=[1, 2, 3], temperature=0.0)
    with torch.no_grad():
        close(x, model.inverse(torch.zeros(3, *model.base.shape).double(), labels)[0])


def test_samples_are_denoised_by_the_score():
    _, model, _, labels, _ = make("labels")
    noisy = model.sample(3, labels, seeds=[1, 2, 3])
    x = noisy.clone().requires_grad_()
    (score,) = torch.autograd.grad(model.log_prob(x, labels).sum(), x)
    close(model.denoise(noisy, 0.3, labels), noisy + 0.09 * score)
    close(model.sample(3, labels, seeds=[1, 2, 3], noise_std=0.3), noisy + 0.09 * score)
    # as published, where the prior is a standard normal: a step against the loss of the batch
    model.base.variance.fill_(1)
    x = noisy.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model.loss(x, labels), x)
    close(model.denoise(noisy, 0.3, labels), noisy - 0.09 * noisy.numel() * gradient)
    assert all(p.grad is None for p in model.parameters())


def test_the_prior_follows_the_latents():
    _, model, x, labels, _ = make("volumes kept, labels")
    before, (z, _) = model.base.variance.clone(), model(x, labels)
    model.update_prior(z)
    close(model.base.variance, 0.9 * before + 0.1 * z.square().mean(0))


def test_a_new_model_is_nearly_the_identity():
    model = TarFlow(1, 4, 2, 64, num_blocks=2, layers_per_block=1)
    for block in model.blocks:
        torch.nn.init.zeros_(block.proj_out.bias)
    x = torch.randn(2, 1, 4, 4)
    z, log_det = model(x)
    assert torch.equal(z, model.patches(x)) and not log_det.any()


def test_patches():
    x = torch.randn(2, 3, 6, 6)
    model = TarFlow(3, 6, 2, 64, num_blocks=1, layers_per_block=1)
    assert torch.equal(model.patches(x), published.to_patches(x, 2))
    assert torch.equal(model.image(model.patches(x)), x)


def test_files(tmp_path):
    _, model, x, labels, _ = make("labels", torch.float32)
    model.save(tmp_path / "model.safetensors")
    for other in (
        TarFlow.load(tmp_path / "model.safetensors"),
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        TarFlow.from_state_dict(model.state_dict()),
    ):
        assert other.config == model.config
        assert torch.equal(other.log_prob(x, labels), model.log_prob(x, labels))
        assert torch.equal(other.sample(2, labels[:2], seeds=[1, 2]), model.sample(2, labels[:2], seeds=[1, 2]))


def test_config_of_published_weights():
    _, model, *_ = make("colors")
    assert model.config == {
        "in_channels": 3, "image_size": 6, "patch_size": 2, "channels": 128, "num_blocks": 3, "layers_per_block": 1,
        "nvp": True, "num_classes": None, "head_channels": 64, "expansion": 4,
    }  # fmt: skip


def test_on_the_meta_device():
    with torch.device("meta"):
        model = TarFlow()
        z, log_det = model(torch.zeros(2, 3, 64, 64))
        x, _ = TarFlow(1, 4, 2, 64, num_blocks=1, layers_per_block=1).inverse(torch.zeros(2, 4, 4))
    assert (z.shape, log_det.shape, x.shape) == ((2, 1024, 12), (2,), (2, 1, 4, 4))
    assert "CausalTransformerFlow" in str(model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    state, model, x, labels, patch = make("labels", torch.float32)
    model.to(dtype)
    z, log_det = model(x.to(dtype), labels)
    exact, _ = published.forward(
        {k: t.to(dtype).double() for k, t in state.items()}, x.to(dtype).double(), labels, patch
    )
    assert (z.dtype, log_det.dtype) == (dtype, torch.float32)
    torch.testing.assert_close(z.double(), exact[-1], rtol=0.1, atol=0.1)
    assert model.sample(3, labels, seeds=[1, 2, 3]).dtype == dtype


def test_compiled():
    _, model, x, labels, _ = make("labels", torch.float32)
    compiled = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(compiled(x, labels), model(x, labels))


def test_a_dozen_steps_of_training_raise_the_likelihood():
    torch.manual_seed(0)
    model = TarFlow(1, 4, 2, 64, num_blocks=2, layers_per_block=1, num_classes=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    x = torch.randn(64, 1, 4, 4).cumsum(3) * 0.3
    labels = torch.arange(64) % 2
    before = model.log_prob(x, labels).mean()
    for _ in range(12):
        optimizer.zero_grad()
        model.loss(x, labels).backward()
        optimizer.step()
    after = model.log_prob(x, labels).mean()
    assert after > before + 1
    torch.testing.assert_close(model.loss(x, labels), -after / 16 - 0.5 * math.log(2 * math.pi), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: TarFlow(3, 7, 2), "patch_size must divide image_size, got 2 and 7"),
        (lambda m: TarFlow(3, 8, 2, 100), "head_channels must divide channels, got 64 and 100"),
        (lambda m: TarFlow(num_blocks=0), "num_blocks must be a positive integer, got 0"),
        (lambda m: CausalTransformerFlow(4, 4, 100), "channels must be a multiple of head_channels, got 100 and 64"),
        (lambda m: m(torch.zeros(2, 1, 4, 5)), r"x must be floating, \[N, 1, 4, 4\]"),
        (lambda m: m(torch.zeros(2, 1, 4, 4), torch.tensor([0, 3])), "labels .* below 3, got torch.int64"),
        (lambda m: m(torch.zeros(2, 1, 4, 4), torch.zeros(2)), "labels .* below 3, got torch.float32"),
        (lambda m: m.inverse(torch.zeros(2, 4, 5)), r"z must be \[N, 4, 4\], got \(2, 4, 5\)"),
        (lambda m: m.inverse(torch.zeros(2, 4, 4), torch.tensor([1])), r"labels \[N\] = \[2\], got \(1,\)"),
        (lambda m: m.sample(2, seeds=[1]), r"seeds must be \[n\] = \[2\]"),
        (lambda m: m.sample(2, temperature=-1.0), "temperature must be finite and not negative"),
        (lambda m: m.denoise(torch.zeros(2, 1, 4, 4), -1.0), "noise_std must be finite and not negative"),
        (lambda m: Guidance(-1.0), "scale must be finite and not negative"),
        (lambda m: Guidance(1.0, attention_temperature=0.0), "attention_temperature must be finite and positive"),
        (lambda m: GaussSeidelJacobi(0), "segments must be at least 1, got 0"),
        (lambda m: GaussSeidelJacobi(tolerance=-1.0), "tolerance must be finite and not negative"),
        (lambda m: GaussSeidelJacobi(guess="ones"), "guess must be 'latent' or 'zeros', got 'ones'"),
    ],
)
def test_errors(call, message):
    model = TarFlow(1, 4, 2, 64, num_blocks=1, layers_per_block=1, num_classes=3)
    with pytest.raises(ValueError, match=message):
        call(model)


def test_a_model_without_classes_takes_none():
    model = TarFlow(1, 4, 2, 64, num_blocks=1, layers_per_block=1)
    with pytest.raises(ValueError, match="context must be None for a model without classes"):
        model(torch.zeros(2, 1, 4, 4), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="guidance is for a model with classes"):
        model.sample(2, guidance=Guidance(1.0))


def close(actual: object, expected: object) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
