"""`VideoUNet`: a `UNet` of frames, with convolutions and attention along them after those in each; and
`FrameInterpolationUNet`, which makes the frames between those that are known.

Singer et al., "Make-A-Video", 2022; Ho et al., "Video Diffusion Models", 2022. All layers of the image are those of
:class:`UNet`, under the same names. The features are frames [N F, C, H, W]: with the channels innermost, as the layers
along the frames have them, they are a view of the video and no tensor is copied to another order on the way.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from ..nn import GroupNorm, ResBlock, SpatialAttention, TemporalAttention, TemporalConv, TimestepEmbedding
from ..nn.resblock import zero_parameters
from ._image_unet import ImageUNet


class FrameConv(TemporalConv):
    """:class:`fastgen.nn.TemporalConv` of frames [N F, C, H, W], those of N ``videos``; None: they stay apart."""

    takes: ClassVar = ("videos",)

    def forward(self, x: Tensor, videos: int | None = None) -> Tensor:
        return x if videos is None else _along_frames(super().forward, x, videos)


class VideoResBlock(ResBlock):
    """A :class:`fastgen.nn.ResBlock` whose two convolutions are followed by one along the frames each.

    Args:
        channels, out_channels, options: as there.
        temporal_kernel_size: of the convolutions along the frames, odd. They start as the identity.
    """

    takes: ClassVar = ("embedding", "videos")

    def __init__(
        self, channels: int, out_channels: int | None = None, *, temporal_kernel_size: int = 3, **options: Any
    ) -> None:
        super().__init__(channels, out_channels, **options)
        self.temporal_conv1 = FrameConv(self.out_channels, temporal_kernel_size)
        self.temporal_conv2 = FrameConv(self.out_channels, temporal_kernel_size)

    def forward(
        self,
        x: Tensor,
        embedding: Tensor | None = None,
        videos: int | None = None,
        *,
        skip: Tensor | None = None,
    ) -> Tensor:
        """``x`` [N F, C, H, W], ``embedding`` [N, E]; ``videos`` as in :class:`FrameConv`, ``skip`` as in the block of an image."""
        if embedding is not None:
            embedding = embedding.repeat_interleave(len(x) // len(embedding), dim=0)
        if videos is None:
            return super().forward(x, embedding, skip=skip)
        of_norm2 = self._modulation(embedding)
        h, residual = self._first_half(*self._inputs(x, skip))
        h = self._second_half(self.temporal_conv1(h, videos), of_norm2)
        return residual + self.temporal_conv2(h, videos)


class VideoAttention(SpatialAttention):
    """:class:`fastgen.nn.SpatialAttention` in a frame, then :class:`fastgen.nn.TemporalAttention` with as many heads.

    Args:
        channels, options: as there.
        causal: a frame looks at those before it alone, and at itself.
    """

    takes: ClassVar = ("videos",)

    def __init__(self, channels: int, *, causal: bool = False, **options: Any) -> None:
        super().__init__(channels, **options)
        self.temporal_attn = TemporalAttention(
            channels, dim_head=channels // self.num_heads, heads=self.num_heads, causal=causal, plain=self._plain
        )

    def forward(self, x: Tensor, videos: int | None = None) -> Tensor:
        """``x`` [N F, C, H, W]; ``videos`` as in :class:`FrameConv`."""
        x = super().forward(x)
        return x if videos is None else _along_frames(self.temporal_attn, x, videos)


class FrameResample(nn.Module):
    """[N F, C, H, W] -> [N F / 2, C, H, W], means of two frames ("down"), or [2 N F, C, H, W], each twice ("up")."""

    takes: ClassVar = ("videos",)

    def __init__(self, direction: str) -> None:
        super().__init__()
        self.direction = direction

    def forward(self, x: Tensor, videos: int | None = None) -> Tensor:
        if videos is None:
            return x
        if self.direction == "down":
            return (x[::2] + x[1::2]) / 2
        return x.movedim(1, -1).repeat_interleave(2, dim=0).movedim(-1, 1)  # the channels stay innermost

    def extra_repr(self) -> str:
        return repr(self.direction)


class VideoUNet(ImageUNet):
    """A U-Net that predicts the noise of a video, or of an image.

    It starts as the U-Net of an image, frame by frame: convolutions along the frames as the identity, attention along
    them as nothing. Norms are those of each frame, as an image model has them.

    Args:
        in_channels, model_channels, channel_mult, num_res_blocks, attention_resolutions, num_heads, num_head_channels,
            num_classes, null_class, use_scale_shift_norm, resblock_updown, conv_resample, learn_sigma, dropout,
            num_groups, norm: as in :class:`UNet`; ``norm`` concerns the attention along the frames too.
        temporal_kernel_size: of the convolutions along the frames, odd.
        temporal_resolutions: downsampling factors (1, 2, 4, ..., not the last) at the end of whose levels the frames
            too are halved, to means of two; on the way up each comes twice.
        causal: in the attention along the frames a frame looks at those before it alone, and at itself.
        fps_conditioning: the frames per second are embedded as the timestep is; the embedding starts at 0.

    Raises:
        ValueError: an argument is out of its range; the message names it.
    """

    def __init__(
        self,
        in_channels: int = 3,
        model_channels: int = 128,
        *,
        channel_mult: Sequence[float] = (1, 2, 2, 2),
        num_res_blocks: int = 2,
        attention_resolutions: Sequence[int] = (2,),
        num_heads: int = 1,
        num_head_channels: int | None = None,
        num_classes: int | None = None,
        null_class: bool = False,
        use_scale_shift_norm: bool = False,
        resblock_updown: bool = False,
        conv_resample: bool = True,
        learn_sigma: bool = False,
        dropout: float = 0.0,
        num_groups: int = 32,
        temporal_kernel_size: int = 3,
        temporal_resolutions: Sequence[int] = (),
        causal: bool = False,
        fps_conditioning: bool = False,
        norm: Callable[..., nn.Module] = GroupNorm,
    ) -> None:
        config = {
            "in_channels": in_channels,
            "model_channels": model_channels,
            "channel_mult": list(channel_mult),
            "num_res_blocks": num_res_blocks,
            "attention_resolutions": list(attention_resolutions),
            "num_heads": num_heads,
            "num_head_channels": num_head_channels,
            "num_classes": num_classes,
            "null_class": null_class,
            "use_scale_shift_norm": use_scale_shift_norm,
            "resblock_updown": resblock_updown,
            "conv_resample": conv_resample,
            "learn_sigma": learn_sigma,
            "dropout": dropout,
            "num_groups": num_groups,
            "temporal_kernel_size": temporal_kernel_size,
            "temporal_resolutions": list(temporal_resolutions),
            "causal": causal,
            "fps_conditioning": fps_conditioning,
        }

        def block(channels: int, out_channels: int, **options: Any) -> VideoResBlock:
            return VideoResBlock(channels, out_channels, temporal_kernel_size=temporal_kernel_size, **options)

        def attention(channels: int, level: int | None) -> Iterator[VideoAttention]:
            yield VideoAttention(
                channels, num_heads=num_heads, num_head_channels=num_head_channels, num_groups=num_groups, norm=norm,
                causal=causal,
            )  # fmt: skip

        super().__init__(config, in_channels * (2 if learn_sigma else 1), attention=attention, norm=norm, block=block)
        first = FrameConv(int(model_channels * channel_mult[0]), temporal_kernel_size)
        self.input_blocks[0].add_module("1", first)
        self.out_temporal_conv = FrameConv(self.out_channels, temporal_kernel_size)
        self._resample_frames(temporal_resolutions)
        self.fps_embedding: TimestepEmbedding | None = None
        if fps_conditioning:
            self.fps_embedding = TimestepEmbedding(model_channels, self.embedding_channels)
            zero_parameters(self.fps_embedding.linear_2)

    def _resample_frames(self, factors: Sequence[int]) -> None:
        """Let the stages that resample images at the end of these levels, and on the way back, do so in time too."""
        levels, stages = len(self._config["channel_mult"]), self._config["num_res_blocks"] + 1
        possible = [2**level for level in range(levels - 1)]
        if not set(factors) <= set(possible):
            raise ValueError(
                f"{type(self).__name__}: temporal_resolutions must be downsampling factors among {possible}, "
                f"got {list(factors)}"
            )
        for level, factor in enumerate(possible):
            if factor in factors:
                self.input_blocks[(level + 1) * stages].append(FrameResample("down"))
                self.output_blocks[(levels - 1 - level) * stages - 1].append(FrameResample("up"))

    @classmethod
    def from_image_model(cls, model: ImageUNet, **options: Any) -> Self:
        """A video model that does to each frame what ``model`` does to an image, and is to learn the time.

        Args:
            model: a :class:`UNet`, or a :class:`VideoUNet` with what it has learnt of time. Its weights are copied, its
                dtype, device and mode kept; the weights of further channels, where the first convolution here has such,
                begin at 0.
            options: arguments of the constructor that ``model`` does not have, and ``norm``. With
                ``temporal_resolutions`` the frames of a video do not stay what they were.

        Raises:
            ValueError: an option is not known or out of its range.
        """
        beside = {name: options.pop(name) for name in cls.beside_config if name in options}
        video = cls.from_config(model.config | options, **beside)
        weights = model.state_dict()
        first = weights["input_blocks.0.0.weight"]
        video.to(first.device, first.dtype)
        own = video.state_dict()
        weights["input_blocks.0.0.weight"] = _with_channels(first, own["input_blocks.0.0.weight"].shape[1])
        video.load_state_dict(own | weights)
        return video.train(model.training)

    @property
    def temporal_downsampling(self) -> int:
        """The factor between the first level and the last in time, which the frames of a video are divisible by."""
        return 2 ** len(set(self._config["temporal_resolutions"]))

    def forward(
        self,
        x: Tensor,
        timesteps: Tensor,
        y: Tensor | None = None,
        *,
        fps: Tensor | None = None,
        enable_time: bool = True,
    ) -> Tensor:
        """Apply the network.

        Args:
            x: videos [N, in_channels, F, H, W], or images [N, in_channels, H, W], in the dtype of the weights; either
                layout. H and W divisible by ``downsampling``, F by ``temporal_downsampling``.
            timesteps, y: as :meth:`UNet.forward` has them, one a video.
            fps: [N] or a scalar tensor, frames per second, of a model with ``fps_conditioning``; None adds nothing.
            enable_time: without it the frames stay apart, as so many images; as images do anyway.

        Returns:
            The shape of ``x`` with out_channels, in its dtype and layout.

        Raises:
            ValueError: a shape does not fit, or an argument is missing or superfluous; the message names it.
        """
        self._check_input(x, enable_time)
        return self._of_frames(x, x, self._embed_with_fps(x, timesteps, y, fps), enable_time)

    def _embed_with_fps(self, x: Tensor, timesteps: Tensor, y: Tensor | None, fps: Tensor | None) -> Tensor:
        embedding = self._embed(x, timesteps, y)
        if fps is None:
            return embedding
        if self.fps_embedding is None:
            raise ValueError(f"{type(self).__name__}: the model has no fps_conditioning, got fps")
        return embedding + self.fps_embedding(self._of_each("fps", fps, len(x)))

    def _of_frames(self, x: Tensor, inputs: Tensor, embedding: Tensor, enable_time: bool) -> Tensor:
        """The network on ``inputs``, ``x`` and what is concatenated with it; the result lies as ``x``."""
        n = len(x)
        if not n:  # how many frames are of one video their number then does not say
            return x.new_empty(0, self.out_channels, *x.shape[2:])
        if x.dim() == 4:
            return self._run(inputs, embedding=embedding, videos=None)
        videos = n if enable_time else None
        frames = inputs.movedim(1, -1).contiguous().flatten(0, 1).movedim(-1, 1)  # the channels innermost
        y = self.out_temporal_conv(self._run(frames, embedding=embedding, videos=videos), videos)
        y = y.unflatten(0, (n, x.shape[2])).transpose(1, 2)
        return y.contiguous() if x.is_contiguous() else y.contiguous(memory_format=torch.channels_last_3d)

    def _check_input(self, x: Tensor, enable_time: bool = True) -> None:
        name, channels = type(self).__name__, self.in_channels
        if x.dim() not in (4, 5) or x.shape[1] != channels:
            wanted = f"[N, {channels}, F, H, W] or [N, {channels}, H, W]"
            raise ValueError(f"{name}: x must be {wanted}, got shape {tuple(x.shape)}")
        self._check_size(x)
        factor = self.temporal_downsampling if enable_time else 1
        if x.dim() == 5 and (x.shape[2] % factor or not x.shape[2]):
            raise ValueError(f"{name}: the frames of x must be divisible by {factor}, got shape {tuple(x.shape)}")

    @classmethod
    def _config_of(cls, state: Mapping[str, Tensor]) -> dict[str, Any]:
        found = super()._config_of(state)
        return found | {
            "learn_sigma": len(state["out_conv.weight"]) == 2 * found["in_channels"],
            "temporal_kernel_size": state["input_blocks.0.1.weight"].shape[2],
            "fps_conditioning": "fps_embedding.linear_1.weight" in state,
        }


class FrameInterpolationUNet(VideoUNet):
    """A :class:`VideoUNet` that sees known frames and makes those between them: Make-A-Video's frame interpolation.

    Beside the noisy video go the known frames, zeros where a frame is not known, and a channel that is 1 where one is:
    :func:`known_frames` makes them.

    Args:
        in_channels, model_channels, options: as in :class:`VideoUNet`.

    :meth:`from_image_model` of a :class:`VideoUNet` begins with weights of 0 for what is known, and is that model.

    Raises:
        ValueError: an argument is out of its range; the message names it.
    """

    def __init__(self, in_channels: int = 3, model_channels: int = 128, **options: Any) -> None:
        super().__init__(in_channels, model_channels, **options)
        self._widen(2 * in_channels + 1)

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        timesteps: Tensor,
        known: Tensor,
        y: Tensor | None = None,
        *,
        fps: Tensor | None = None,
        enable_time: bool = True,
    ) -> Tensor:
        """Apply the network.

        Args:
            x: videos [N, in_channels, F, H, W].
            known: [N, in_channels + 1, F, H, W], as :func:`known_frames` makes it.
            timesteps, y, fps, enable_time: as :meth:`VideoUNet.forward` has them.

        Returns:
            [N, out_channels, F, H, W] in the dtype and layout of ``x``; of the frames that are known too.

        Raises:
            ValueError: as there, or ``known`` does not fit ``x``.
        """
        self._check_input(x, enable_time)
        wanted = (x.shape[0], self.in_channels + 1, *x.shape[2:])
        if known.shape != wanted:
            raise ValueError(
                f"{type(self).__name__}: known must be {list(wanted)}, got shape {tuple(known.shape)} for x of shape "
                f"{tuple(x.shape)}"
            )
        embedding = self._embed_with_fps(x, timesteps, y, fps)
        return self._of_frames(x, torch.cat([x, known], dim=1), embedding, enable_time)

    @classmethod
    def _config_of(cls, state: Mapping[str, Tensor]) -> dict[str, Any]:
        first = state["input_blocks.0.0.weight"]
        return super()._config_of({**state, "input_blocks.0.0.weight": first[:, : first.shape[1] // 2]})


def known_frames(frames: Tensor, stride: int) -> Tensor:
    """What :class:`FrameInterpolationUNet` is told of a video whose first, every ``stride``-th and last frame is known.

    Args:
        frames: [N, C, K, H, W].
        stride: at least 1.

    Returns:
        [N, C + 1, (K - 1) stride + 1, H, W]: the frames, zeros between them, and 1 where a frame is known, 0 where not.

    Raises:
        ValueError: ``frames`` has another shape, or ``stride`` is not positive.
    """
    if frames.dim() != 5 or not frames.shape[2]:
        raise ValueError(f"known_frames: frames must be [N, C, K, H, W], got shape {tuple(frames.shape)}")
    if stride < 1:
        raise ValueError(f"known_frames: stride must be positive, got {stride}")
    n, channels, k, height, width = frames.shape
    known = frames.new_zeros(n, channels + 1, (k - 1) * stride + 1, height, width)
    known[:, :channels, ::stride] = frames
    known[:, channels, ::stride] = 1
    return known


def _along_frames(layer: Callable[[Tensor], Tensor], x: Tensor, videos: int) -> Tensor:
    """``layer``, of videos [N, C, F, H, W], on frames [N F, C, H, W]; views where the channels are innermost."""
    video = x.unflatten(0, (videos, len(x) // videos)).transpose(1, 2)
    return layer(video).transpose(1, 2).flatten(0, 1)


def _with_channels(weight: Tensor, channels: int) -> Tensor:
    """The kernel with so many input channels, those that it has not at 0."""
    more = weight.new_zeros(weight.shape[0], channels - weight.shape[1], *weight.shape[2:])
    return torch.cat([weight, more], dim=1)
