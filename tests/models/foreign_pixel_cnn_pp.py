"""The structure of `pixel-cnn-pp`, the PyTorch port of PixelCNN++: the names of its weights, what it computes, and its loss."""

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import weight_norm

CENTRED, CORNER = (2, 3), (2, 2)


class Conv(nn.Module):
    """Padded above, and on both sides or on the left, so that it is causal; ``moved``: the output by one down or right."""

    def __init__(self, inputs, outputs, kernel_size, stride=1, moved=None):
        super().__init__()
        rows, columns = kernel_size
        self.moved = moved
        sides = ((columns - 1) // 2,) * 2 if columns == 3 else (columns - 1, 0)
        self.pad = nn.ZeroPad2d((*sides, rows - 1, 0))
        self.conv = weight_norm(nn.Conv2d(inputs, outputs, kernel_size, stride))

    def forward(self, x):
        x = self.conv(self.pad(x))
        if self.moved == "down":
            return F.pad(x, (0, 0, 1, 0))[:, :, :-1]
        return F.pad(x, (1, 0, 0, 0))[..., :-1] if self.moved == "right" else x


class Deconv(nn.Module):
    def __init__(self, n, kernel_size):
        super().__init__()
        self.columns = kernel_size[1]
        self.deconv = weight_norm(nn.ConvTranspose2d(n, n, kernel_size, 2, output_padding=1))

    def forward(self, x):
        x = self.deconv(x)[:, :, :-1]
        return x[..., 1:-1] if self.columns == 3 else x[..., :-1]


class Nin(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.lin_a = weight_norm(nn.Linear(inputs, outputs))

    def forward(self, x):
        return self.lin_a(x.movedim(1, -1)).movedim(-1, 1)


def concat_elu(x):
    return F.elu(torch.cat([x, -x], 1))


class Resnet(nn.Module):
    def __init__(self, n, kernel_size, skips):
        super().__init__()
        self.conv_input = Conv(2 * n, n, kernel_size)
        if skips:
            self.nin_skip = Nin(2 * skips * n, n)
        self.conv_out = Conv(2 * n, 2 * n, kernel_size)

    def forward(self, x, a=None):
        h = self.conv_input(concat_elu(x))
        if a is not None:
            h = h + self.nin_skip(concat_elu(a))
        a, b = self.conv_out(concat_elu(h)).chunk(2, 1)
        return x + a * b.sigmoid()


class Stage(nn.Module):
    def __init__(self, n, blocks, skips):
        super().__init__()
        self.u_stream = nn.ModuleList(Resnet(n, CENTRED, skips) for _ in range(blocks))
        self.ul_stream = nn.ModuleList(Resnet(n, CORNER, skips + 1) for _ in range(blocks))


class PixelCNN(nn.Module):
    def __init__(self, nr_resnet, n, mixtures, inputs):
        super().__init__()
        self.down_layers = nn.ModuleList(Stage(n, blocks, 1) for blocks in (nr_resnet, nr_resnet + 1, nr_resnet + 1))
        self.up_layers = nn.ModuleList(Stage(n, nr_resnet, 0) for _ in range(3))
        self.downsize_u_stream = nn.ModuleList(Conv(n, n, CENTRED, 2) for _ in range(2))
        self.downsize_ul_stream = nn.ModuleList(Conv(n, n, CORNER, 2) for _ in range(2))
        self.upsize_u_stream = nn.ModuleList(Deconv(n, CENTRED) for _ in range(2))
        self.upsize_ul_stream = nn.ModuleList(Deconv(n, CORNER) for _ in range(2))
        self.u_init = Conv(inputs + 1, n, CENTRED, moved="down")
        self.ul_init = nn.ModuleList(
            [Conv(inputs + 1, n, (1, 3), moved="down"), Conv(inputs + 1, n, (2, 1), moved="right")]
        )
        self.nin_out = Nin(n, mixtures * (3 if inputs == 1 else 10))

    def forward(self, x):
        x = F.pad(x, (0, 0, 0, 0, 0, 1), value=1.0)  # a channel of ones
        us, uls = [self.u_init(x)], [self.ul_init[0](x) + self.ul_init[1](x)]
        for i, stage in enumerate(self.up_layers):
            for u_block, ul_block in zip(stage.u_stream, stage.ul_stream, strict=True):
                us.append(u_block(us[-1]))
                uls.append(ul_block(uls[-1], us[-1]))
            if i < 2:
                us.append(self.downsize_u_stream[i](us[-1]))
                uls.append(self.downsize_ul_stream[i](uls[-1]))
        u, ul = us.pop(), uls.pop()
        for i, stage in enumerate(self.down_layers):
            for u_block, ul_block in zip(stage.u_stream, stage.ul_stream, strict=True):
                u = u_block(u, us.pop())
                ul = ul_block(ul, torch.cat([u, uls.pop()], 1))
            if i < 2:
                u, ul = self.upsize_u_stream[i](u), self.upsize_ul_stream[i](ul)
        return self.nin_out(F.elu(ul))


def sigmoid(z):
    return (1 + math.tanh(z / 2)) / 2


def loss_of_a_pixel(logits, pixel):
    """-log p of the 1 or 3 values of one pixel in [-1, 1], 256 levels, by the port's parameters ``logits`` [3 M or 10 M]."""
    channels = len(pixel)
    mixtures = len(logits) // (3 if channels == 1 else 10)
    weights = logits[:mixtures].softmax(0)
    parts = logits[mixtures:].view(channels, -1, mixtures)
    total = 0.0
    for m in range(mixtures):
        probability = weights[m].item()
        for c in range(channels):
            mean, scale = parts[c, 0, m].item(), math.exp(max(parts[c, 1, m].item(), -7.0))
            if c == 1:
                mean += math.tanh(parts[0, 2, m].item()) * pixel[0]
            if c == 2:
                mean += math.tanh(parts[1, 2, m].item()) * pixel[0] + math.tanh(parts[2, 2, m].item()) * pixel[1]
            upper = 1.0 if pixel[c] > 0.999 else sigmoid((pixel[c] + 1 / 255 - mean) / scale)
            lower = 0.0 if pixel[c] < -0.999 else sigmoid((pixel[c] - 1 / 255 - mean) / scale)
            probability *= upper - lower
        total += probability
    return -math.log(total)
