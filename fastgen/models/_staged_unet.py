"""`StagedUNet`: what U-Nets share: stages on the way down, in the middle and on the way up, and the embedding that they get.

Ho et al. 2020; Nichol and Dhariwal 2021; Dhariwal and Nichol 2021.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..nn import Conv2d, TimestepEmbedding
from ._configured import Configured, check_positive


class Stage(nn.ModuleList):
    """Layers in a row; each gets what it ``takes`` beside the features. The first one of a stage on the way up, a residual block,
    gets ``skip`` too: the features of the way down that come beside them."""

    def forward(self, x: Tensor, *, skip: Tensor | None = None, **given: Any) -> Tensor:
        more = {} if skip is None else {"skip": skip}
        for layer in self:
            x = layer(x, **more, **{name: given[name] for name in getattr(layer, "takes", ())})
            more = {}
        return x


class StagedUNet(Configured):
    """A U-Net of stages, each of residual blocks and, at some levels, of attention; what these are a subclass says.

    Args:
        config: as :class:`Configured` has it; ``in_channels``, ``model_channels``, ``channel_mult``, ``num_res_blocks``,
            ``attention_resolutions``, ``num_classes``, ``null_class``, ``num_groups`` and ``dropout`` among them.
        out_channels: of the last convolution.
    """

    def __init__(self, config: Mapping[str, Any], out_channels: int) -> None:
        _check_config(type(self).__name__, config)
        super().__init__(config)
        self.in_channels: int = config["in_channels"]
        self.out_channels = out_channels
        self.num_classes: int | None = config["num_classes"]
        self.embedding_channels = 4 * config["model_channels"]
        self.time_embedding = TimestepEmbedding(config["model_channels"], self.embedding_channels)
        self.class_embedding: nn.Embedding | None = None
        if self.num_classes is not None:
            self.class_embedding = nn.Embedding(self.num_classes + int(config["null_class"]), self.embedding_channels)

    def _build_stages(
        self,
        first: nn.Module,
        *,
        res_block: Callable[[int, int], nn.Module],
        attention: Callable[[int, int | None], Iterable[nn.Module]],
        resample: Callable[[str, int], nn.Module],
    ) -> int:
        """Make the stages.

        Args:
            first: the convolution that the features come from.
            res_block: of (channels, out_channels); on the way up called with ``skip``, as :class:`fastgen.nn.ResBlock`.
            attention: what follows a residual block, of (channels, level); the level of the middle is None.
            resample: of ("up" or "down", channels).

        Returns:
            The channels at the end.
        """
        config = self._config
        num_res_blocks: int = config["num_res_blocks"]
        widths = [int(config["model_channels"] * mult) for mult in config["channel_mult"]]
        channels = widths[0]
        self.input_blocks = nn.ModuleList([Stage([first])])
        skip_channels = [channels]
        for level, width in enumerate(widths):
            for _ in range(num_res_blocks):
                self.input_blocks.append(Stage([res_block(channels, width), *attention(width, level)]))
                channels = width
                skip_channels.append(channels)
            if level < len(widths) - 1:
                self.input_blocks.append(Stage([resample("down", channels)]))
                skip_channels.append(channels)
        self.middle_block = Stage(
            [res_block(channels, channels), *attention(channels, None), res_block(channels, channels)]
        )
        self.output_blocks = nn.ModuleList()
        for level, width in reversed(list(enumerate(widths))):
            for i in range(num_res_blocks + 1):
                layers = [res_block(channels + skip_channels.pop(), width), *attention(width, level)]
                channels = width
                if level > 0 and i == num_res_blocks:
                    layers.append(resample("up", channels))
                self.output_blocks.append(Stage(layers))
        return channels

    def _run_stages(self, x: Tensor, **given: Any) -> Tensor:
        """The features before the last norm; ``given``: what layers take beside them."""
        h = self._laid_out(x)
        skips: list[Tensor] = []
        for stage in self.input_blocks:
            h = stage(h, **given)
            if not skips:
                h = self._laid_out(h)
            skips.append(h)
        h = self.middle_block(h, **given)
        for stage in self.output_blocks:
            h = stage(h, skip=skips.pop(), **given)
        return h

    @property
    def null_label(self) -> int | None:
        """The number of the null class, None for a model without one."""
        return self.num_classes if self._config["null_class"] else None

    @property
    def downsampling(self) -> int:
        """The factor between the first level and the last, which height and width of an image are divisible by."""
        return 2 ** (len(self._config["channel_mult"]) - 1)

    def _has_attention(self, level: int | None) -> bool:
        return level is None or 2**level in self._config["attention_resolutions"]

    def _laid_out(self, h: Tensor) -> Tensor:
        """Features, or the image, in the layout that the network is the fastest in."""
        return h

    def _check_input(self, x: Tensor) -> None:
        if x.dim() != 4 or x.shape[1] != self.in_channels:
            raise ValueError(
                f"{type(self).__name__}: x must be [N, {self.in_channels}, H, W], got shape {tuple(x.shape)}"
            )
        self._check_size(x)

    def _check_size(self, x: Tensor) -> None:
        name, factor = type(self).__name__, self.downsampling
        if x.shape[-2] % factor or x.shape[-1] % factor or 0 in x.shape[-2:]:
            raise ValueError(f"{name}: height and width of x must be divisible by {factor}, got shape {tuple(x.shape)}")

    def _of_each(self, name: str, value: Tensor, n: int) -> Tensor:
        """``value``, [N] or a scalar, as [N]. Raises ValueError for another shape."""
        if value.dim() > 1 or (value.dim() == 1 and value.shape[0] != n):
            raise ValueError(
                f"{type(self).__name__}: {name} must be [N] = [{n}] or a scalar, got shape {tuple(value.shape)}"
            )
        return value.expand(n)

    def _embed(self, x: Tensor, timesteps: Tensor, y: Tensor | None) -> Tensor:
        """[N, embedding_channels] of timesteps and classes."""
        name, n = type(self).__name__, x.shape[0]
        embedding = self.time_embedding(self._of_each("timesteps", timesteps, n))
        if self.class_embedding is None:
            if y is not None:
                raise ValueError(f"{name}: the model has no classes (num_classes=None), got y")
            return embedding
        if y is None:
            if self.null_label is None:
                raise ValueError(f"{name}: y is needed, the model has {self.num_classes} classes and no null class")
            y = torch.full((n,), self.null_label, device=x.device)
        elif y.shape != (n,) or y.is_floating_point():
            raise ValueError(f"{name}: y must be [N] = [{n}] integers, got shape {tuple(y.shape)} of {y.dtype}")
        return embedding + self.class_embedding(y)


def fastest_layout(conv: Any, x: Tensor) -> Tensor:
    """``x`` as the network of which ``conv`` is a part is the fastest.

    Channels-last where its weights are, and in inference on a CPU, whose kernels read and write it without turning it over. An
    image of one channel does not say which layout it has.
    """
    weight = conv.weight
    last = not weight.is_contiguous() and weight.is_contiguous(memory_format=torch.channels_last)
    kernels = isinstance(conv, Conv2d) and x.is_cpu and x.dtype != torch.float64
    if last or (kernels and not torch.is_grad_enabled() and not torch.compiler.is_compiling()):
        return x.to(memory_format=torch.channels_last)
    return x


def as_given(y: Tensor, x: Tensor, conv: Any) -> Tensor:
    """The output ``y`` of a network contiguous where its input ``x`` and the weights of ``conv``, a part of it, are."""
    return y.contiguous() if x.is_contiguous() and conv.weight.is_contiguous() else y


def check_levels(name: str, config: Mapping[str, Any]) -> None:
    """Raise ValueError where the levels of a config are not such as residual blocks and norms can have."""
    check_positive(name, config, "in_channels", "model_channels", "num_res_blocks", "num_groups")
    mult: Sequence[float] = config["channel_mult"]
    channels = config["model_channels"]
    if not mult or not all(m > 0 and (channels * m) % 1 == 0 for m in mult):
        raise ValueError(
            f"{name}: channel_mult must be positive numbers, one a level, whose products with "
            f"model_channels={channels} are integers, got {mult}"
        )
    factors = [2**level for level in range(len(mult))]
    if not set(config["attention_resolutions"]) <= set(factors):
        raise ValueError(
            f"{name}: attention_resolutions must be downsampling factors among {factors}, "
            f"got {config['attention_resolutions']}"
        )
    widths = [int(channels * m) for m in mult]
    if any(width % config["num_groups"] for width in widths):
        raise ValueError(f"{name}: num_groups must divide every width {widths}, got num_groups={config['num_groups']}")
    if not 0 <= config["dropout"] < 1:
        raise ValueError(f"{name}: dropout must be in [0, 1), got {config['dropout']}")


def _check_config(name: str, config: Mapping[str, Any]) -> None:
    """Raise ValueError for values no layer would name well."""
    check_levels(name, config)
    check_positive(name, config, "num_heads")
    if config["num_classes"] is not None and config["num_classes"] < 1:
        raise ValueError(f"{name}: num_classes must be None or positive, got {config['num_classes']}")
    if config["null_class"] and config["num_classes"] is None:
        raise ValueError(f"{name}: null_class needs num_classes, got None")
