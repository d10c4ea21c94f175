"""The U-Net of guided-diffusion in our words, blocks and all: what its stand-ins know it by."""

import torch
from torch import Tensor, nn

from . import foreign


class TimestepEmbedSequential(nn.Sequential):
    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        for layer in self:
            x = layer(x, emb) if isinstance(layer, foreign.ResBlock) else layer(x)
        return x


class CheckpointFunction(torch.autograd.Function):
    """Their own, which keeps what it is given and computes it again."""

    @staticmethod
    def forward(ctx, run, length, *args):
        ctx.run, ctx.inputs, ctx.parameters = run, args[:length], args[length:]
        with torch.no_grad():
            return ctx.run(*ctx.inputs)

    @staticmethod
    def backward(ctx, grad):
        ctx.inputs = [x.detach().requires_grad_(True) for x in ctx.inputs]
        with torch.enable_grad():
            output = ctx.run(*(x.view_as(x) for x in ctx.inputs))
        return None, None, *torch.autograd.grad(output, (*ctx.inputs, *ctx.parameters), grad, allow_unused=True)


class ResBlock(foreign.ResBlock):
    """With their own checkpoints."""

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        if not self.use_checkpoint:
            return self._forward(x, emb)
        return CheckpointFunction.apply(self._forward, 2, x, emb, *self.parameters())


class UNetModel(nn.Module):
    def __init__(self, width: int = 16, ckpt: bool = False, block: type[nn.Module] = ResBlock) -> None:
        super().__init__()
        emb, wide = 4 * width, 2 * width
        block_of = lambda c, out=None: block(c, emb, out, scale_shift=True, ckpt=ckpt)  # noqa: E731
        self.time_embed = nn.Sequential(nn.Linear(1, emb), nn.SiLU(), nn.Linear(emb, emb))
        self.input_blocks = nn.ModuleList([
            TimestepEmbedSequential(nn.Conv2d(3, width, 3, padding=1)),
            TimestepEmbedSequential(block_of(width)),
            TimestepEmbedSequential(nn.Conv2d(width, width, 3, stride=2, padding=1)),
            TimestepEmbedSequential(block_of(width, wide)),
        ])  # fmt: skip
        self.middle_block = TimestepEmbedSequential(block_of(wide), block_of(wide))
        self.output_blocks = nn.ModuleList([
            TimestepEmbedSequential(block_of(2 * wide, wide)),
            TimestepEmbedSequential(block_of(wide + width, wide), foreign.Twice()),
            TimestepEmbedSequential(block_of(wide + width, width)),
            TimestepEmbedSequential(block_of(2 * width, width)),
        ])  # fmt: skip
        self.out = nn.Sequential(foreign.GroupNorm32(4, width), nn.SiLU(), nn.Conv2d(width, 3, 3, padding=1))

    def forward(self, x: Tensor, timesteps: Tensor) -> Tensor:
        emb = self.time_embed(timesteps.to(x.dtype)[:, None] / 1000)
        hs, h = [], x
        for module in self.input_blocks:
            h = module(h, emb)
            hs.append(h)
        h = self.middle_block(h, emb)
        for module in self.output_blocks:
            h = torch.cat([h, hs.pop()], dim=1)
            h = module(h, emb)
        return self.out(h)


class SuperResModel(UNetModel):
    def forward(self, x: Tensor, timesteps: Tensor) -> Tensor:
        return super().forward(x, timesteps)
