"""Small networks in files, as a user exports them."""

import torch
from torch import Tensor, nn


class Statistics(nn.Module):
    """[N, C, H, W] -> [N, 4]: the least value, the greatest, the mean, and the type: 1 of uint8, 0 of others."""

    def forward(self, x: Tensor) -> Tensor:
        y = x.float().flatten(1)
        kind = torch.full_like(y[:, :1], float(x.dtype == torch.uint8))
        return torch.cat([y.amin(1, keepdim=True), y.amax(1, keepdim=True), y.mean(1, keepdim=True), kind], dim=1)


class Flat(nn.Module):
    """The pixels, or what ``last`` makes of them."""

    def __init__(self, last: nn.Module | None = None) -> None:
        super().__init__()
        self.last = nn.Identity() if last is None else last

    def forward(self, x: Tensor) -> Tensor:
        return self.last(x.float().flatten(1))


class Rows(nn.Module):
    """As many numbers as the first pixel says, none of them fit to be features where it says so."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        y = x.float().flatten(1)
        if self.kind == "maps":
            return x.float()
        if self.kind == "integers":
            return y.long()
        if self.kind == "one row":
            return y[:1]
        return y[:, : int(x[0, 0, 0, 0])]


def script(path, network):
    torch.jit.script(network.eval()).save(str(path))
    return str(path)


def exported(path, network, example, dynamic=True):
    shapes = {"x": {0: torch.export.Dim("n", min=1, max=4096)}} if dynamic else None
    torch.export.save(torch.export.export(network.eval(), (example,), dynamic_shapes=shapes), str(path))
    return str(path)
