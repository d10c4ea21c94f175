"""`CausalTransformerFlow`: an autoregressive affine map over the tokens of a sequence whose parameters a causal transformer gives.

Zhai et al. 2024 (Normalizing flows are capable generative models): the block of TarFlow. From data to latent all tokens at once,
back one after the other, or segment by segment (`gauss_seidel_jacobi`).
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import _dispatch
from ..nn.causal_transformer import CausalTransformerLayer, KeyValueCache
from ..ops import causal_transformer_inverse
from .gauss_seidel_jacobi import GaussSeidelJacobi, Passes, gauss_seidel_jacobi
from .transform import Context, Transform, log_det_dtype


@dataclass(frozen=True)
class Guidance:
    """Guidance of the parameters (a, b) of each token away from those (a', b') without the label: (a, b) + w (a - a', b - b').

    Args:
        scale: w.
        log_scale, shift: whether a is guided, and b.
        annealed: w grows in proportion to the number of the token, up to ``scale`` for the last.
        attention_temperature: divides the attention scores of the network without the label.

    Raises:
        ValueError: an argument is out of its range.

    Source: Zhai et al. 2024, section 2.5.
    """

    scale: float
    log_scale: bool = True
    shift: bool = True
    annealed: bool = False
    attention_temperature: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.scale < float("inf"):
            raise ValueError(f"Guidance: scale must be finite and not negative, got {self.scale}")
        if not 0 < self.attention_temperature < float("inf"):
            raise ValueError(
                f"Guidance: attention_temperature must be finite and positive, got {self.attention_temperature}"
            )

    @property
    def active(self) -> bool:
        return self.scale > 0 and (self.log_scale or self.shift)

    def table(self, tokens: int, device: torch.device) -> Tensor:
        """w of a and of b for each token, [T, 2] in float64."""
        weights = torch.full((tokens,), float(self.scale), dtype=torch.float64)
        if self.annealed:
            weights *= torch.arange(tokens, dtype=torch.float64) / max(tokens - 1, 1)
        return torch.stack([weights * self.log_scale, weights * self.shift], 1).to(device)


class CausalTransformerFlow(Transform):
    r"""One block of TarFlow, for sequences [N, T, D] and labels [N].

    .. math:: z_0 = x_0, \quad z_{t+1} = (x_{t+1} - b_t) \odot e^{-a_t}, \qquad (a_t, b_t) = \mathrm{transformer}(x_0, \dots, x_t)_t

    Args:
        features: D, numbers of a token.
        tokens: T.
        channels: of the transformer.
        num_layers: of the transformer.
        head_channels: of a head of its attention; divides ``channels``.
        expansion: of its MLPs.
        scaled: whether a is learned; otherwise it is 0, and volumes are kept.
        num_classes: of labels, integers, -1 for none; None for a block without.
        reverse: whether the last token comes first.

    Names of weights are those of ml-tarflow's `MetaBlock`. A new block is the identity but for the bias of its last layer.
    """

    def __init__(
        self,
        features: int,
        tokens: int,
        channels: int,
        *,
        num_layers: int = 1,
        head_channels: int = 64,
        expansion: int = 4,
        scaled: bool = True,
        num_classes: int | None = None,
        reverse: bool = False,
    ) -> None:
        super().__init__()
        if channels % head_channels:
            message = f"channels must be a multiple of head_channels, got {channels} and {head_channels}"
            raise ValueError(f"{type(self).__name__}: {message}")
        self.features, self.scaled, self.reverse = features, scaled, reverse
        self.proj_in = nn.Linear(features, channels)
        self.pos_embed = nn.Parameter(torch.randn(tokens, channels) * 1e-2)
        self.class_embed = None if num_classes is None else nn.Parameter(torch.randn(num_classes, 1, channels) * 1e-2)
        self.attn_blocks = nn.ModuleList(
            CausalTransformerLayer(channels, head_channels, expansion) for _ in range(num_layers)
        )
        self.proj_out = nn.Linear(channels, (1 + scaled) * features)
        nn.init.zeros_(self.proj_out.weight)

    def forward(self, input: Tensor, context: Context = None) -> tuple[Tensor, Tensor]:
        """x [N, T, D] -> (z, log-det [N])."""
        x = self._in_turn(input)
        h = self.proj_in(x) + self.positions()
        condition = self.condition(context)
        if condition is not None:
            h = h + condition.unsqueeze(-2)
        for layer in self.attn_blocks:
            h = layer(h)
        log_scale, shift = self._split(self.proj_out(h)[:, :-1])
        first, rest = x[:, :1], x[:, 1:] - shift
        if log_scale is None:
            log_det = torch.zeros(len(x), dtype=log_det_dtype(x), device=x.device)
        else:
            log_scale = log_scale.to(log_det_dtype(x))
            rest, log_det = rest * torch.exp(-log_scale).to(rest.dtype), -log_scale.sum((1, 2))
        return self._in_turn(torch.cat([first, rest], 1)), log_det

    def inverse(
        self,
        input: Tensor,
        context: Context = None,
        *,
        guidance: Guidance | None = None,
        jacobi: GaussSeidelJacobi | None = None,
        passes: list[Passes] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """z [N, T, D] -> (x, log-det [N]).

        Without gradients, on a CPU, all tokens are one call of :func:`fastgen.ops.causal_transformer_inverse`; elsewhere the
        layers run for one token after the other, with their keys and values kept.

        Args:
            input: z.
            context: labels [N], or None.
            guidance: away from the network without labels.
            jacobi: segments of tokens at once, in passes until they stand still, in the place of token after token.
            passes: a list to which the passes that ``jacobi`` took are added.
        """
        z, condition = self._in_turn(input), self.condition(context)
        guided = guidance is not None and guidance.active
        unconditional = self.condition(None) if guided else None
        table = guidance.table(z.shape[1], z.device) if guidance is not None and guided else None
        temperature = guidance.attention_temperature if guidance is not None else 1.0
        if condition is not None:
            condition = condition.expand(len(z), -1)
        if jacobi is None and z.is_cpu and not self._needs_grad(z):
            x, log_det = causal_transformer_inverse(
                z, self.positions(), *self.tensors(), heads=self._heads, condition=condition,
                unconditional=unconditional, guidance=table, unconditional_temperature=temperature,
            )  # fmt: skip
            return self._in_turn(x), log_det
        network = Continued(self, z, condition, unconditional, table, temperature)
        x, log_det = _token_by_token(network, z) if jacobi is None else gauss_seidel_jacobi(network, z, jacobi, passes)
        return self._in_turn(x), log_det

    def condition(self, labels: Any) -> Tensor | None:
        """[N, channels] of labels, [channels] without (their mean); None of a block that takes none."""
        if self.class_embed is None:
            return None
        table = self.class_embed[:, 0]
        if labels is None:
            return table.mean(0)
        return torch.where(labels[:, None] < 0, table.mean(0), table[labels.clamp(min=0)])

    def positions(self) -> Tensor:
        """[T, channels], in the order of turn."""
        return self._in_turn(self.pos_embed, 0)

    def parameters_of(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """(a, b) of what the layers give."""
        log_scale, shift = self._split(self.proj_out(h))
        return torch.zeros_like(shift) if log_scale is None else log_scale, shift

    def _split(self, said: Tensor) -> tuple[Tensor | None, Tensor]:
        if not self.scaled:
            return None, said
        log_scale, shift = said.chunk(2, -1)
        return log_scale, shift

    def _in_turn(self, x: Tensor, dim: int = 1) -> Tensor:
        return x.flip(dim) if self.reverse else x

    @property
    def _heads(self) -> int:
        return self.attn_blocks[0].attention.heads if len(self.attn_blocks) else 1  # type: ignore[union-attr, return-value]

    def _needs_grad(self, z: Tensor) -> bool:
        return torch.is_grad_enabled() and _dispatch.needs_grad(z, *self.parameters())

    def tensors(self) -> tuple[list[Tensor], list[Tensor]]:
        """Weights and parameters as :func:`fastgen.ops.causal_transformer_inverse` takes them."""
        layers: list[Any] = list(self.attn_blocks)
        matrices = [self.proj_in.weight, *(w for layer in layers for w in layer.matrices()), self.proj_out.weight]
        vectors = [self.proj_in.bias, *(p for layer in layers for p in layer.vectors()), self.proj_out.bias]
        return matrices, vectors

    def extra_repr(self) -> str:
        return f"features={self.features}, tokens={len(self.pos_embed)}, scaled={self.scaled}, reverse={self.reverse}"


class Continued:
    """The parameters (a, b) of tokens that follow those before, whose keys and values are kept.

    ``begin(t)`` forgets the tokens from t on. With guidance the network without labels runs beside the other, as further samples.
    """

    def __init__(
        self,
        block: CausalTransformerFlow,
        z: Tensor,
        condition: Tensor | None,
        unconditional: Tensor | None,
        guidance: Tensor | None,
        temperature: float,
    ) -> None:
        self.block, self.position = block, block.positions()
        self.guidance = None if guidance is None else guidance.to(z.dtype)
        self.caches = [KeyValueCache(z.shape[1]) for _ in block.attn_blocks]
        self.condition = condition
        self.query_scale: Tensor | None = None
        if guidance is not None:
            if condition is not None and unconditional is not None:
                self.condition = torch.cat([condition, unconditional.expand_as(condition)])
            if temperature != 1:
                scales = torch.tensor([1.0, 1 / temperature], dtype=z.dtype).repeat_interleave(len(z))
                self.query_scale = scales.to(z.device)[:, None, None, None]

    def begin(self, token: int) -> None:
        for cache in self.caches:
            cache.length = token

    def __call__(self, tokens: Tensor, first: int) -> tuple[Tensor, Tensor]:
        """(a, b) [N, S, D] of tokens ``first`` + 1 to ``first`` + S, by tokens [N, S, D], which are ``first`` and on."""
        h = self.block.proj_in(tokens) + self.position[first : first + tokens.shape[1]]
        if self.guidance is not None:
            h = torch.cat([h, h])
        if self.condition is not None:
            h = h + self.condition[:, None]
        for layer, cache in zip(self.block.attn_blocks, self.caches, strict=True):
            h = layer(h, cache, self.query_scale)
        log_scale, shift = self.block.parameters_of(h)
        if self.guidance is None:
            return log_scale, shift
        weights = self.guidance[first + 1 : first + 1 + tokens.shape[1], :, None]
        (a, a_without), (b, b_without) = log_scale.chunk(2), shift.chunk(2)
        return a + weights[:, 0] * (a - a_without), b + weights[:, 1] * (b - b_without)


def _token_by_token(network: Continued, z: Tensor) -> tuple[Tensor, Tensor]:
    x, log_det = [z[:, :1]], torch.zeros(len(z), dtype=log_det_dtype(z), device=z.device)
    for t in range(z.shape[1] - 1):
        log_scale, shift = network(x[-1], t)
        x.append(z[:, t + 1 : t + 2] * log_scale.exp() + shift)
        log_det = log_det + log_scale.to(log_det.dtype).sum((1, 2))
    return torch.cat(x, 1), log_det
