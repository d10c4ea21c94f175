"""The structure of the PixelCNN in a tutorial of the UvA deep-learning course: the names of its weights, and what it computes."""

import torch
import torch.nn.functional as F
from torch import nn

DILATIONS = (1, 2, 1, 4, 1, 2, 1)


class Masked(nn.Module):
    """A convolution of which the kernel is multiplied by a mask that is 1 in the first ``read`` entries, row by row."""

    def __init__(self, inputs, outputs, kernel_size, read, dilation=1):
        super().__init__()
        rows, columns = kernel_size
        padding = (dilation * (rows // 2), dilation * (columns // 2))
        self.conv = nn.Conv2d(inputs, outputs, kernel_size, padding=padding, dilation=dilation)
        mask = (torch.arange(rows * columns) < read).to(self.conv.weight.dtype)
        self.register_buffer("mask", mask.view(1, 1, rows, columns))

    def forward(self, x):
        conv = self.conv
        return F.conv2d(x, conv.weight * self.mask, conv.bias, padding=conv.padding, dilation=conv.dilation)


class Layer(nn.Module):
    def __init__(self, n, dilation):
        super().__init__()
        self.conv_vert = Masked(n, 2 * n, (3, 3), 6, dilation)
        self.conv_horiz = Masked(n, 2 * n, (1, 3), 2, dilation)
        self.conv_vert_to_horiz = nn.Conv2d(2 * n, 2 * n, 1)
        self.conv_horiz_1x1 = nn.Conv2d(n, n, 1)

    def forward(self, v, h):
        above = self.conv_vert(v)
        beside = self.conv_horiz(h) + self.conv_vert_to_horiz(above)
        (a, b), (c, d) = above.chunk(2, 1), beside.chunk(2, 1)
        return a.tanh() * b.sigmoid(), h + self.conv_horiz_1x1(c.tanh() * d.sigmoid())


class PixelCNN(nn.Module):
    def __init__(self, inputs, n, dilations=DILATIONS, levels=256):
        super().__init__()
        self.levels = levels
        self.conv_vstack = Masked(inputs, n, (3, 3), 3)
        self.conv_hstack = Masked(inputs, n, (1, 3), 1)
        self.conv_layers = nn.ModuleList(Layer(n, dilation) for dilation in dilations)
        self.conv_out = nn.Conv2d(n, levels * inputs, 1)

    def forward(self, levels):
        x = levels.to(self.conv_out.weight.dtype) / (self.levels - 1) * 2 - 1
        v, h = self.conv_vstack(x), self.conv_hstack(x)
        for layer in self.conv_layers:
            v, h = layer(v, h)
        return self.conv_out(F.elu(h)).view(len(x), self.levels, -1, *x.shape[2:])
