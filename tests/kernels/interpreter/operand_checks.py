"""Raw ops called with too little: a ValueError that names the argument, before a kernel reads past the end. And sizes of one."""

import importlib
from unittest import mock

import pytest
import torch

from fastgen.reference import _layout
from tests.kernels.device import DEVICE, moved

modules = {
    name: importlib.import_module(f"fastgen.kernels.{name}")
    for name in ("group_norm", "philox_normal", "sampler_step", "q_sample", "diffusion_loss")
}
N, C, T, GROUPS = 2, 4, 5, 2
X = torch.randn(N, C, 3, 3, generator=torch.Generator().manual_seed(0))
IMAGE, SAMPLES, CHANNELS, MODULATION = X.shape, (N,), (C,), (N, C)
TIMES, SEEDS, TABLE = torch.tensor([1, 3]), torch.tensor([7, 8]), torch.linspace(0.2, 0.8, T)

# op -> its arguments by name, each in the right shape; the main one is not checked against itself.
CALLS = {
    "group_norm_fwd": {
        "input": X, "num_groups": GROUPS, "weight": X[0, :, 0, 0], "bias": X[0, :, 0, 1], "channel_bias": X[:, :, 0, 0],
        "scale": X[:, :, 0, 1], "shift": X[:, :, 0, 2], "eps": 1e-5, "activation": 1,
    },
    "group_norm_wide_fwd": {
        "input": X.half(), "num_groups": GROUPS, "weight": None, "bias": X[0, :, 0, 1], "channel_bias": None,
        "scale": X[:, :, 0, 1], "shift": None, "eps": 1e-5, "activation": 0,
    },
    "group_norm_bwd": {
        "grad_output": X, "input": X, "mean": X[:, :GROUPS, 0, 0], "rstd": X[:, :GROUPS, 0, 1].abs(), "num_groups": GROUPS,
        "weight": X[0, :, 0, 0], "bias": X[0, :, 0, 1], "channel_bias": X[:, :, 0, 0], "scale": X[:, :, 0, 1],
        "shift": X[:, :, 0, 2], "activation": 1,
    },
    "sampler_step_fwd": {
        "sample": X, "model_output": X, "table": torch.rand(T, 23), "step": 1, "uncond": X, "history": [X, X], "noise": X,
        "seeds": SEEDS, "variance": X, "mask": X, "known": X, "known_noise": X, "threshold": torch.ones(N),
        "return_prediction": True, "return_corrected": True,
    },
    "sampler_step_out": {
        "sample": X, "model_output": X, "table": torch.rand(T, 23), "step": 1, "uncond": None, "history": [X], "noise": X,
        "seeds": None, "variance": None, "mask": None, "known": None, "known_noise": None, "threshold": None,
        "out": X.clone(), "prediction": X.clone(), "corrected": X.clone(),
    },
    "q_sample_fwd": {
        "x0": X, "t": TIMES, "alphas": TABLE, "sigmas": TABLE, "noise": X, "seeds": None, "step": 0, "target": 2,
    },
    "q_sample_bwd": {
        "grad": X, "grad_target": X, "t": TIMES, "alphas": TABLE, "sigmas": TABLE, "target": 2, "wants_x0": True,
        "wants_noise": True,
    },
    "diffusion_loss_fwd": {
        "model_output": torch.cat([X, X], 1), "x0": X, "noise": X, "t": TIMES, "alphas": TABLE, "sigmas": TABLE,
        "weights": TABLE, "vlb_table": torch.rand(T, 3), "prediction": 0, "vlb_weight": 0.1,
    },
    "diffusion_loss_bwd": {
        "grad": torch.ones(N), "model_output": torch.cat([X, X], 1), "x0": X, "noise": X, "t": TIMES, "alphas": TABLE,
        "sigmas": TABLE, "weights": TABLE, "vlb_table": torch.rand(T, 3), "prediction": 2, "vlb_weight": 0.1,
    },
    "philox_normal": {"seeds": SEEDS, "shape": (N, C), "step": 3},
}  # fmt: skip
# What gives the sizes that others are held against: of them nothing can be too short.
MAIN = {
    "group_norm_fwd": "input", "group_norm_wide_fwd": "input", "group_norm_bwd": "input",
    "sampler_step_fwd": "sample", "sampler_step_out": "sample",
    "q_sample_fwd": "x0", "q_sample_bwd": "grad", "diffusion_loss_fwd": "x0", "diffusion_loss_bwd": "x0",
}  # fmt: skip


def call(op, arguments):
    family = next(name for name in modules if op.startswith(name))
    return getattr(modules[family], op)(*(moved(value, DEVICE) for value in arguments.values()))


def operands():
    for op, arguments in CALLS.items():
        for name, value in arguments.items():
            if name == "history" or (isinstance(value, torch.Tensor) and name not in (MAIN.get(op), "alphas", "table")):
                yield op, name


@pytest.mark.parametrize("op", CALLS)
def test_the_calls_are_right_as_they_stand(op):
    call(op, CALLS[op])


