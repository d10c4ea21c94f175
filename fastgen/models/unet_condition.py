"""`UNetCondition`: the text-conditioned U-Net of latent diffusion, Stable Diffusion and SDXL.

Rombach et al. 2022; Podell et al. 2023. Sampling is in `fastgen.samplers`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from ..nn import GroupNorm, SpatialTransformer
from ._configured import check_positive, count
from ._image_unet import ImageUNet


class UNetCondition(ImageUNet):
    """A U-Net that predicts noise (or whatever it is trained for) from a noisy latent, a timestep and an embedded text.

    The defaults are Stable Diffusion 1.5. The others:

        UNetCondition(context_dim=1024, num_head_channels=64, use_linear_in_transformer=True)  # Stable Diffusion 2.1
        UNetCondition(  # SDXL
            channel_mult=(1, 2, 4), attention_resolutions=(2, 4), transformer_depth=(0, 2, 10), context_dim=2048,
            num_head_channels=64, use_linear_in_transformer=True, adm_in_channels=2816,
        )

    Args:
        in_channels: of the latent, and of what is concatenated to it.
        model_channels: width of the first level.
        out_channels: ``in_channels`` if None.
        channel_mult: width of each level, in units of ``model_channels``; each but the first halves the resolution.
        num_res_blocks: residual blocks a level (one more on the way up).
        attention_resolutions: downsampling factors (1, 2, 4, ...) whose levels have transformers; the middle always has.
        context_dim: channels of ``context``; None for a model without one, whose attention is to the image alone.
        transformer_depth: blocks of a transformer, a number or one a level.
        transformer_depth_middle: those in the middle; None for as many as at the last level.
        num_heads: attention heads; not used where ``num_head_channels`` is given.
        num_head_channels: channels of one head.
        use_linear_in_transformer: the projections around transformer blocks are linear layers, not 1x1 convolutions.
        num_classes: None, or the number of classes that ``y`` may take.
        null_class: one class more, number ``num_classes``, that stands for "no class".
        adm_in_channels: None, or the length of the vectors that ``y`` then holds; not together with ``num_classes``.
        use_scale_shift_norm, resblock_updown, conv_resample, dropout, num_groups: as in :class:`fastgen.models.UNet`.
        norm: class or factory of the norms, called as :class:`fastgen.nn.GroupNorm`; not part of ``config``. Beside
            :class:`fastgen.nn.PlainGroupNorm` everything is torch's own.

    State dicts of ``UNetModel`` of latent-diffusion, stable-diffusion and generative-models (sgm) load as they are, less
    the prefix that they have in a whole checkpoint; :meth:`from_state_dict` finds the sizes too, all but the heads:

        prefix, checkpoint = "model.diffusion_model.", load_file("v1-5.safetensors")
        state = {key.removeprefix(prefix): w for key, w in checkpoint.items() if key.startswith(prefix)}
        unet = UNetCondition.from_state_dict(state, num_heads=8)  # num_head_channels=64 for 2.1 and SDXL

    Not covered: ``dims`` other than 2, layers whose number or depth differs within a level, ``disable_self_attentions``,
    ``n_embed``, and sgm's ``num_classes`` of ``"continuous"`` and ``"timestep"``.

    Raises:
        ValueError: an argument is out of its range; the message names it.
    """

    foreign_keys: ClassVar = (
        (r"label_emb\.0\.(\d+)\.(.*)", r"vector_embedding.\1.\2"),
        *ImageUNet.foreign_keys,
    )

    def __init__(
        self,
        in_channels: int = 4,
        model_channels: int = 320,
        *,
        out_channels: int | None = None,
        channel_mult: Sequence[float] = (1, 2, 4, 4),
        num_res_blocks: int = 2,
        attention_resolutions: Sequence[int] = (1, 2, 4),
        context_dim: int | None = 768,
        transformer_depth: int | Sequence[int] = 1,
        transformer_depth_middle: int | None = None,
        num_heads: int = 8,
        num_head_channels: int | None = None,
        use_linear_in_transformer: bool = False,
        num_classes: int | None = None,
        null_class: bool = False,
        adm_in_channels: int | None = None,
        use_scale_shift_norm: bool = False,
        resblock_updown: bool = False,
        conv_resample: bool = True,
        dropout: float = 0.0,
        num_groups: int = 32,
        norm: Callable[..., nn.Module] = GroupNorm,
    ) -> None:
        depth = transformer_depth if isinstance(transformer_depth, int) else list(transformer_depth)
        config = {
            "in_channels": in_channels,
            "model_channels": model_channels,
            "out_channels": out_channels,
            "channel_mult": list(channel_mult),
            "num_res_blocks": num_res_blocks,
            "attention_resolutions": list(attention_resolutions),
            "context_dim": context_dim,
            "transformer_depth": depth,
            "transformer_depth_middle": transformer_depth_middle,
            "num_heads": num_heads,
            "num_head_channels": num_head_channels,
            "use_linear_in_transformer": use_linear_in_transformer,
            "num_classes": num_classes,
            "null_class": null_class,
            "adm_in_channels": adm_in_channels,
            "use_scale_shift_norm": use_scale_shift_norm,
            "resblock_updown": resblock_updown,
            "conv_resample": conv_resample,
            "dropout": dropout,
            "num_groups": num_groups,
        }
        depths = _depths(config)

        def attention(channels: int, level: int | None) -> Iterator[SpatialTransformer]:
            yield SpatialTransformer(
                channels, num_heads=num_heads, num_head_channels=num_head_channels, depth=depths[level], norm=norm,
                context_dim=context_dim, use_linear=use_linear_in_transformer, num_groups=num_groups,
            )  # fmt: skip

        super().__init__(config, out_channels or in_channels, attention=attention, norm=norm)
        self.context_dim = context_dim
        self.adm_in_channels = adm_in_channels
        self.vector_embedding: nn.Sequential | None = None
        if adm_in_channels is not None:
            self.vector_embedding = nn.Sequential(
                nn.Linear(adm_in_channels, self.embedding_channels),
                nn.SiLU(),
                nn.Linear(self.embedding_channels, self.embedding_channels),
            )

    def forward(self, x: Tensor, timesteps: Tensor, context: Tensor | None = None, y: Tensor | None = None) -> Tensor:
        """Apply the network.

        Args:
            x: [N, in_channels, H, W] in the dtype of the weights, NCHW or channels-last; H and W divisible by
                2^(levels - 1).
            timesteps: [N] or a scalar tensor; integers or fractions.
            context: [N, L, context_dim], the embedding of a text of L tokens.
            y: with ``adm_in_channels`` [N, adm_in_channels] numbers; with ``num_classes`` [N] integers below it, or
                ``null_label`` for no class; None means no class for all samples, where the model has a null class.

        Returns:
            [N, out_channels, H, W] in the dtype of ``x``.

        Raises:
            ValueError: a shape does not fit, or ``context`` or ``y`` is missing or superfluous; the message names it.
        """
        self._check_input(x)
        self._check_context(x, context)
        return self._run(x, embedding=self._embed(x, timesteps, y), context=context)

    def _embed(self, x: Tensor, timesteps: Tensor, y: Tensor | None) -> Tensor:
        if self.vector_embedding is None:
            return super()._embed(x, timesteps, y)
        shape = (x.shape[0], self.adm_in_channels)
        if y is None or y.shape != shape or not y.is_floating_point():
            given = "None" if y is None else f"shape {tuple(y.shape)} of {y.dtype}"
            name = type(self).__name__
            raise ValueError(f"{name}: y must be [N, adm_in_channels] = {list(shape)} numbers, got {given}")
        return super()._embed(x, timesteps, None) + self.vector_embedding(y)

    def _check_context(self, x: Tensor, context: Tensor | None) -> None:
        name, given = type(self).__name__, "None" if context is None else f"shape {tuple(context.shape)}"
        if self.context_dim is None:
            if context is not None:
                raise ValueError(f"{name}: the model takes no context (context_dim=None), got {given}")
        elif context is None or context.dim() != 3 or context.shape[::2] != (x.shape[0], self.context_dim):
            wanted = f"[N, L, context_dim] = [{x.shape[0]}, L, {self.context_dim}]"
            raise ValueError(f"{name}: context must be {wanted}, got {given}")

    @classmethod
    def _config_of(cls, state: Mapping[str, Tensor]) -> dict[str, Any]:
        found = super()._config_of(state)
        stages = found["num_res_blocks"] + 1
        firsts = [level * stages + 1 for level in range(len(found["channel_mult"]))]
        middle = "middle_block.1"
        if "vector_embedding.0.weight" in state:
            found["adm_in_channels"] = state["vector_embedding.0.weight"].shape[1]
        return found | {
            "out_channels": state["out_conv.weight"].shape[0],
            "context_dim": state[f"{middle}.transformer_blocks.0.attn2.to_k.weight"].shape[1],
            "transformer_depth": [count(state, rf"input_blocks\.{i}\.1\.transformer_blocks\.(\d+)\.") for i in firsts],
            "transformer_depth_middle": count(state, r"middle_block\.1\.transformer_blocks\.(\d+)\."),
            "use_linear_in_transformer": state[f"{middle}.proj_in.weight"].dim() == 2,
        }


def _depths(config: Mapping[str, Any]) -> dict[int | None, int]:
    """Transformer blocks by level, None being the middle. Raises ValueError for values no layer would name well."""
    name = "UNetCondition"
    check_positive(
        name, config, "out_channels", "context_dim", "adm_in_channels", "transformer_depth_middle", optional=True
    )
    if config["adm_in_channels"] is not None and config["num_classes"] is not None:
        raise ValueError(
            f"{name}: num_classes must be None where adm_in_channels is given, got {config['num_classes']} and "
            f"{config['adm_in_channels']}"
        )
    levels, depth, middle = len(config["channel_mult"]), config["transformer_depth"], config["transformer_depth_middle"]
    depths = [depth] * levels if isinstance(depth, int) else depth
    last = depths[-1] if depths else 1
    by_level: dict[int | None, int] = {**dict(enumerate(depths)), None: last if middle is None else middle}
    attended = [None, *(i for i in range(levels) if 2**i in config["attention_resolutions"])]
    if len(depths) != levels or not all(isinstance(d, int) for d in depths) or any(by_level[i] < 1 for i in attended):
        raise ValueError(
            f"{name}: transformer_depth must be an integer, or one for each of {levels} levels, positive where there is "
            f"attention, as in the middle, got {depth} and transformer_depth_middle={middle}"
        )
    return by_level
