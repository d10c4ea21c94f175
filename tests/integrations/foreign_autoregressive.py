"""Modules of the projects of PixelCNNs in our words, small: stand-ins know them by names, attributes and arguments."""

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Bernoulli


class CausalConv2d(nn.Conv2d):
    """Of pytorch-generative."""

    def __init__(self, mask_center, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.register_buffer("mask", raster_mask(self.weight, mask_center))

    def forward(self, x):
        self.weight.data *= self.mask
        return super().forward(x)


def raster_mask(weight, mask_center):
    height, width = weight.shape[2:]
    mask = torch.zeros_like(weight).detach().flatten(2)
    mask[:, :, : height // 2 * width + width // 2 + (not mask_center)] = 1
    return mask.view_as(weight)


class GatedActivation(nn.Module):
    def __init__(self, activation_fn=torch.tanh):
        super().__init__()
        self._activation_fn = activation_fn

    def forward(self, x):
        a, b = x.chunk(2, dim=1)
        return self._activation_fn(a) * torch.sigmoid(b)


class CausalAttention(nn.Module):
    def __init__(self, channels, n_heads=1, embed=4, out=4, mask_center=False, extra=0):
        super().__init__()
        self._n_heads, self._embed_channels, self._out_channels = n_heads, embed, out
        self._mask_center = mask_center
        self._q = nn.Conv2d(channels, embed, 1)
        self._kv = nn.Conv2d(channels + extra, embed + out, 1)
        self._proj = nn.Conv2d(out, out, 1)

    def forward(self, x, extra_x=None):
        n, _, height, width = x.shape
        q = self._q(x)
        k, v = self._kv(x if extra_x is None else torch.cat([x, extra_x], 1)).split(
            [self._embed_channels, self._out_channels], 1
        )
        q, k, v = (t.reshape(n, self._n_heads, -1, height * width).mT for t in (q, k, v))
        hidden = torch.ones(height * width, height * width).tril(-int(self._mask_center)) == 0
        scores = (q @ k.mT / q.shape[3] ** 0.5).masked_fill(hidden, -torch.inf)
        weights = scores.softmax(-1).masked_fill(hidden, 0)
        return self._proj((weights @ v).mT.reshape(n, -1, height, width))


def coin(logits):
    return Bernoulli(logits=logits).sample()


class GenerativeModel(ABC, nn.Module):
    def __call__(self, x):
        if getattr(self, "_c", None) is None and x.dim() == 4:
            for name, size in zip(("_c", "_h", "_w"), x.shape[1:], strict=True):
                self.register_buffer(name, torch.tensor(size))
        return super().__call__(x)

    @abstractmethod
    def sample(self, n_samples): ...


class AutoregressiveModel(GenerativeModel):
    def __init__(self, sample_fn=None):
        super().__init__()
        self._sample_fn = sample_fn or coin

    def _get_conditioned_on(self, n_samples, conditioned_on):
        assert n_samples is not None or conditioned_on is not None
        if conditioned_on is not None:
            return conditioned_on.clone()
        return -torch.ones(n_samples, self._c, self._h, self._w)

    @torch.no_grad()
    def sample(self, n_samples=None, conditioned_on=None):
        image = self._get_conditioned_on(n_samples, conditioned_on)
        for y in range(image.shape[2]):
            for x in range(image.shape[3]):
                drawn = self._sample_fn(self.forward(image)[:, :, y, x]).view(image.shape[:2])
                image[:, :, y, x] = torch.where(image[:, :, y, x] < 0, drawn, image[:, :, y, x])
        return image


class Snail(AutoregressiveModel):
    """Two convolutions, a gate and attention, all that pytorch-generative's models are made of."""

    def __init__(self, colors=1, outputs=1, sample_fn=None, between=None):
        super().__init__(sample_fn)
        self._input = CausalConv2d(True, colors, 8, 3, padding=1)
        self._causal = CausalConv2d(False, 8, 16, 3, padding=1)
        self._gate = GatedActivation()
        self._attention = CausalAttention(8, 2, 4, 8, True, extra=colors)
        self._between = between or nn.Identity()
        self._output = nn.Conv2d(8, outputs, 1)

    def forward(self, x):
        h = self._input(x)
        h = h + self._gate(self._causal(h))
        h = h + self._attention(h, x)
        return self._output(self._between(F.elu(h)))


class Vector(AutoregressiveModel):
    """An image as a vector, as FullyVisibleBeliefNetwork takes it: each pixel by what lies before it."""

    def __init__(self, dims):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(dims, dims))

    def forward(self, x):
        return (x.flatten(1) @ self.weight.tril(-1).T).view_as(x)


class OwnLoop(Snail):
    def sample(self, n_samples=None, conditioned_on=None):
        return torch.ones(n_samples, 1, 2, 2)


class MaskedConv2d(nn.Conv2d):
    """Of CompressAI."""

    def __init__(self, *args, mask_type="A", **kwargs):
        super().__init__(*args, **kwargs)
        self.register_buffer("mask", raster_mask(self.weight, mask_type == "A"))

    def forward(self, x):
        self.weight.data = self.weight.data * self.mask
        return super().forward(x)


class CheckerboardMaskedConv2d(MaskedConv2d):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        y, x = (torch.arange(size) for size in self.kernel_size)
        self.mask.copy_((y[:, None] + x) % 2)


class plus_plus:
    """Of pixel-cnn-pp: its names, one of which the tutorial has too."""

    @staticmethod
    def concat_elu(x):
        return F.elu(torch.cat([x, -x], dim=x.dim() - 3))

    class nin(nn.Module):
        def __init__(self, dim_in, dim_out):
            super().__init__()
            self.lin_a = nn.Linear(dim_in, dim_out)

        def forward(self, x):
            return self.lin_a(x.movedim(1, -1)).movedim(-1, 1)

    class shifted_conv2d(nn.Module):
        """Down or down and right, by the padding: left, right, top."""

        def __init__(self, channels, out, kernel=(2, 2), padding=(1, 0, 1)):
            super().__init__()
            self.pad, self.conv = nn.ZeroPad2d((*padding, 0)), nn.Conv2d(channels, out, kernel)

        def forward(self, x):
            return self.conv(self.pad(x))

    class gated_resnet(nn.Module):
        def __init__(self, num_filters, nonlinearity, skip_connection=0):
            super().__init__()
            self.skip_connection, self.nonlinearity = skip_connection, nonlinearity
            self.conv_input = plus_plus.shifted_conv2d(2 * num_filters, num_filters)
            if skip_connection:
                self.nin_skip = plus_plus.nin(2 * skip_connection * num_filters, num_filters)
            self.dropout = nn.Dropout2d(0.5)
            self.conv_out = plus_plus.shifted_conv2d(2 * num_filters, 2 * num_filters)

        def forward(self, og_x, a=None):
            x = self.conv_input(self.nonlinearity(og_x))
            if a is not None:
                x += self.nin_skip(self.nonlinearity(a))
            x, gate = self.conv_out(self.dropout(self.nonlinearity(x))).chunk(2, dim=1)
            return og_x + x * torch.sigmoid(gate)

    class PixelCNN(nn.Module):
        """One level, two blocks; the channel of ones is that of the first batch."""

        def __init__(self, nr_filters=8, nr_logistic_mix=2, input_channels=3):
            super().__init__()
            self.nr_logistic_mix, self.init_padding = nr_logistic_mix, None
            active = lambda x: plus_plus.concat_elu(x)  # noqa: E731
            self.u_init = plus_plus.shifted_conv2d(input_channels + 1, nr_filters, (2, 3), (1, 1, 1))
            self.ul_init = nn.ModuleList(
                [plus_plus.shifted_conv2d(input_channels + 1, nr_filters, (1, 3), (1, 1, 0)),
                 plus_plus.shifted_conv2d(input_channels + 1, nr_filters, (2, 1), (0, 0, 1))]
            )  # fmt: skip
            self.first = plus_plus.gated_resnet(nr_filters, active, 1)
            self.second = plus_plus.gated_resnet(nr_filters, active)
            self.nin_out = plus_plus.nin(nr_filters, (3 if input_channels == 1 else 10) * nr_logistic_mix)

        def forward(self, x, sample=False):
            ones = torch.ones(len(x), 1, *x.shape[2:])
            if not sample:
                self.init_padding = ones if self.init_padding is None else self.init_padding
                ones = self.init_padding
            x = torch.cat([x, ones], 1)
            above = F.pad(self.u_init(x), (0, 0, 1, -1))
            left = F.pad(self.ul_init[0](x), (0, 0, 1, -1)) + F.pad(self.ul_init[1](x), (1, -1))
            return self.nin_out(F.elu(self.second(self.first(left, a=above))))


class tutorial:
    """Of the UvA tutorial."""

    class MaskedConvolution(nn.Module):
        def __init__(self, c_in, c_out, mask, **kwargs):
            super().__init__()
            dilation = kwargs.get("dilation", 1)
            padding = tuple(dilation * (size // 2) for size in mask.shape)
            self.conv = nn.Conv2d(c_in, c_out, tuple(mask.shape), padding=padding, **kwargs)
            self.register_buffer("mask", mask[None, None])

        def forward(self, x):
            self.conv.weight.data *= self.mask
            return self.conv(x)

    class VerticalStackConvolution(MaskedConvolution):
        def __init__(self, c_in, c_out, kernel_size=3, mask_center=False, **kwargs):
            mask = torch.zeros(kernel_size, kernel_size)
            mask[: kernel_size // 2 + (not mask_center)] = 1
            super().__init__(c_in, c_out, mask, **kwargs)

    class HorizontalStackConvolution(MaskedConvolution):
        def __init__(self, c_in, c_out, kernel_size=3, mask_center=False, **kwargs):
            mask = torch.zeros(1, kernel_size, dtype=torch.bool)
            mask[:, : kernel_size // 2 + (not mask_center)] = True
            super().__init__(c_in, c_out, mask, **kwargs)

    class GatedMaskedConv(nn.Module):
        def __init__(self, c_in, **kwargs):
            super().__init__()
            self.conv_vert = tutorial.VerticalStackConvolution(c_in, 2 * c_in, **kwargs)
            self.conv_horiz = tutorial.HorizontalStackConvolution(c_in, 2 * c_in, **kwargs)
            self.conv_vert_to_horiz = nn.Conv2d(2 * c_in, 2 * c_in, 1)
            self.conv_horiz_1x1 = nn.Conv2d(c_in, c_in, 1)

        def forward(self, v_stack, h_stack):
            v = self.conv_vert(v_stack)
            h = self.conv_horiz(h_stack) + self.conv_vert_to_horiz(v)
            v, h = (a.tanh() * b.sigmoid() for a, b in (v.chunk(2, 1), h.chunk(2, 1)))
            return v, h_stack + self.conv_horiz_1x1(h)

    class PixelCNN(nn.Module):
        def __init__(self, c_in=1, c_hidden=8, levels=6):
            super().__init__()
            self.levels = levels
            self.conv_vstack = tutorial.VerticalStackConvolution(c_in, c_hidden, mask_center=True)
            self.conv_hstack = tutorial.HorizontalStackConvolution(c_in, c_hidden, mask_center=True)
            self.conv_layers = nn.ModuleList(
                [tutorial.GatedMaskedConv(c_hidden), tutorial.GatedMaskedConv(c_hidden, dilation=2)]
            )
            self.conv_out = nn.Conv2d(c_hidden, c_in * levels, 1)

        def forward(self, x):
            x = x.to(self.conv_out.weight.dtype) / 2 - 1
            v, h = self.conv_vstack(x), self.conv_hstack(x)
            for layer in self.conv_layers:
                v, h = layer(v, h)
            return self.conv_out(F.elu(h)).unflatten(1, (self.levels, -1))

        @torch.no_grad()
        def sample(self, img_shape, img=None):
            img = torch.full(img_shape, -1) if img is None else img
            _, colors, height, width = img_shape
            for y in range(height):
                for x in range(width):
                    for c in range(colors):
                        if (img[:, c, y, x] == -1).any():
                            logits: Tensor = self.forward(img[:, :, : y + 1])[:, :, c, y, x]
                            img[:, c, y, x] = torch.multinomial(logits.softmax(-1), 1)[:, 0]
            return img
