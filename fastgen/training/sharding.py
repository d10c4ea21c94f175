"""A model spread over the ranks by FSDP2: what is gathered together, and how whole tensors become shares and back.

Zhao et al. 2023 (PyTorch FSDP: experiences on scaling fully sharded data parallel); `torch.distributed.fsdp.fully_shard`. Each rank
keeps a share of every weight, of its moments and of its average; a layer's weights are whole while it computes, and no longer.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from ..flows.multi_scale import Split
from ..flows.reversible import Reversible

LEAST_SHARE = 0.01  # of all weights: what has fewer is gathered with the rest, for each gathering has its latency


def shard(objective: nn.Module, model: nn.Module, average: nn.Module, world_size: int, device: torch.device) -> None:
    """Spread ``model``, which ``objective`` calls, and its ``average`` over ranks that all have the same of both.

    Weights may be on the CPU still: each layer goes to ``device`` by itself.
    """
    mesh = init_device_mesh(device.type, (world_size,))
    shares: dict[nn.Parameter, nn.Parameter] = {}
    for module in average.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter not in shares:  # of another layer too
                share = distribute_tensor(parameter.detach().to(device), mesh, [Shard(0)], src_data_rank=None)
                shares[parameter] = nn.Parameter(share, requires_grad=False)
            module.register_parameter(name, shares[parameter])
    average.to(device)  # buffers
    least = LEAST_SHARE * _size(model)
    for layer in layers(model):
        if _size(layer) >= least:
            fully_shard(layer, mesh=mesh)
    fully_shard(objective, mesh=mesh)


def layers(module: nn.Module, listed: bool = False) -> Iterator[nn.Module]:
    """What is called as a whole in the loss, the largest of it that stands in a list: nothing reads its weights from outside.

    The layers of a :class:`Reversible` do not count, which its backward pass calls otherwise, nor does a :class:`Split`, whose
    density is asked for and not its forward.
    """
    if isinstance(module, Split):
        return
    if type(module) is nn.ModuleList:
        for child in module:
            yield from layers(child, listed=True)
    elif listed or isinstance(module, nn.ModuleList | Reversible):
        yield module
    else:
        for child in module.children():
            yield from layers(child)


def whole(tensor: Tensor) -> Tensor:
    """A share as the whole tensor, on the CPU; what is no share as it is. Called by all ranks."""
    return tensor.full_tensor().cpu() if isinstance(tensor, DTensor) else tensor


def put(tensor: Tensor, value: Tensor) -> None:
    """Copy ``value``, whole, into ``tensor`` or into the share that it is."""
    if isinstance(tensor, DTensor):
        value = distribute_tensor(value, tensor.device_mesh, tensor.placements, src_data_rank=None)
    tensor.copy_(value)


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
