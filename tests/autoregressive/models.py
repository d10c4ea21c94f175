"""Small image-autoregressive networks of every kind that people write."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Masked(nn.Conv2d):
    """Zeroes its weights in place at every call; ``kind`` a leaves the centre out."""

    def __init__(self, kind: str, *args: int, **keywords: int) -> None:
        super().__init__(*args, **keywords)  # type: ignore[arg-type]
        height, width = self.weight.shape[2:]
        mask = torch.ones(height, width)
        mask[height // 2, width // 2 + (kind == "b") :] = 0
        mask[height // 2 + 1 :] = 0
        self.register_buffer("mask", mask)

    def forward(self, x: Tensor) -> Tensor:
        self.weight.data *= self.mask
        return super().forward(x)


class PixelCNN(nn.Module):
    """Masked convolutions with residuals; ``norm`` makes a module between them of its channels."""

    def __init__(self, norm=None, activation=F.relu, colors=1, outputs=3, channels=4, **keywords):
        super().__init__()
        self.first = Masked("a", colors, channels, 5, padding=2)
        self.layers = nn.ModuleList(Masked("b", channels, channels, 3, padding=1, **keywords) for _ in range(2))
        self.norms = nn.ModuleList(norm(channels) if norm else nn.Identity() for _ in range(2))
        self.head = nn.Conv2d(channels, outputs, 1)
        self.activation = activation

    def forward(self, x):
        h = self.first(x)
        skip = torch.zeros_like(h)
        for layer, norm in zip(self.layers, self.norms, strict=True):
            h = h + layer(self.activation(norm(h)))
            skip += h
        return self.head(self.activation(skip))


class ChannelNorm(nn.LayerNorm):
    """Over the channels of a position."""

    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class GatedLayer(nn.Module):
    """A vertical and a horizontal stack, made causal by padding and cropping."""

    def __init__(self, inputs, channels, first):
        super().__init__()
        self.first = first
        self.across = nn.Conv2d(inputs, channels, (1, 3), padding=(0, 1))
        self.down = nn.Conv2d(channels, 2 * channels, (2, 1), padding=(2, 0))
        self.beside = nn.Conv2d(inputs, 2 * channels, 1)
        self.link = nn.Conv2d(2 * channels, 2 * channels, 1)
        self.right = nn.Conv2d(inputs, 2 * channels, (1, 2), padding=(0, 1 + first))
        self.out = nn.Conv2d(channels, channels, 1)

    @staticmethod
    def gate(x):
        a, b = x.chunk(2, dim=1)
        return torch.tanh(a) * torch.sigmoid(b)

    def forward(self, v, h):
        height, width = v.shape[2:]
        down = self.down(self.across(v))[:, :, :height]
        side = self.right(h)[:, :, :, :width] + self.link(down)
        v = self.gate(down + self.beside(v) if not self.first else down)
        out = self.out(self.gate(side))
        return v, out if self.first else out + h


class Gated(nn.Module):
    """[N, levels, C, H, W] of an image of whole numbers."""

    def __init__(self, colors=1, levels=4, channels=4, classes=0):
        super().__init__()
        self.levels, self.colors = levels, colors
        self.layers = nn.ModuleList(GatedLayer(channels if i else colors, channels, i == 0) for i in range(3))
        self.head = nn.Conv2d(channels, levels * colors, 1)

    def forward(self, x):
        x = (x / (self.levels - 1)) * 2 - 1
        v = h = x
        for layer in self.layers:
            v, h = layer(v, h)
        out = self.head(F.elu(h))
        return out.reshape(len(out), self.levels, self.colors, *out.shape[2:])


def concat_elu(x):
    return F.elu(torch.cat([x, -x], dim=1))


class Shifted(nn.Module):
    """A convolution of what lies above (and left), by padding; weight norm; enlarging or reducing by 2."""

    def __init__(self, inputs, outputs, kernel, pad, stride=1, up=False):
        super().__init__()
        make = nn.ConvTranspose2d if up else nn.Conv2d
        conv = make(inputs, outputs, kernel, stride=stride, **({"output_padding": 1} if up else {}))
        self.conv = nn.utils.parametrizations.weight_norm(conv)
        self.pad, self.up, self.kernel = pad, up, kernel

    def forward(self, x):
        if not self.up:
            return self.conv(F.pad(x, self.pad))
        y, (height, width) = self.conv(x), self.kernel
        left, right = ((width - 1) // 2, (width - 1) // 2) if width == 3 else (0, width - 1)
        return y[:, :, : y.shape[2] - height + 1, left : y.shape[3] - right]


class Nin(nn.Module):
    """A linear layer over the channels, as people write it."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.linear = nn.Linear(inputs, outputs)

    def forward(self, x):
        n, c, h, w = x.shape
        y = self.linear(x.permute(0, 2, 3, 1).contiguous().view(n * h * w, c))
        return y.view(n, h, w, -1).permute(0, 3, 1, 2)


