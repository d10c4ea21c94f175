"""`CapturedSampler`: a whole trajectory, the model included, as one CUDA graph that is replayed for other seeds."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..ops.philox_normal import check_seeds
from .guidance import Model
from .loop import prepare
from .solvers import Solver

_REFUSED = frozenset({"seeds", "generator", "noise", "brownian", "known", "mask", "callback", "progress"})


class CapturedSampler:
    """Like `sample`, captured once: a call sets the seeds and replays the graph, with no work for Python in between.

    Worth it where launches cost more than kernels: small batches, many steps. The shape, the steps, the conditions and the
    memory are fixed at capture; so is the model, whose weights may be changed in place only.

    Args:
        model, shape, solver, steps: see :func:`fastgen.samplers.sample`.
        warm_up: trajectories followed before the capture, so that every kernel is compiled and every workspace there.
        kwargs: further arguments of :func:`sample`, but for the noise, which comes from the seeds of each call, inpainting and
            callbacks.

    Raises:
        ValueError: the device is no CUDA device, or an argument makes no sense in a graph.
        RuntimeError: the model does something that a graph cannot hold; the message says what usually does.
    """

    def __init__(
        self,
        model: Model | None,
        shape: Sequence[int],
        solver: Solver | str,
        *,
        steps: int,
        warm_up: int = 2,
        **kwargs: Any,
    ) -> None:
        refused = sorted(_REFUSED & set(kwargs))
        if refused:
            raise ValueError(
                f"CapturedSampler takes no {refused}: the graph draws its noise from the seeds of each call"
            )
        run, _ = prepare(model, shape, solver, steps=steps, seeds=[0] * int(shape[0]), **kwargs)
        device, seeds = run.source.device, run.source.seeds
        _check_cuda(device)
        if seeds is None:
            raise AssertionError("a source made with seeds has them")
        self._seeds = seeds

        def trajectory() -> Tensor:
            return run.follow(run.source.initial())

        self._graph, self._samples = capture(trajectory, device, warm_up=max(warm_up, 1))

    def __call__(self, seeds: Tensor | Sequence[int]) -> Tensor:
        """The samples of ``seeds`` [N]; new memory, which the next call does not touch."""
        given = check_seeds("CapturedSampler", seeds, self._seeds.device)
        if len(given) != len(self._seeds):
            raise ValueError(f"seeds must be one a sample ({len(self._seeds)}), got {len(given)}")
        with torch.cuda.device(self._seeds.device):
            self._seeds.copy_(given)
            self._graph.replay()
            return self._samples.clone()


def _check_cuda(device: torch.device) -> None:
    if device.type != "cuda":
        raise ValueError(f"a CUDA graph needs a CUDA device, got {device}")


@torch.no_grad()
def capture(work: Callable[[], Tensor], device: torch.device, *, warm_up: int) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """Run ``work`` ``warm_up`` times and capture it once, on ``device`` and a stream of its own.

    The caller's device and stream are current again afterwards, also where it fails: torch leaves its own stream current where
    the end of a capture raises.

    Returns:
        The graph, and the tensor that each replay writes.

    Raises:
        RuntimeError: the capture failed; the message says what usually is the reason.
    """
    with torch.cuda.device(device):
        before, own = torch.cuda.current_stream(device), torch.cuda.Stream(device)
        try:
            own.wait_stream(before)
            with torch.cuda.stream(own):
                for _ in range(warm_up):
                    work()
            before.wait_stream(own)
            graph = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(graph, stream=own):
                    result = work()
            except RuntimeError as error:
                raise RuntimeError(
                    "the loop could not be captured in a CUDA graph. The usual reasons are a model that waits for the device "
                    "(.item(), .cpu(), a branch on a tensor's value), moves tensors from the host, or draws from a generator "
                    f"that is not registered with the graph; sample() does without a graph. CUDA said: {error}"
                ) from error
        finally:
            torch.cuda.set_stream(before)
    return graph, result
