"""`ResBlock`: the residual block of the DDPM family, its two norms fused with the activation and the time embedding; in inference
with the convolutions after them, too.

Ho et al. 2020 (channel bias); Nichol and Dhariwal 2021 (scale and shift); Dhariwal and Nichol 2021 (resampling inside).
"""

from collections.abc import Callable
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .conv2d import UpsampleConv2d, conv_beside, conv_of_upsampled, gathering, is_own, normed_conv, reads_both
from .group_norm import GroupNorm
from .resample import Downsample, Upsample


class ResBlock(nn.Module):
    r"""[N, C, H, W] and an embedding [N, E] -> [N, out_channels, H', W'].

    .. math::
        h &= conv_1(resample(\mathrm{silu}(norm_1(x)))) \\
        h &= \mathrm{silu}(norm_2(h + e)) \quad\text{or}\quad \mathrm{silu}(norm_2(h)(1 + e_{scale}) + e_{shift}) \\
        y &= skip(resample(x)) + conv_2(dropout(h))

    with e a linear function of silu(embedding). Either way e goes into the call of the second norm.

    Args:
        channels: C.
        out_channels: C if None.
        embedding_channels: E; None makes a block that takes no embedding.
        use_scale_shift_norm: scale and shift instead of a channel bias; needs ``embedding_channels``.
        resample: None, ``"up"`` or ``"down"``: by two, without parameters, before ``conv1`` and on the skip.
        dropout: rate, before the second convolution.
        skip_kernel_size: 1 or 3, of the convolution on the skip, which is there when the channels change.
        num_groups, eps: of both norms.
        zero_init: the second convolution starts at zero, so that the block starts as its skip.
        norm: class or factory of the norms, called as :class:`fastgen.nn.GroupNorm`; beside :class:`fastgen.nn.PlainGroupNorm`
            the convolutions are torch's own too.

    Raises:
        ValueError: an argument is out of its range; the message names it.
    """

    takes: ClassVar[tuple[str, ...]] = ("embedding",)  # beside x, of a stage of layers

    def __init__(
        self,
        channels: int,
        out_channels: int | None = None,
        *,
        embedding_channels: int | None = None,
        use_scale_shift_norm: bool = False,
        resample: str | None = None,
        dropout: float = 0.0,
        skip_kernel_size: int = 1,
        num_groups: int = 32,
        eps: float = 1e-5,
        zero_init: bool = True,
        norm: Callable[..., nn.Module] = GroupNorm,
    ) -> None:
        super().__init__()
        if resample not in (None, "up", "down"):
            raise ValueError(f"ResBlock: resample must be None, 'up' or 'down', got {resample!r}")
        if skip_kernel_size not in (1, 3):
            raise ValueError(f"ResBlock: skip_kernel_size must be 1 or 3, got {skip_kernel_size}")
        if use_scale_shift_norm and embedding_channels is None:
            raise ValueError("ResBlock: use_scale_shift_norm needs embedding_channels, got None")
        out_channels = channels if out_channels is None else out_channels
        self.channels = channels
        self.out_channels = out_channels
        self.use_scale_shift_norm = use_scale_shift_norm

        self.norm1 = norm(num_groups, channels, eps=eps, activation="silu")
        self.resample: nn.Module | None = None
        if resample is not None:
            self.resample = (Upsample if resample == "up" else Downsample)(channels, use_conv=False)
        conv = conv_beside(norm)
        if resample == "up":
            self.conv1 = conv_of_upsampled(conv, channels, out_channels)
        else:
            self.conv1 = conv(channels, out_channels, 3, padding=1)
        self.embedding_projection: nn.Linear | None = None
        if embedding_channels is not None:
            self.embedding_projection = nn.Linear(embedding_channels, out_channels * (2 if use_scale_shift_norm else 1))
        self.norm2 = norm(num_groups, out_channels, eps=eps, activation="silu")
        self.dropout = nn.Dropout(dropout)
        self.conv2 = conv(out_channels, out_channels, 3, padding=1)
        if zero_init:
            zero_parameters(self.conv2)
        self.skip: nn.Module = nn.Identity()
        if out_channels != channels:
            self.skip = conv(channels, out_channels, skip_kernel_size, padding=skip_kernel_size // 2)

    def forward(self, x: Tensor, embedding: Tensor | None = None, *, skip: Tensor | None = None) -> Tensor:
        """``x`` [N, C, H, W]; ``embedding`` [N, E] exactly where the block was built with ``embedding_channels``; ``skip``
        [N, C', H, W]: what comes beside ``x`` on the way up, with its channels after those of ``x``.

        In inference, where the kernels take them, both are read where they lie; else they are made one.

        Raises:
            ValueError: an embedding is missing, or given to a block that takes none.
        """
        of_norm2 = self._modulation(embedding)
        x, skip = self._inputs(x, skip)
        h, residual = self._first_half(x, skip)
        return self._second_half(h, of_norm2, residual)

    def _inputs(self, x: Tensor, skip: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Both, or one made of them where one of the convolutions that read them would make it."""
        if skip is None or (self.resample is None and is_own(self.norm1) and reads_both(self.skip, x, skip)):
            return x, skip
        return torch.cat([x, skip], dim=1), None

    def _modulation(self, embedding: Tensor | None) -> dict[str, Tensor]:
        """What the second norm takes of the embedding."""
        if (embedding is None) != (self.embedding_projection is None):
            expected = "none" if self.embedding_projection is None else "one of shape [N, embedding_channels]"
            raise ValueError(f"ResBlock: the block takes {expected} as embedding, got {_describe(embedding)}")
        if embedding is None or self.embedding_projection is None:
            return {}
        e = self.embedding_projection(F.silu(embedding))  # [N, out_channels] or [N, 2 * out_channels]
        if not self.use_scale_shift_norm:
            return {"channel_bias": e}
        scale, shift = e.chunk(2, dim=1)
        return {"scale": scale, "shift": shift}

    def _first_half(self, x: Tensor, skip: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """What the first convolution gives, and what the skip does."""
        gather = is_own(self.norm2)  # it reads what the first convolution gives
        if skip is not None:
            return normed_conv(self.norm1, self.conv1, x, skip=skip, gather_moments=gather), self.skip(x, skip=skip)
        if self.resample is None:
            return normed_conv(self.norm1, self.conv1, x, gather_moments=gather), self.skip(x)
        if isinstance(self.conv1, UpsampleConv2d):
            return normed_conv(self.norm1, self.conv1, x, gather_moments=gather), self.skip(self.resample(x))
        y = self.conv1(self.resample(self.norm1(x)), **gathering(self.conv1, gather))
        return y, self.skip(self.resample(x))

    def _second_half(self, h: Tensor, of_norm2: dict[str, Tensor], residual: Tensor | None = None) -> Tensor:
        """From the second norm on."""
        if self.training and self.dropout.p > 0:
            h = self.conv2(self.dropout(self.norm2(h, **of_norm2)))
            return h if residual is None else residual + h
        return normed_conv(self.norm2, self.conv2, h, residual=residual, gather_moments=True, **of_norm2)

    def extra_repr(self) -> str:
        return f"{self.channels}, {self.out_channels}, use_scale_shift_norm={self.use_scale_shift_norm}"


def zero_parameters(module: nn.Module) -> None:
    """Set every parameter of ``module`` to zero: what it adds to a residual stream starts as nothing."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)


def _describe(embedding: Tensor | None) -> str:
    return "None" if embedding is None else f"a tensor of shape {tuple(embedding.shape)}"
