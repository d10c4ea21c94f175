"""`logistic_mixture`, forward and backward, beside pixel-cnn-pp's loss, eager and compiled, and draws beside its sampler.

The loss is `discretized_mix_logistic_loss` of pclucas14/pixel-cnn-pp in today's torch and without its moves to a GPU, operation by
operation: products with masks of zeros and ones stand for `where`. It is summed over the batch there, and so it is here. The port
draws by torch's generator, so its images are others: all must lie in [-1, 1] and have the same mean and mean square. The floor is a
copy of the logits.
"""

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgen.ops import logistic_mixture, logistic_mixture_sample

from ..cases import DTYPES, Case, Provider, Role, Workload, compiled, random_tensor
from ..verify import Check, Outputs, Values

SHAPES = ((16, 3, 32, 32), (64, 3, 32, 32))  # the batch of a training step, and a larger one
MIXTURES = 10
MODES = ("loss", "sample")
GROUP_OF = {
    "loss": "`logistic_mixture`, ten mixtures of three colors, forward and backward",
    "sample": "`logistic_mixture_sample`, whole images",
}
# Nominal, a color of a mixture: five exponentials and a logarithm, and as many products again in the backward.
FLOPS = {"loss": 150, "sample": 5}


def log_prob_from_logits(x: Tensor) -> Tensor:
    m, _ = torch.max(x, dim=-1, keepdim=True)
    return x - m - torch.log(torch.sum(torch.exp(x - m), dim=-1, keepdim=True))


def log_sum_exp(x: Tensor) -> Tensor:
    m, _ = torch.max(x, dim=-1)
    m2, _ = torch.max(x, dim=-1, keepdim=True)
    return m + torch.log(torch.sum(torch.exp(x - m2), dim=-1))


def port_loss(params: Tensor, x: Tensor) -> Tensor:
    x, params = x.permute(0, 2, 3, 1), params.permute(0, 2, 3, 1)
    xs, mixtures = list(x.shape), params.shape[-1] // 10
    logit_probs = params[..., :mixtures]
    params = params[..., mixtures:].contiguous().view([*xs, mixtures * 3])
    means = params[..., :mixtures]
    log_scales = torch.clamp(params[..., mixtures : 2 * mixtures], min=-7.0)
    coeffs = torch.tanh(params[..., 2 * mixtures : 3 * mixtures])
    x = x.contiguous().unsqueeze(-1) + torch.zeros([*xs, mixtures], dtype=x.dtype, device=x.device)
    m2 = (means[:, :, :, 1, :] + coeffs[:, :, :, 0, :] * x[:, :, :, 0, :]).view(*xs[:3], 1, mixtures)
    third = coeffs[:, :, :, 1, :] * x[:, :, :, 0, :] + coeffs[:, :, :, 2, :] * x[:, :, :, 1, :]
    m3 = (means[:, :, :, 2, :] + third).view(*xs[:3], 1, mixtures)
    means = torch.cat((means[:, :, :, 0, :].unsqueeze(3), m2, m3), dim=3)
    centered_x = x - means
    inv_stdv = torch.exp(-log_scales)
    plus_in = inv_stdv * (centered_x + 1.0 / 255.0)
    cdf_plus = torch.sigmoid(plus_in)
    min_in = inv_stdv * (centered_x - 1.0 / 255.0)
    cdf_min = torch.sigmoid(min_in)
    log_cdf_plus = plus_in - F.softplus(plus_in)
    log_one_minus_cdf_min = -F.softplus(min_in)
    cdf_delta = cdf_plus - cdf_min
    mid_in = inv_stdv * centered_x
    log_pdf_mid = mid_in - log_scales - 2.0 * F.softplus(mid_in)
    inner_inner_cond = (cdf_delta > 1e-5).to(x.dtype)
    inner_inner_out = inner_inner_cond * torch.log(torch.clamp(cdf_delta, min=1e-12)) + (1.0 - inner_inner_cond) * (
        log_pdf_mid - math.log(127.5)
    )
    inner_cond = (x > 0.999).to(x.dtype)
    inner_out = inner_cond * log_one_minus_cdf_min + (1.0 - inner_cond) * inner_inner_out
    cond = (x < -0.999).to(x.dtype)
    log_probs = cond * log_cdf_plus + (1.0 - cond) * inner_out
    log_probs = torch.sum(log_probs, dim=3) + log_prob_from_logits(logit_probs)
    return -torch.sum(log_sum_exp(log_probs))


