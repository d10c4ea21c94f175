"""The network of `_conv_network.py` a few images at a time, where the convolutions at its ends have few channels.

What lies between the convolutions is the widest of a Glow: of all images at once it comes from the system anew in each step, a page
fault for each 4 KB, and goes through memory between any two operations. Of some images it stays in the cache. The 3x3 convolutions
are products of patches, which the library's GEMM does faster than its convolutions of few channels. The first hidden layer is
computed again in the backward pass, which costs less than to keep it.
"""

import threading
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

NUMBERS = 2**20  # of a hidden layer that are worked on at a time, of whole images
_KEPT = threading.local()
WIDER, WIDE = 8, 256  # hidden layers must be so many times as wide as the input and the output, and so wide


def applies(x: Tensor, last: Tensor) -> bool:
    """Whether products of patches are faster; ``last`` is the weight of the last convolution."""
    outputs, hidden = last.shape[:2]
    wide = hidden >= max(WIDER * max(x.shape[1], outputs), WIDE)
    return wide and x.dtype in (torch.float32, torch.float64) and x.numel() > 0


def forward(x: Tensor, added: Tensor | None, w1: Tensor, b1: Any, w2: Tensor, b2: Any, w3: Tensor, b3: Any) -> Any:
    """The output and what the backward pass reads: the second hidden layer, [positions, hidden]."""
    n, _, height, width = x.shape
    pixels = height * width
    rows = x.new_empty(n * pixels, w2.shape[0])
    patches, first, middle = _patches(x, ones=True), _first_weight(w1, b1), w2.flatten(1).t()
    blocks = _blocks(x, w1.shape[0])
    room = _room(x, blocks, w1.shape[0], 0)
    for images in blocks:
        part = slice(images.start * pixels, images.stop * pixels)
        h, out = _hidden(patches[part], first, added, images, room), rows[part]
        if b2 is None:
            torch.mm(h, middle, out=out)
        else:
            torch.addmm(b2, h, middle, out=out)
        out.relu_()
    return F.conv2d(rows.view(n, height, width, -1).movedim(3, 1), w3, b3, padding=1), rows


