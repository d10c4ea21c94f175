"""The structure of `pytorch-generative`'s PixelCNN, Gated PixelCNN and PixelSNAIL: the names of its weights, and what it computes.

Images are in [0, 1], and masked weights are not zero in a fresh state dict.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn


class CausalConv(nn.Conv2d):
    def __init__(self, sees_itself, *args):
        super().__init__(*args, padding=args[2] // 2)
        mask = torch.zeros_like(self.weight)
        k = args[2]
        mask.view(*mask.shape[:2], -1)[..., : k * k // 2 + sees_itself] = 1
        self.register_buffer("mask", mask)

    def forward(self, x):
        return F.conv2d(x, self.weight * self.mask, self.bias, padding=self.padding)


class Shaped(nn.Module):
    """The project keeps the shape of the image in three buffers, once a model has been called."""

    def remember(self, x):
        for name, size in zip(("_c", "_h", "_w"), x.shape[1:], strict=True):
            self.register_buffer(name, torch.tensor(size))


class PixelCNNBlock(nn.Module):
    def __init__(self, n):
        super().__init__()
        self._net = nn.Sequential(
            nn.ReLU(), nn.Conv2d(n, n // 2, 1), nn.ReLU(), CausalConv(1, n // 2, n // 2, 3), nn.ReLU(), nn.Conv2d(n // 2, n, 1)
        )  # fmt: skip

    def forward(self, x):
        return x + self._net(x)


def relu_head(channels, head, outputs):
    return nn.Sequential(nn.ReLU(), nn.Conv2d(channels, head, 1), nn.ReLU(), nn.Conv2d(head, outputs, 1))


class PixelCNN(Shaped):
    def __init__(self, inputs, outputs, depth, width, head):
        super().__init__()
        self._input = CausalConv(0, inputs, 2 * width, 7)
        self._causal_layers = nn.ModuleList(PixelCNNBlock(2 * width) for _ in range(depth))
        self._head = relu_head(2 * width, head, outputs)

    def forward(self, x):
        self.remember(x)
        x = self._input(x)
        for layer in self._causal_layers:
            x = x + layer(x)  # x a second time
        return self._head(x)


def gate(x, activation=torch.tanh):
    a, b = x.chunk(2, 1)
    return activation(a) * torch.sigmoid(b)


class GatedLayer(nn.Module):
    def __init__(self, inputs, width, k, first):
        super().__init__()
        half, self.first = k // 2, first
        self._vstack_1xN = nn.Conv2d(inputs, width, (1, k), padding=(0, half))
        self._vstack_Nx1 = nn.Conv2d(width, 2 * width, (half + 1, 1), padding=(half + 1, 0))
        self._vstack_1x1 = nn.Conv2d(inputs, 2 * width, 1)
        self._link = nn.Conv2d(2 * width, 2 * width, 1)
        self._hstack_1xN = nn.Conv2d(inputs, 2 * width, (1, half + 1), padding=(0, half + first))
        self._hstack_residual = nn.Conv2d(width, width, 1)
        self._hstack_skip = nn.Conv2d(width, width, 1)

    def forward(self, v, h):
        rows, columns = v.shape[2:]
        above = self._vstack_Nx1(self._vstack_1xN(v))[:, :, :rows]
        g = gate(self._link(above) + self._hstack_1xN(h)[..., :columns])
        out = self._hstack_residual(g)
        return gate(above + self._vstack_1x1(v)), out if self.first else out + h, self._hstack_skip(g)


class GatedPixelCNN(Shaped):
    def __init__(self, inputs, outputs, depth, width, head):
        super().__init__()
        self._input = GatedLayer(inputs, width, 7, 1)
        self._gated_layers = nn.ModuleList(GatedLayer(width, width, 3, 0) for _ in range(depth))
        self._head = relu_head(width, head, outputs)

    def forward(self, x):
        self.remember(x)
        v, h, total = self._input(x, x)
        for layer in self._gated_layers:
            v, h, skip = layer(v, h)
            total = total + skip
        return self._head(total)


class SNAILResidual(nn.Module):
    def __init__(self, n):
        super().__init__()
        self._input_conv = nn.Conv2d(n, n, 2, padding=1)
        self._output_conv = nn.Conv2d(n, 2 * n, 2, padding=1)

    def forward(self, x):
        rows, columns = x.shape[2:]
        h = F.elu(self._input_conv(F.elu(x)))[:, :, :rows, :columns]
        return x + gate(self._output_conv(h)[:, :, :rows, :columns], lambda a: a)


class SNAILAttention(nn.Module):
    def __init__(self, n, extra, keys, values):
        super().__init__()
        self.sizes = [keys, values]
        self._q = nn.Conv2d(n, keys, 1)
        self._kv = nn.Conv2d(n + extra, keys + values, 1)
        self._proj = nn.Conv2d(values, values, 1)

    def forward(self, x, image):
        q = self._q(x).flatten(2)
        k, v = self._kv(torch.cat([x, image], 1)).flatten(2).split(self.sizes, 1)
        out = torch.zeros_like(v)
        for i in range(1, q.shape[2]):  # each pixel attends to those before it
            scores = torch.einsum("ne,nel->nl", q[:, :, i], k[:, :, :i]) / math.sqrt(self.sizes[0])
            out[:, :, i] = torch.einsum("nl,nvl->nv", scores.softmax(1), v[:, :, :i])
        return self._proj(out.view(*out.shape[:2], *x.shape[2:]))


class SNAILBlock(nn.Module):
    def __init__(self, n, inputs, residuals, keys, values):
        super().__init__()
        self._residual = nn.Sequential(*(SNAILResidual(n) for _ in range(residuals)))
        self._attention = SNAILAttention(n + 2, inputs, keys, values)
        self._residual_out = nn.Conv2d(n, n, 1)
        self._attention_out = nn.Conv2d(values, n, 1)
        self._out = nn.Conv2d(n, n, 1)

    def forward(self, x, image):
        n, _, height, width = image.shape
        rows = (torch.arange(height).to(image) / height - 0.5).view(1, 1, -1, 1).expand(n, 1, height, width)
        columns = (torch.arange(width).to(image) / width - 0.5).view(1, 1, 1, -1).expand(n, 1, height, width)
        res = self._residual(x)
        attended = self._attention(torch.cat([rows, columns, res], 1), image)
        total = F.elu(self._residual_out(F.elu(res))) + F.elu(self._attention_out(F.elu(attended)))
        return F.elu(self._out(F.elu(total)))


class PixelSNAIL(Shaped):
    def __init__(self, inputs, outputs, n, blocks, residuals, keys, values):
        super().__init__()
        self._input = CausalConv(0, inputs, n, 3)
        self._pixel_snail_blocks = nn.ModuleList(SNAILBlock(n, inputs, residuals, keys, values) for _ in range(blocks))
        self._output = nn.Sequential(nn.Conv2d(n, n // 2, 1), nn.Conv2d(n // 2, outputs, 1))

    def forward(self, x):
        self.remember(x)
        image, x = x, self._input(x)
        for block in self._pixel_snail_blocks:
            x = x + block(x, image)
        return self._output(x)