class Down(nn.Module):
    """PixelCNN++ in small: two streams, a level of half the size, shortcuts and a channel of ones."""

    def __init__(self, colors=3, outputs=6, channels=4):
        super().__init__()
        u, ul = (1, 1, 1, 0), (1, 0, 1, 0)  # left, right, top, bottom
        self.u_first = Shifted(colors + 1, channels, (2, 3), u)
        self.ul_above = Shifted(colors + 1, channels, (1, 3), (1, 1, 0, 0))
        self.ul_left = Shifted(colors + 1, channels, (2, 1), (0, 0, 1, 0))
        self.u_net = Shifted(2 * channels, channels, (2, 3), u)
        self.ul_net = Shifted(2 * channels, 2 * channels, (2, 2), ul)
        self.join = Nin(2 * channels, channels)
        self.u_half = Shifted(channels, channels, (2, 3), u, stride=2)
        self.ul_half = Shifted(channels, channels, (2, 2), ul, stride=2)
        self.u_twice = Shifted(channels, channels, (2, 3), u, stride=2, up=True)
        self.ul_twice = Shifted(channels, channels, (2, 2), ul, stride=2, up=True)
        self.dropout = nn.Dropout2d(0.5)
        self.head = Nin(channels, outputs)

    @staticmethod
    def down(x):
        return F.pad(x[:, :, :-1], (0, 0, 1, 0))

    @staticmethod
    def right(x):
        return F.pad(x[:, :, :, :-1], (1, 0, 0, 0))

    def block(self, u, ul):
        u = u + self.u_net(concat_elu(u))
        a, b = self.ul_net(self.dropout(concat_elu(ul + self.join(concat_elu(u))))).chunk(2, 1)
        return u, ul + a * torch.sigmoid(b)

    def forward(self, x):
        x = torch.cat([x, x.new_ones(len(x), 1, *x.shape[2:])], 1)
        u = self.down(self.u_first(x))
        ul = self.down(self.ul_above(x)) + self.right(self.ul_left(x))
        u, ul = self.block(u, ul)
        coarse = self.block(self.u_half(u), self.ul_half(ul))
        u, ul = u + self.u_twice(coarse[0]), ul + self.ul_twice(coarse[1])
        return self.head(F.elu(self.block(u, ul)[1]))


class Attending(nn.Module):
    """PixelSNAIL in small: kernels of 2 padded and cropped, positions as channels, attention; ``how`` it is written."""

    def __init__(self, how="explicit", heads=2, channels=4, outputs=2, strict=True):
        super().__init__()
        self.how, self.heads, self.strict = how, heads, strict
        self.first = Masked("a", 1, channels, 3, padding=1)
        self.conv = nn.Conv2d(channels, channels, 2, padding=1)
        self.q = nn.Conv2d(channels + 2, 2 * heads, 1)
        self.kv = nn.Conv2d(channels + 2 + (1 if strict else 0), 6 * heads, 1)
        self.attention = nn.Identity()
        self.head = nn.Conv2d(channels + 4 * heads, outputs, 1)

    def attend(self, q, k, v):
        length = q.shape[2]
        allowed = torch.ones(length, length, dtype=torch.bool).tril(-1 if self.strict else 0)
        if self.how == "causal":
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)
        if self.how == "mask":
            return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
        if self.how == "added":
            bias = torch.zeros(length, length).masked_fill(~allowed, -math.inf).to(q)
            return torch.softmax(q @ k.mT * 0.5 + bias, -1) @ v
        if self.how == "where":
            scores = torch.where(allowed, torch.einsum("nhqe,nhke->nhqk", q, k), torch.tensor(-1e9).to(q))
            return torch.einsum("nhqk,nhke->nhqe", scores.softmax(-1) * allowed, v)
        if self.how == "first row":
            scores = torch.matmul(q, k.mT).masked_fill(~allowed, -1e4)
            first = torch.arange(length)[:, None] > 0
            return (scores.softmax(3) * first.to(q)) @ v
        scores = (q @ k.transpose(2, 3)) / math.sqrt(q.shape[-1])
        weights = scores.masked_fill(~allowed, -math.inf).softmax(-1).masked_fill(~allowed, 0)
        return weights @ v

    def forward(self, x):
        n, _, height, width = x.shape
        h = self.first(x)
        h = h + F.elu(self.conv(F.elu(h)))[:, :, :height, :width]
        rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        places = torch.stack([rows / height, columns / width]).to(x).expand(n, 2, height, width)
        q = self.q(torch.cat([places, h], 1))
        kv = self.kv(torch.cat([places, h, x] if self.strict else [places, h], 1))
        k, v = kv.split([2 * self.heads, 4 * self.heads], 1)
        q, k, v = (t.view(n, self.heads, -1, height * width).transpose(2, 3) for t in (q, k, v))
        out = self.attention(self.attend(q, k, v)).transpose(2, 3).reshape(n, -1, height, width)
        return self.head(torch.cat([h, out], 1))


