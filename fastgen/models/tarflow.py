"""`TarFlow`: an autoregressive flow over the patches of an image whose parameters causal transformers give.

Zhai et al. 2024 (Normalizing flows are capable generative models). Blocks go over the patches from first to last and from last to
first in turn.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from ..flows import CausalTransformerFlow, Compose, GaussSeidelJacobi, Guidance, Passes, ScaledNormal
from ..flows.transform import Context, no_log_det
from ._configured import check_positive, count
from ._flow_model import FlowModel

Jacobi = GaussSeidelJacobi | Mapping[int, GaussSeidelJacobi] | None


class TarFlow(FlowModel):
    """A density of images [N, in_channels, image_size, image_size], and the latent [N, T, D] of T patches of D numbers.

    State dicts of ml-tarflow's `Model` load as they are, and :meth:`from_state_dict` finds their config. The paper trains images
    in [-1, 1] with noise of a small deviation added, samples, and takes the noise out of the samples again (:meth:`denoise`).

    From image to latent all patches are done at once. Back they come one after the other: without gradients on a CPU that is one
    call a block, from weights packed once, with memory for keys and values taken once
    (:func:`fastgen.ops.causal_transformer_inverse`); ``jacobi`` does segments of patches at once instead, which pays where a pass
    over many patches costs little more than one over one, on a GPU. Each block's inverse goes from patch to patch, so it cannot be
    trained by recomputation (:func:`fastgen.flows.reversible`) at a price anybody would pay.

    Args:
        in_channels, image_size: of images.
        patch_size: of square patches; divides ``image_size``.
        channels: of the transformers.
        num_blocks: of the flow.
        layers_per_block: of each block's transformer.
        nvp: whether scales are learned; otherwise volumes are kept, and the variances of the latent are (:meth:`update_prior`).
        num_classes: of labels; None for a model without. A label of -1, and no labels at all, stand for the mean of the classes.
        head_channels: of a head of the attention; divides ``channels``.
        expansion: of the transformers' MLPs.

    Raises:
        ValueError: an argument is out of its range; the message names it.

    Example::

        model = TarFlow(1, 28, 4, 128, num_blocks=4, layers_per_block=4, num_classes=10)
        model.loss(images + 0.1 * torch.randn_like(images), labels).backward()
        samples = model.sample(10, torch.arange(10), seeds=range(10), guidance=Guidance(1.0), noise_std=0.1)
    """

    foreign_keys: ClassVar = (
        (r"blocks\.\d+\.attn_mask", ""),
        (r"blocks\.(.*)", r"transform.transforms.\1"),
        (r"var", "base.variance"),
    )
    base: ScaledNormal

    def __init__(
        self,
        in_channels: int = 3,
        image_size: int = 64,
        patch_size: int = 2,
        channels: int = 768,
        *,
        num_blocks: int = 8,
        layers_per_block: int = 8,
        nvp: bool = True,
        num_classes: int | None = None,
        head_channels: int = 64,
        expansion: int = 4,
    ) -> None:
        config = {
            "in_channels": in_channels,
            "image_size": image_size,
            "patch_size": patch_size,
            "channels": channels,
            "num_blocks": num_blocks,
            "layers_per_block": layers_per_block,
            "nvp": nvp,
            "num_classes": num_classes,
            "head_channels": head_channels,
            "expansion": expansion,
        }
        _check_config(config)
        features, tokens = in_channels * patch_size**2, (image_size // patch_size) ** 2
        blocks = [
            CausalTransformerFlow(
                features,
                tokens,
                channels,
                num_layers=layers_per_block,
                head_channels=head_channels,
                expansion=expansion,
                scaled=nvp,
                num_classes=num_classes,
                reverse=i % 2 == 1,
            )
            for i in range(num_blocks)
        ]
        super().__init__(config, Compose(blocks), (in_channels, image_size, image_size))
        self.base = ScaledNormal((tokens, features))
        self.patch_size, self.num_classes = patch_size, num_classes

    def patches(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, T, D]: patches in raster order, each with its channels outermost."""
        p = self.patch_size
        return x.unflatten(3, (-1, p)).unflatten(2, (-1, p)).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)

    def image(self, tokens: Tensor) -> Tensor:
        """[N, T, D] -> [N, C, H, W]; the other way round than :meth:`patches`."""
        p, side = self.patch_size, self.shape[1] // self.patch_size
        parts = tokens.unflatten(2, (-1, p, p)).unflatten(1, (side, side))  # [N, h, w, C, p, p]
        return parts.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)

    def trace(self, x: Tensor, labels: Tensor | None = None) -> tuple[list[Tensor], Tensor]:
        """The outputs of all blocks, [N, T, D] each, of which the last is the latent; and the log-det [N]."""
        z, labels = self._checked(x), cast(Tensor | None, self._context(labels))
        outputs, log_det = [], no_log_det(x)
        for block in self.blocks:
            z, term = block(z, labels)
            outputs.append(z)
            log_det = log_det + term
        return outputs, log_det

    def loss(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        """What is trained: half the mean square of the latent less the log-det of a number, which is -log p of one but for a
        constant.
        """
        z, log_det = self(x, labels)
        return 0.5 * z.square().mean() - log_det.mean() / math.prod(self.shape)

    def update_prior(self, z: Tensor, rate: float = 0.1) -> None:
        """Move the latent's variances towards those of a batch of latents: once a step of training with ``nvp=False``."""
        self.base.update(z, rate)

    def inverse(
        self,
        z: Tensor,
        context: Context = None,
        *,
        guidance: Guidance | None = None,
        jacobi: Jacobi = None,
        passes: list[Passes] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Latent [N, T, D] -> (images, log |det d image / d latent|, [N]).

        Args:
            z: the latent.
            context: labels [N], or None.
            guidance: away from the model without labels, of a model with classes.
            jacobi: :class:`fastgen.flows.GaussSeidelJacobi` for all blocks, or by the number of the block (as :meth:`forward`
                counts them) for some; the others go patch by patch, exactly.
            passes: a list to which the :class:`fastgen.flows.Passes` of each block that iterates are added, the last block first.

        Raises:
            ValueError: a shape does not fit, or guidance is for a model without classes.
        """
        if tuple(z.shape[1:]) != self.base.shape:
            raise ValueError(f"TarFlow: z must be [N, {', '.join(map(str, self.base.shape))}], got {tuple(z.shape)}")
        if guidance is not None and guidance.active and self.num_classes is None:
            raise ValueError("TarFlow: guidance is for a model with classes, num_classes is None")
        labels, log_det = self._context(context), no_log_det(z)
        if labels is not None and len(cast(Tensor, labels)) != len(z):
            raise ValueError(
                f"TarFlow: context must be labels [N] = [{len(z)}], got {tuple(cast(Tensor, labels).shape)}"
            )
        for i, block in reversed(list(enumerate(self.blocks))):
            options = jacobi.get(i) if isinstance(jacobi, Mapping) else jacobi
            z, term = block.inverse(z, labels, guidance=guidance, jacobi=options, passes=passes)
            log_det = log_det + term
        return self.image(z), log_det

    def sample(
        self,
        n: int,
        context: Context = None,
        *,
        seeds: Tensor | Sequence[int] | None = None,
        temperature: float = 1.0,
        guidance: Guidance | None = None,
        noise_std: float = 0.0,
        jacobi: Jacobi = None,
        passes: list[Passes] | None = None,
    ) -> Tensor:
        """[n, C, H, W] samples.

        Args:
            n: how many.
            context: labels [n], or None.
            seeds, temperature: as in :meth:`fastgen.flows.Flow.sample`.
            guidance, jacobi, passes: as in :meth:`inverse`.
            noise_std: of the noise that the model was trained with: it is taken out by :meth:`denoise`. 0 leaves it.

        Raises:
            ValueError: an argument does not fit; the message names it.
        """
        with torch.no_grad():
            z = self._drawn(n, context, seeds, temperature)
            x, _ = self.inverse(z, context, guidance=guidance, jacobi=jacobi, passes=passes)
        return self.denoise(x, noise_std, context) if noise_std else x

    def denoise(self, x: Tensor, noise_std: float, context: Context = None) -> Tensor:
        r"""The mean of the images without noise, given those with it.

        .. math:: \hat x = x + \sigma^2 \nabla_x \log p(x \mid labels)

        Args:
            x: [N, C, H, W], of the density of noisy images.
            noise_std: sigma of the noise.
            context: labels [N], or None.

        Sources: Efron 2011 (Tweedie's formula and selection bias); Zhai et al. 2024, section 2.4.
        """
        if not 0 <= noise_std < math.inf:
            raise ValueError(f"TarFlow: noise_std must be finite and not negative, got {noise_std}")
        noisy = x.detach().requires_grad_()
        with torch.enable_grad():
            (score,) = torch.autograd.grad(self.log_prob(noisy, context).sum(), noisy)
        return torch.add(x.detach(), score, alpha=noise_std**2)

    @property
    def blocks(self) -> list[CausalTransformerFlow]:
        """In the order from image to latent."""
        return cast(list[CausalTransformerFlow], list(cast(Compose, self.transform).transforms))

    def _checked(self, x: Tensor) -> Tensor:
        """``x`` as patches."""
        return self.patches(super()._checked(x))

    def _context(self, context: Context) -> Context:
        if context is None:
            return None
        if self.num_classes is None:
            raise ValueError("TarFlow: context must be None for a model without classes")
        fits = isinstance(context, Tensor) and context.dim() == 1 and not context.is_floating_point()
        if not fits or (context.is_cpu and len(context) and int(context.max()) >= self.num_classes):  # type: ignore[union-attr, arg-type]
            got = f"{context.dtype} of shape {tuple(context.shape)}" if isinstance(context, Tensor) else type(context)
            raise ValueError(f"TarFlow: context must be labels [N], integers below {self.num_classes}, got {got}")
        return context

    @classmethod
    def _config_of(cls, state: Mapping[str, Tensor]) -> dict[str, Any]:
        """A patch of 3 p^2 numbers is taken for one of 3 channels, another for one of a single channel."""
        first = "transform.transforms.0."
        channels, features = state[f"{first}proj_in.weight"].shape
        in_channels = 3 if features % 3 == 0 and math.isqrt(features // 3) ** 2 * 3 == features else 1
        patch = math.isqrt(features // in_channels)
        classes = state.get(f"{first}class_embed")
        return {
            "in_channels": in_channels,
            "image_size": patch * math.isqrt(state[f"{first}pos_embed"].shape[0]),
            "patch_size": patch,
            "channels": channels,
            "num_blocks": count(state, r"transform\.transforms\.(\d+)\."),
            "layers_per_block": count(state, r"transform\.transforms\.0\.attn_blocks\.(\d+)\."),
            "nvp": state[f"{first}proj_out.weight"].shape[0] != features,
            "num_classes": None if classes is None else classes.shape[0],
            "expansion": state[f"{first}attn_blocks.0.mlp.main.0.weight"].shape[0] // channels,
        }


def _check_config(config: Mapping[str, Any]) -> None:
    name = "TarFlow"
    check_positive(name, config, "in_channels", "image_size", "patch_size", "channels", "num_blocks")
    check_positive(name, config, "layers_per_block", "head_channels", "expansion")
    check_positive(name, config, "num_classes", optional=True)
    for whole, part in (("image_size", "patch_size"), ("channels", "head_channels")):
        if config[whole] % config[part]:
            raise ValueError(f"{name}: {part} must divide {whole}, got {config[part]} and {config[whole]}")