def backward(
    grad_output: Tensor, rows: Tensor, inputs: tuple[Tensor, ...], wanted: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """The gradients of ``inputs``: x, added, and weights and biases in turn."""
    x, added, w1, b1, w2, _, w3, _ = inputs
    n, channels, height, width = x.shape
    pixels, outputs, units, source = height * width, w3.shape[0], w2.shape[0], w1.shape[0]
    in_first, in_middle = any(wanted[:4]), any(wanted[:5])
    patches = _patches(x, ones=True) if in_middle else x
    given = _patches(grad_output)
    first, middle = _first_weight(w1, b1), w2.flatten(1)
    last = w3.flip(2, 3).permute(2, 3, 0, 1).reshape(9 * outputs, units)
    to_input = w1.permute(0, 2, 3, 1).reshape(source, 9 * channels)
    d_first = x.new_zeros(9 * channels + 1, source) if wanted[2] or wanted[3] else None
    d_middle = torch.zeros_like(middle) if wanted[4] else None
    d_b2 = x.new_zeros(units) if wanted[5] else None
    d_last = x.new_zeros(9 * outputs, units) if wanted[6] else None
    d_added = x.new_empty(n, source) if added is not None and wanted[1] else None
    to_x = x.new_empty(n * pixels, 9 * channels) if wanted[0] else None
    blocks = _blocks(x, source)
    rooms = [_room(x, blocks, size, which) for which, size in enumerate((units, source, source))]
    ones = x.new_ones(len(rooms[0]))
    for images in blocks:
        part = slice(images.start * pixels, images.stop * pixels)
        count = part.stop - part.start
        if d_last is not None:
            d_last.addmm_(given[part].t(), rows[part])
        if not any(wanted[:6]):
            continue
        grad = _through_relu(torch.mm(given[part], last, out=rooms[0][:count]), rows[part])
        if d_b2 is not None:
            d_b2.addmv_(grad.t(), ones[:count])
        if not in_middle:
            continue
        h = _hidden(patches[part], first, added, images, rooms[1])
        if d_middle is not None:
            d_middle.addmm_(grad.t(), h)
        if not in_first:
            continue
        grad = _through_relu(torch.mm(grad, middle, out=rooms[2][:count]), h)
        if d_added is not None:
            torch.sum(grad.view(-1, pixels, source), 1, out=d_added[images])
        if d_first is not None:
            d_first.addmm_(patches[part].t(), grad)
        if to_x is not None:
            torch.mm(grad, to_input, out=to_x[part])
    d_x = d_w1 = d_b1 = d_w3 = None
    if to_x is not None:
        d_x = _gathered(to_x, n, height, width)
    if d_first is not None:
        d_w1 = d_first[:-1].view(3, 3, channels, source).permute(3, 2, 0, 1).contiguous() if wanted[2] else None
        d_b1 = d_first[-1] if wanted[3] else None
    if d_last is not None:
        d_w3 = d_last.view(3, 3, outputs, units).flip(0, 1).permute(2, 3, 0, 1).contiguous()
    d_b3 = grad_output.sum((0, 2, 3)) if wanted[7] else None
    return d_x, d_added, d_w1, d_b1, None if d_middle is None else d_middle.view_as(w2), d_b2, d_w3, d_b3


def _blocks(x: Tensor, hidden: int) -> list[slice]:
    """The images in parts of nearly the same size."""
    n, each = len(x), max(NUMBERS // (x.shape[2] * x.shape[3] * hidden), 1)
    parts = -(-n // each)
    return [slice(i * n // parts, (i + 1) * n // parts) for i in range(parts)]


def _room(x: Tensor, blocks: list[slice], width: int, which: int) -> Tensor:
    """Memory for one block, which a thread keeps for its next step."""
    lines = max(b.stop - b.start for b in blocks) * x.shape[2] * x.shape[3]
    kept: dict[Any, Tensor] = _KEPT.__dict__
    key = f"{which} {x.dtype}"
    room = kept.get(key)
    if room is None or room.numel() < lines * width:
        room = x.new_empty(lines * width)
        if room.numel() <= NUMBERS:
            kept[key] = room
    return room[: lines * width].view(lines, width)


def _first_weight(weight: Tensor, bias: Tensor | None) -> Tensor:
    """[9 C + 1, hidden]: what patches with ones beside them are multiplied by."""
    product = weight.new_zeros(weight.shape[0], 9 * weight.shape[1] + 1)
    product[:, :-1] = weight.permute(0, 2, 3, 1).flatten(1)
    if bias is not None:
        product[:, -1] = bias
    return product.t()


def _patches(image: Tensor, *, ones: bool = False) -> Tensor:
    """[positions, 9 C]: what a 3x3 convolution sees at each position of a channels-last image, line by line, and perhaps a one."""
    n, channels, height, width = image.shape
    padded = F.pad(image.movedim(1, 3), (0, 0, 1, 1, 1, 1)).contiguous()
    s = padded.stride()
    seen = padded.as_strided((n, height, width, 3, 3 * channels), (s[0], s[1], s[2], s[1], 1))
    patches = image.new_empty(n, height, width, 9 * channels + ones)
    patches[..., : 9 * channels].unflatten(3, (3, 3 * channels)).copy_(seen)
    if ones:
        patches[..., -1] = 1
    return patches.flatten(0, 2)


def _hidden(patches: Tensor, weight: Tensor, added: Tensor | None, images: slice, room: Tensor) -> Tensor:
    h = torch.mm(patches, weight, out=room[: len(patches)])
    if added is not None:
        h.view(images.stop - images.start, -1, h.shape[1]).add_(added[images, None])
    return h.relu_()


def _gathered(parts: Tensor, n: int, height: int, width: int) -> Tensor:
    """[n, C, height, width]: the sum of what each position, of [positions, 9 C], gives to the nine around it."""
    parts = parts.view(n, height, width, 3, 3, -1)
    total = parts[:, :, :, 1, 1].clone()
    for i, j in ((0, 0), (0, 1), (0, 2), (1, 0), (1, 2), (2, 0), (2, 1), (2, 2)):
        (above, from_row), (beside, from_column) = _shifted(i - 1, height), _shifted(j - 1, width)
        total[:, above, beside] += parts[:, from_row, from_column, i, j]
    return total.movedim(3, 1)


def _shifted(by: int, size: int) -> tuple[slice, slice]:
    """Where ``by`` further lies inside, and whence."""
    return slice(max(by, 0), size + min(by, 0)), slice(max(-by, 0), size - max(by, 0))


def _through_relu(grad: Tensor, output: Tensor) -> Tensor:
    """``grad`` where ``output`` is positive, in its own memory."""
    torch.ops.aten.threshold_backward.grad_input(grad, output, 0, grad_input=grad)
    return grad
