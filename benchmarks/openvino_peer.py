"""OpenVINO as a baseline: a module converted to its own format and compiled for the CPU, as its users do."""

import importlib.util
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .cases import first_line

PRECISIONS = {"fp32": "f32", "bf16": "bf16"}


def converted(
    model: nn.Module, args: Sequence[Tensor], dtype: str, allow: bool, notes: list[str]
) -> Callable[..., Tensor] | None:
    """``model``, of float32 weights, as OpenVINO runs it: for shapes that are fixed, on torch's number of threads, in ``dtype``.

    The function takes float32 arguments in bfloat16 too, as OpenVINO wants them, and returns float32. Where there is none, or
    none is allowed, the answer is None and ``notes`` says why; what the conversion took stands there too.
    """
    if not allow or importlib.util.find_spec("openvino") is None:
        notes.append(f"openvino is not measured: {'it is not installed' if allow else 'conversions are switched off'}")
        return None
    if dtype not in PRECISIONS or any(arg.device.type != "cpu" for arg in args):
        notes.append(f"openvino is not measured: not for {dtype} on {args[0].device.type}")
        return None
    import openvino

    start = time.perf_counter()
    options = {
        "INFERENCE_PRECISION_HINT": PRECISIONS[dtype],
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
    }
    try:
        shapes = [tuple(arg.shape) for arg in args]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of tracing: a branch by shape is taken as it is for these shapes
            graph = openvino.convert_model(model, example_input=tuple(args), input=shapes)
        compiled = openvino.compile_model(graph, "CPU", options)
        request = compiled.create_infer_request()
    except Exception as error:  # an operation that it does not know, say: the case goes on without this baseline
        notes.append(f"openvino is not measured: {type(error).__name__}: {first_line(error)}")
        return None
    notes.append(
        f"openvino {openvino.__version__.split('-')[0]} took {time.perf_counter() - start:.0f} s to convert the model"
    )

    def call(*args: Tensor) -> Tensor:
        results: Any = request.infer([arg.numpy() for arg in args], share_inputs=True, share_outputs=True)
        return torch.from_numpy(results[0])

    return call


def of_float32(function: Callable[..., Tensor], x: Tensor, _: Tensor, *rest: Tensor) -> Tensor:
    """``function`` of the arguments in float32, in which OpenVINO takes them whatever it computes in."""
    return function(x, *(tensor.float() if tensor.is_floating_point() else tensor for tensor in rest))