def port_sample(params: Tensor) -> Tensor:
    params = params.permute(0, 2, 3, 1)
    xs, mixtures = [*params.shape[:-1], 3], params.shape[-1] // 10
    logit_probs = params[..., :mixtures]
    params = params[..., mixtures:].contiguous().view([*xs, mixtures * 3])
    temp = torch.empty(logit_probs.shape, device=params.device).uniform_(1e-5, 1.0 - 1e-5)
    temp = logit_probs - torch.log(-torch.log(temp))
    _, argmax = temp.max(dim=3)
    one_hot = torch.zeros(logit_probs.shape, device=params.device).scatter_(3, argmax.unsqueeze(-1), 1.0)
    sel = one_hot.view([*xs[:-1], 1, mixtures])
    means = torch.sum(params[..., :mixtures] * sel, dim=4)
    log_scales = torch.clamp(torch.sum(params[..., mixtures : 2 * mixtures] * sel, dim=4), min=-7.0)
    coeffs = torch.sum(torch.tanh(params[..., 2 * mixtures : 3 * mixtures]) * sel, dim=4)
    u = torch.empty(means.shape, device=params.device).uniform_(1e-5, 1.0 - 1e-5)
    x = means + torch.exp(log_scales) * (torch.log(u) - torch.log(1.0 - u))
    x0 = torch.clamp(x[..., 0], -1.0, 1.0)
    x1 = torch.clamp(x[..., 1] + coeffs[..., 0] * x0, -1.0, 1.0)
    x2 = torch.clamp(x[..., 2] + coeffs[..., 1] * x0 + coeffs[..., 2] * x1, -1.0, 1.0)
    return torch.stack([x0, x1, x2], dim=1)


class Images:
    """Images in [-1, 1] whose mean and mean square are those of ``values``, another draw, within ``sigmas`` standard errors."""

    def __init__(self, values: Tensor, sigmas: float = 6.0) -> None:
        self._values, self._sigmas = values.double(), sigmas

    def judge(self, provider: str, outputs: Outputs, all_outputs: dict[str, Outputs]) -> Check:
        drawn = outputs[0].double()
        if drawn.shape != self._values.shape or not (drawn.abs() <= 1).all():
            return Check(provider, False, math.nan, math.nan, "not images in [-1, 1]")
        worst = 0.0
        for power in (1, 2):
            a, b = drawn**power, self._values**power
            deviation = math.sqrt((a.var().item() + b.var().item()) / a.numel())
            worst = max(worst, abs(a.mean().item() - b.mean().item()) / deviation)
        return Check(
            provider, worst <= self._sigmas, worst, self._sigmas,
            "" if worst <= self._sigmas else f"off by {worst:.1f} standard errors",
        )  # fmt: skip


def cases(device: torch.device, full: bool) -> list[Case]:
    """In float32 alone: the port's 1e-12 is nothing in half precision."""
    return [
        Case(
            "logistic_mixture", mode, shape, "fp32", functools.partial(build, mode, shape, layout, device),
            GROUP_OF[mode], layout=layout,
        )
        for mode in MODES
        for shape in SHAPES
        for layout in ("NCHW", "NHWC")
        if mode == "loss" or layout == "NCHW"
    ]  # fmt: skip


def role_of(name: str) -> Role:
    return "fastgen" if name == "fastgen" else "baseline"


def build(mode: str, shape: tuple[int, ...], layout: str, device: torch.device, allow_compile: bool) -> Workload:
    n, _, h, w = shape
    logits = random_tensor((n, 10 * MIXTURES, h, w), device, "fp32", seed=0, deviation=0.5, layout=layout)
    logits += 0.3  # of the means too: what is drawn is told from its negative
    colors = logits[:, MIXTURES:].unflatten(1, (3, 3, MIXTURES))
    colors[:, :, 1] -= 2.0  # scales of a trained model
    notes: list[str] = []
    elements = logits.numel()
    copy = Provider("memory", functools.partial(torch.clone, logits.clone()), "floor")
    flops = FLOPS[mode] * math.prod(shape) * MIXTURES
    if mode == "sample":
        functions = {"port": functools.partial(port_sample, logits)}
        if function := compiled(port_sample, (logits,), allow_compile, notes):
            functions["compile"] = functools.partial(function, logits)
        functions["fastgen"] = functools.partial(logistic_mixture_sample, logits, seeds=torch.arange(n, device=device))
        providers = [Provider(name, call, role_of(name)) for name, call in functions.items()]
        expected = Images(port_sample(logits))
        return Workload([*providers, copy], (expected,), elements * DTYPES["fp32"].itemsize, flops, notes=notes)

    target = random_tensor(shape, device, "fp32", seed=1, deviation=0.5, layout=layout).clamp(-1, 1)
    target = ((target + 1) * 127.5).round() / 127.5 - 1
    logits.requires_grad_()
    inputs = (logits, target)
    losses = {"port": port_loss}
    if function := compiled(port_loss, inputs, allow_compile, notes, grad=True):
        losses["compile"] = function
    losses["fastgen"] = lambda logits, target: logistic_mixture(logits, target).sum()

    def with_backward(function, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        loss = function(logits, target)
        return loss, torch.autograd.grad(loss, logits)[0]

    def expected_of() -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            exact = logits.detach().double().requires_grad_()
            return with_backward(losses["fastgen"], exact, target.double())

    providers = [
        Provider(name, functools.partial(with_backward, function, *inputs), role_of(name))
        for name, function in losses.items()
    ]
    # forward and backward read the logits, the backward writes their gradient
    min_bytes = 3 * elements * DTYPES["fp32"].itemsize
    expected = Values(expected_of, yardstick="port", terms=(elements, 1))
    return Workload([*providers, copy], (expected,), min_bytes, flops, grad=True, notes=notes)