@pytest.mark.parametrize(("op", "name"), list(operands()))
@pytest.mark.parametrize("wrong", ["short", "of one", "flat"])
def test_an_operand_of_another_shape_is_refused(op, name, wrong):
    """Also one that would broadcast: a kernel takes every element from where it would lie."""
    cut = {"short": lambda t: t[:-1], "of one": lambda t: t[:1], "flat": lambda t: t.reshape(-1)[:-1]}[wrong]
    value = CALLS[op][name]
    arguments = {**CALLS[op], name: [value[0], cut(value[0])] if name == "history" else cut(value)}
    if op == "sampler_step_fwd" and name == "noise":
        arguments["seeds"] = None
    with pytest.raises(ValueError, match=f"^{op.removesuffix('_fwd').removesuffix('_out')}.*: .*{name}"):
        call(op, arguments)


@pytest.mark.parametrize(
    ("op", "change", "message"),
    [
        ("q_sample_fwd", {"alphas": TABLE[None]}, "alphas must have shape"),
        ("q_sample_fwd", {"alphas": TABLE[:-1]}, "sigmas must have shape"),
        ("q_sample_fwd", {"noise": None}, "either noise or seeds"),
        ("q_sample_fwd", {"t": TIMES.int()}, "t must be int64, got torch.int32"),
        ("q_sample_bwd", {"grad": None, "grad_target": None}, "grad or grad_target must be given"),
        ("diffusion_loss_bwd", {"model_output": X}, "model_output must have shape"),
        ("diffusion_loss_fwd", {"vlb_table": torch.rand(T, 2)}, "vlb_table must have shape"),
        ("diffusion_loss_fwd", {"noise": X[:1], "prediction": 1}, "noise must have shape"),  # not read there
        ("sampler_step_fwd", {"seeds": SEEDS.int()}, "seeds must be int64"),
        ("sampler_step_fwd", {"table": torch.rand(T, 22)}, "table must be .*23"),
        ("sampler_step_fwd", {"table": torch.rand(23)}, "table must be"),
        ("sampler_step_fwd", {"step": T}, "step must be in"),
        ("sampler_step_fwd", {"step": -1}, "step must be in"),
        ("sampler_step_fwd", {"mask": None}, "mask and known come together"),
        ("group_norm_fwd", {"num_groups": 3}, "num_groups must divide channels"),
        ("group_norm_bwd", {"num_groups": 1}, "mean must have shape"),
        ("philox_normal", {"shape": (N + 1, C)}, "seeds must have shape"),
    ],
)  # fmt: skip
def test_what_else_would_be_read_past_its_end_is_refused(op, change, message):
    with pytest.raises(ValueError, match=message):
        call(op, {**CALLS[op], **change})


def test_an_operand_on_another_device_is_refused():
    with pytest.raises(ValueError, match="q_sample_fwd: noise must be on cpu, got meta"):
        modules["q_sample"].q_sample_fwd(X, TIMES, TABLE, TABLE, X.to("meta"), None, 0, 2)


def ones():
    """Every argument of size one: an integer of 1 is a constant to Triton, and a table may have one row."""
    x = torch.tensor([[[[0.5]]]])
    t, seeds, table = torch.tensor([0]), torch.tensor([3]), torch.tensor([0.7])
    pair = torch.tensor([[[[0.4]], [[0.1]]]])
    bound = torch.tensor([[0.3, 2.0, 0.5]])
    step_table = torch.rand(1, 19, generator=torch.Generator().manual_seed(1))
    return {
        "group_norm_fwd": (x, 1, None, None, x[..., 0, 0], None, None, 1e-5, 1),
        "group_norm_bwd": (x, x, x[..., 0, 0], x[..., 0, 0], 1, None, None, None, None, None, 1),
        "sampler_step_fwd": (x, x, step_table, 0, None, [], None, seeds, *[None] * 5, False, False),
        "q_sample_fwd": (x, t, table, table, None, seeds, 1, 0),
        "q_sample_bwd": (x, x, t, table, table, 2, True, True),
        "diffusion_loss_fwd": (pair, x, x, t, table, table, table, bound, 0, 1.0),
        "diffusion_loss_bwd": (torch.ones(1), pair, x, x, t, table, table, table, bound, 2, 1.0),
        "philox_normal": (seeds, (1, 1), 1),
    }


@pytest.mark.parametrize("op", list(ones()))
def test_sizes_of_one(op):
    arguments = ones()[op]
    family = next(name for name in modules if op.startswith(name))
    reference = getattr(importlib.import_module(f"fastgen.reference.{family}"), op)
    actual = moved(getattr(modules[family], op)(*moved(arguments, DEVICE)), "cpu")
    expected = reference(*arguments)
    for a, e in zip(
        *((value,) if isinstance(value, torch.Tensor) else value for value in (actual, expected)), strict=True
    ):
        torch.testing.assert_close(a, e, rtol=2e-6, atol=2e-6)


def test_strides_are_computed_once_and_as_the_layout_rule_says():
    operands_module = importlib.import_module("fastgen.kernels._operands")
    for x in (X, X.contiguous(memory_format=torch.channels_last), X[:, :1], X.expand(N, C, 3, 3)[..., ::2]):
        with mock.patch.object(operands_module, "dense_strides", wraps=_layout.dense_strides) as computed:
            operands_module._strides.cache_clear()
            for _ in range(2):
                assert list(operands_module.dense(x, x).stride()) == _layout.output_strides(x) or 1 in x.shape
        assert computed.call_count == 1
