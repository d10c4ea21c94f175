"""`diffusion_loss`, forward and backward, beside eager and compiled torch: the squared error of epsilon and of v, and the hybrid
loss of guided-diffusion with learned variance.

The plain functions are written as trainers write them, the hybrid as guided-diffusion does (its formulas, in the dtype of the
model's output, from tables of coefficients). The floors: one pass that reads two tensors, for the forward, and one that reads two
and writes one, for the backward.
"""

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from fastgen.ops import VLB_COLUMNS, diffusion_loss
from fastgen.samplers import alphas_cumprod, linear_betas, noising_tables, vlb_table

from ..cases import DTYPES, Case, Provider, Workload, compiled, random_tensor
from ..verify import Values

SHAPES = ((128, 3, 32, 32), (16, 3, 256, 256))  # a batch of CIFAR-10, and of 256 x 256 images
MODES = ("epsilon", "v_prediction", "hybrid")
TRAIN_STEPS = 1000
GROUP_OF = {
    "epsilon": "`diffusion_loss`, squared error, forward and backward",
    "v_prediction": "`diffusion_loss`, squared error, forward and backward",
    "hybrid": "`diffusion_loss`, hybrid with learned variance, forward and backward",
}
# Nominal, an element: difference, square and sum, then two for the gradient; target 3; the bound with its exponential 30.
FLOPS_PER_ELEMENT = {"epsilon": 6, "v_prediction": 12, "hybrid": 66}
# Reads of the forward, reads and writes of the backward, in tensors of the size of x0.
PASSES = {"epsilon": 5, "v_prediction": 7, "hybrid": 8}


def at(table: Tensor, t: Tensor) -> Tensor:
    return table[t][:, None, None, None]


def plain_epsilon(model: Tensor, x0: Tensor, noise: Tensor, t: Tensor, tables: dict[str, Tensor]) -> Tensor:
    return ((model - noise) ** 2).mean((1, 2, 3)).mean()


def plain_v_prediction(model: Tensor, x0: Tensor, noise: Tensor, t: Tensor, tables: dict[str, Tensor]) -> Tensor:
    target = at(tables["alphas"], t) * noise - at(tables["sigmas"], t) * x0
    return ((model - target) ** 2).mean((1, 2, 3)).mean()


def normal_cdf(x: Tensor) -> Tensor:
    return 0.5 * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))