class WaveNet(nn.Module):
    """[N, C, T]: dilated convolutions, padded on the left."""

    def __init__(self, channels=4, outputs=3):
        super().__init__()
        self.first = nn.Conv1d(1, channels, 2)
        self.gates = nn.ModuleList(nn.Conv1d(channels, 2 * channels, 2, dilation=2**i) for i in range(3))
        self.skips = nn.ModuleList(nn.Conv1d(channels, channels, 1) for _ in range(3))
        self.head = nn.Conv1d(channels, outputs, 1)

    def forward(self, x):
        h = self.first(F.pad(x, (2, 0)))[:, :, :-1]
        total = 0
        for i, (gate, skip) in enumerate(zip(self.gates, self.skips, strict=True)):
            a, b = gate(F.pad(h, (2**i, 0))).chunk(2, 1)
            out = skip(torch.tanh(a) * torch.sigmoid(b))
            h, total = h + out, total + out
        return self.head(F.relu(total))


class Conditional(nn.Module):
    """Gated by an embedding of the class, or by a map of the image's size."""

    def __init__(self, channels=4, classes=3, maps=0):
        super().__init__()
        self.first = Masked("a", 1, channels, 3, padding=1)
        self.gate = Masked("b", channels, 2 * channels, 3, padding=1)
        self.condition = nn.Conv2d(maps, 2 * channels, 3, padding=1) if maps else nn.Embedding(classes, 2 * channels)
        self.maps = maps
        self.head = nn.Conv2d(channels, 2, 1)

    def forward(self, x, condition):
        c = self.condition(condition)
        a, b = (self.gate(F.relu(self.first(x))) + (c if self.maps else c[:, :, None, None])).chunk(2, 1)
        return self.head(a.tanh() * b.sigmoid())


class Embedded(nn.Module):
    """Whole numbers, embedded or one-hot."""

    def __init__(self, one_hot=False, levels=5, colors=2, width=3):
        super().__init__()
        self.levels, self.one_hot = levels, one_hot
        self.table = nn.Embedding(levels, width)
        self.conv = Masked("a", colors * (levels if one_hot else width), 4, 3, padding=1)
        self.head = nn.Conv2d(4, levels * colors, 1)

    def forward(self, x):
        n, _, height, width = x.shape
        e = F.one_hot(x.long(), self.levels).to(x.dtype) if self.one_hot else self.table(x.long())  # [N, C, H, W, E]
        return self.head(F.gelu(self.conv(e.permute(0, 1, 4, 2, 3).reshape(n, -1, height, width))))


def prepared(model: nn.Module) -> nn.Module:
    """In float64, nothing at its first value: biases, norms' weights, running statistics."""
    model = model.double().eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if tensor.is_floating_point() and tensor.dim() == 1 and "mask" not in name:
                tensor.copy_(
                    torch.rand_like(tensor) + 0.5 if "var" in name or "weight" in name else torch.randn_like(tensor)
                )
    return model
