"""`categorical_sample` beside softmax and `torch.multinomial`, eager, and the Gumbel trick, compiled: one pixel of a batch; images.

torch draws by its generator, so its levels are others: all must follow softmax, by the mean of the probabilities of what is drawn.
The floor is one pass that reads the logits.
"""

import functools
import math

import torch
from torch import Tensor

from fastgen.ops import categorical_sample

from ..cases import DTYPES, Case, Provider, Workload, compiled, random_tensor
from ..verify import Check, Outputs

# [N, K, *]: one pixel of a batch, as a sampler draws it, and all pixels of images.
SHAPES = ((16, 256), (256, 256), (16, 256, 32, 32))
TOP_K = 50
MODES = ("plain", "top_k")
GROUP_OF = {
    "plain": "`categorical_sample`, 256 levels",
    "top_k": f"`categorical_sample`, 256 levels, the {TOP_K} largest",
}


def rows_of(logits: Tensor) -> Tensor:
    return logits.movedim(1, -1).reshape(-1, logits.shape[1])


def cut(rows: Tensor) -> Tensor:
    return rows.masked_fill(rows < rows.topk(TOP_K, dim=-1).values[:, -1:], -math.inf)


def multinomial(logits: Tensor, top_k: bool) -> Tensor:
    rows = cut(rows_of(logits)) if top_k else rows_of(logits)
    drawn = torch.multinomial(torch.softmax(rows, -1), 1)
    return drawn.reshape(logits.shape[0], *logits.shape[2:])


def gumbel(logits: Tensor, top_k: bool) -> Tensor:
    rows = cut(rows_of(logits)) if top_k else rows_of(logits)
    drawn = (rows - torch.log(-torch.log(torch.rand_like(rows).clamp_min(1e-30)))).argmax(-1)
    return drawn.reshape(logits.shape[0], *logits.shape[2:])


class Follows:
    """Levels of the distribution ``probabilities`` [rows, K]: the mean of those of what is drawn, within some standard errors."""

    def __init__(self, probabilities: Tensor, sigmas: float = 6.0) -> None:
        self._probabilities, self._sigmas = probabilities.double(), sigmas

    def judge(self, provider: str, outputs: Outputs, all_outputs: dict[str, Outputs]) -> Check:
        p, drawn = self._probabilities, outputs[0].reshape(-1, 1)
        if drawn.dtype != torch.int64 or bool(((drawn < 0) | (drawn >= p.shape[1])).any()):
            return Check(provider, False, float("inf"), self._sigmas, "no levels")
        mean, square = p.square().sum(-1), p.pow(3).sum(-1)
        error = (p.gather(1, drawn)[:, 0] - mean).sum().abs() / (square - mean.square()).sum().sqrt()
        ok = bool(error <= self._sigmas) and bool((p.gather(1, drawn) > 0).all())
        reason = "" if ok else f"off by {error.item():.1f} standard errors"
        return Check(provider, ok, error.item(), self._sigmas, reason)


def cases(device: torch.device, full: bool) -> list[Case]:
    return [
        Case(
            "categorical_sample", mode, shape, "fp32", functools.partial(build, mode, shape, layout, device),
            GROUP_OF[mode], layout=layout,
        )
        for mode in MODES
        for shape in SHAPES
        for layout in (("NCHW", "NHWC") if len(shape) == 4 else ("NCHW",))
    ]  # fmt: skip


def build(mode: str, shape: tuple[int, ...], layout: str, device: torch.device, allow_compile: bool) -> Workload:
    logits = random_tensor(shape, device, "fp32", seed=0, deviation=2.0, layout=layout)
    top_k = mode == "top_k"
    seeds, notes = torch.arange(shape[0], device=device), []
    providers = [Provider("multinomial", functools.partial(multinomial, logits, top_k))]
    if function := compiled(gumbel, (logits, top_k), allow_compile, notes):
        providers.append(Provider("compile", functools.partial(function, logits, top_k)))
    call = functools.partial(categorical_sample, logits, seeds=seeds, top_k=TOP_K if top_k else None)
    providers.append(Provider("fastgen", call, "fastgen"))
    providers.append(Provider("read", functools.partial(torch.sum, logits), "floor"))
    rows = rows_of(logits.double())
    expected = Follows(torch.softmax(cut(rows) if top_k else rows, -1))
    bytes_read = logits.numel() * DTYPES["fp32"].itemsize + 8 * logits.numel() // shape[1]
    return Workload(providers, (expected,), bytes_read, 20 * logits.numel(), notes=notes)
