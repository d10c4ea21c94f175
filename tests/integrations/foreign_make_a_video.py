"""Modules as make-a-video-pytorch writes them, in our words."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from .foreign_lucidrains import exists, of_frames, of_pixels, project


class PseudoConv3d(nn.Module):
    """Of make-a-video-pytorch."""

    def __init__(self, dim, dim_out, kernel_size=3, temporal_kernel_size=None, stride=1):
        super().__init__()
        along = temporal_kernel_size or kernel_size
        self.spatial_conv = nn.Conv2d(dim, dim_out, kernel_size, padding=kernel_size // 2)
        self.temporal_conv = nn.Conv1d(dim_out, dim_out, along, stride, padding=along // 2) if kernel_size > 1 else None

    def forward(self, x, enable_time=True):
        x = of_frames(self.spatial_conv, x)
        return of_pixels(self.temporal_conv, x) if x.dim() == 5 and enable_time and self.temporal_conv else x


class VideoRMSNorm(nn.Module):
    def __init__(self, chan, dim=1):
        super().__init__()
        self.dim = dim
        self.gamma = nn.Parameter(torch.ones(chan))

    def forward(self, x):
        ones = x.dim() - 1 - self.dim if self.dim >= 0 else -self.dim - 1
        return F.normalize(x, dim=self.dim) * x.shape[self.dim] ** 0.5 * self.gamma.reshape(-1, *[1] * ones)


class MakeAVideoBlock(nn.Module):
    def __init__(self, dim, dim_out):
        super().__init__()
        self.project, self.norm, self.act = PseudoConv3d(dim, dim_out), make_a_video.RMSNorm(dim_out), nn.SiLU()

    def forward(self, x, scale_shift=None, enable_time=False):
        x = self.norm(self.project(x, enable_time=enable_time))
        if exists(scale_shift):
            x = x * (scale_shift[0] + 1) + scale_shift[1]
        return self.act(x)


class Attend(nn.Module):
    """Of make-a-video-pytorch."""

    def __init__(self, dropout=0.0, flash=False, causal=False):
        super().__init__()
        self.dropout, self.attn_dropout, self.causal, self.flash = dropout, nn.Dropout(dropout), causal, flash

    def forward(self, q, k, v, bias=None):
        scores = q @ k.transpose(2, 3) / math.sqrt(q.shape[3])
        if exists(bias):
            scores = scores + bias
        if self.causal:
            i, j = scores.shape[2:]
            scores = scores.masked_fill(torch.ones(i, j).triu(j - i + 1).bool(), -torch.finfo(scores.dtype).max)
        return self.attn_dropout(scores.softmax(-1)) @ v


make_a_video = project(RMSNorm=VideoRMSNorm, Block=MakeAVideoBlock, Attend=Attend, PseudoConv3d=PseudoConv3d)