def log_likelihood(x0: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    centred, inverse = x0 - mean, torch.exp(-log_scale)
    above, below = normal_cdf(inverse * (centred + 1 / 255)), normal_cdf(inverse * (centred - 1 / 255))
    dark, light = above.clamp(min=1e-12).log(), (1 - below).clamp(min=1e-12).log()
    return torch.where(x0 < -0.999, dark, torch.where(x0 > 0.999, light, (above - below).clamp(min=1e-12).log()))


def plain_hybrid(model: Tensor, x0: Tensor, noise: Tensor, t: Tensor, tables: dict[str, Tensor]) -> Tensor:
    epsilon, v = model.chunk(2, 1)
    simple = ((epsilon - noise) ** 2).mean((1, 2, 3))
    alpha, sigma = at(tables["alphas"], t), at(tables["sigmas"], t)
    x_t = alpha * x0 + sigma * noise
    predicted = x_t / alpha - sigma / alpha * epsilon.detach()
    from_x0, from_x_t = at(tables["from_x0"], t), at(tables["from_x_t"], t)
    mean, true_mean = from_x0 * predicted + from_x_t * x_t, from_x0 * x0 + from_x_t * x_t
    low, high = at(tables["log_variance"], t), at(tables["log_beta"], t)
    log_variance = (v + 1) / 2 * high + (1 - v) / 2 * low
    kl = -1 + log_variance - low + torch.exp(low - log_variance) + (true_mean - mean) ** 2 * torch.exp(-log_variance)
    kl = (0.5 * kl).mean((1, 2, 3)) / math.log(2)
    likelihood = -log_likelihood(x0, mean, 0.5 * log_variance).mean((1, 2, 3)) / math.log(2)
    return (simple + torch.where(t == 0, likelihood, kl)).mean()


PLAIN: dict[str, Callable] = {"epsilon": plain_epsilon, "v_prediction": plain_v_prediction, "hybrid": plain_hybrid}


def cases(device: torch.device, full: bool) -> list[Case]:
    return [
        Case("diffusion_loss", mode, shape, dtype, functools.partial(build, mode, shape, dtype, device), GROUP_OF[mode])
        for mode in MODES
        for shape in SHAPES
        for dtype in ("fp32", "bf16")
        if (mode, dtype) != ("hybrid", "bf16")  # 1e-12 and the difference of cdfs mean nothing in half precision
    ]


def make_tables() -> dict[str, Tensor]:
    """All coefficients by timestep, [1000] float64, and `fastgen`'s table of the bound [1000, 3]."""
    betas = linear_betas(TRAIN_STEPS)
    bar = alphas_cumprod(betas)
    before = torch.cat([bar.new_ones(1), bar[:-1]])
    alphas, sigmas = noising_tables(bar)
    table = vlb_table(bar)
    return {
        "alphas": alphas,
        "sigmas": sigmas,
        "vlb_table": table,
        "from_x0": table[:, VLB_COLUMNS.index("mean")],
        "from_x_t": (1 - before) * (1 - betas).sqrt() / (1 - bar),
        "log_variance": -2 * table[:, VLB_COLUMNS.index("inverse_deviation")].log(),
        "log_beta": betas.log(),
    }


def build(mode: str, shape: tuple[int, ...], dtype: str, device: torch.device, allow_compile: bool) -> Workload:
    hybrid = mode == "hybrid"
    x0 = random_tensor(shape, device, dtype, seed=0).clamp(-1, 1)
    noise = random_tensor(shape, device, dtype, seed=1)
    t = torch.randint(0, TRAIN_STEPS, shape[:1], generator=torch.Generator().manual_seed(2))
    if hybrid:
        t[1] = 0
    t, wide = t.to(device), {name: table.to(device) for name, table in make_tables().items()}
    model = noise + 0.1 * random_tensor(shape, device, dtype, seed=3)
    if mode == "v_prediction":
        model = (at(wide["alphas"], t) * noise - at(wide["sigmas"], t) * x0).to(x0.dtype) + 0.1 * random_tensor(
            shape, device, dtype, seed=3
        )
    if hybrid:
        model = torch.cat([model, random_tensor(shape, device, dtype, seed=4).tanh()], 1)
    model.requires_grad_()
    plain_tables = {name: table.to(DTYPES[dtype]) for name, table in wide.items()}
    tables = {name: wide[name].float() for name in ("alphas", "sigmas")}

    def fused(model: Tensor, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        options = {"vlb_table": bound} if hybrid else {"prediction_type": mode}
        return diffusion_loss(model, x0, noise, t, **tables, **options)

    bound = wide["vlb_table"].float()
    functions: dict[str, Callable] = {"eager": functools.partial(PLAIN[mode], tables=plain_tables)}
    inputs = (model, x0, noise, t)
    notes: list[str] = []
    if function := compiled(functions["eager"], inputs, allow_compile, notes, grad=True):
        functions["compile"] = function
    functions["fastgen"] = fused

    def with_backward(function: Callable, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        loss = function(*inputs)
        return loss, torch.autograd.grad(loss, inputs[0])[0]

    calls = {name: functools.partial(with_backward, function, *inputs) for name, function in functions.items()}

    def expected() -> tuple[Tensor, Tensor]:
        exact = [value.detach().double() for value in inputs[:3]]
        with torch.enable_grad():
            plain = functools.partial(PLAIN[mode], tables=wide)
            return with_backward(plain, exact[0].requires_grad_(), *exact[1:], t)

    providers = [Provider(name, call, "fastgen" if name == "fastgen" else "baseline") for name, call in calls.items()]
    first = model.detach()[:, : shape[1]].contiguous()
    if dtype == "fp32":  # torch's dot product of bf16 is no limit of any machine
        providers.append(Provider("read", functools.partial(torch.dot, first.flatten(), noise.flatten()), "floor"))
    providers.append(Provider("memory", functools.partial(torch.add, first, noise), "floor"))
    elements = math.prod(shape)
    return Workload(
        providers,
        (Values(expected, yardstick="eager", terms=(elements, 1)),),
        min_bytes=PASSES[mode] * elements * DTYPES[dtype].itemsize,
        flops=FLOPS_PER_ELEMENT[mode] * elements,
        grad=True,
        notes=notes,
    )
