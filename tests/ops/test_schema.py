"""What crosses the dispatcher: every op has its files and functions, and the C++ enums have the orders of `fastgen._schema`."""

import re
from pathlib import Path

import pytest
import torch

from fastgen import _library, _schema
from fastgen.ops import COLUMNS, VLB_COLUMNS
from fastgen.reference._spline import Numbers

CSRC = Path(__file__).parents[2] / "csrc"


def enumerators(file: str, name: str) -> list[str]:
    """The enumerators of a C++ enum as snake case: ``kClipMin`` -> ``clip_min``."""
    body = re.search(rf"enum (?:class )?{name}\b[^{{]*\{{([^}}]*)\}}", (CSRC / file).read_text())
    assert body, f"{file} has no enum {name}"
    words = re.findall(r"k([A-Z]\w*)", body.group(1))
    return [re.sub(r"(?<!^)(?=[A-Z])", "_", word).lower() for word in words]


def test_columns_of_the_cpu_kernels():
    assert tuple(enumerators("cpu/sampler_step.cpp", "Column")) == (*COLUMNS, "num_columns")
    assert tuple(enumerators("cpu/diffusion_loss.cpp", "VlbColumn")) == (*VLB_COLUMNS, "num_vlb_columns")


def test_prediction_types_of_the_cpu_kernels():
    short = {"v_prediction": "velocity", "flow_prediction": "flow"}
    expected = [short.get(name, name) for name in _schema.PREDICTION_TYPES]
    assert enumerators("common/timesteps.h", "Prediction") == expected


def test_activations_of_the_cpu_kernels():
    assert tuple(enumerators("cpu/gated_activation.cpp", "Activation")) == _schema.GATED_ACTIVATIONS


def test_codes_of_couplings_of_the_cpu_kernels():
    header = "cpu/affine_coupling_plan.h"
    assert tuple(enumerators("cpu/affine_coupling_scale.h", "Scale")) == _schema.COUPLING_SCALES
    assert tuple(enumerators(header, "Center")) == tuple(name or "none" for name in _schema.COUPLING_CENTERS)
    assert tuple(enumerators(header, "Order")) == _schema.COUPLING_ORDERS
    assert tuple(enumerators(header, "Layout")) == _schema.COUPLING_LAYOUTS
    assert tuple(enumerators(header, "Mask")) == _schema.COUPLING_MASKS
    assert tuple(enumerators(header, "Code")) == (*_schema.COUPLING_CODES, "num_codes")


def test_splines_of_the_cpu_kernels():
    assert tuple(enumerators("cpu/_spline.h", "Tails")) == ("linear", "circular", "none")
    assert tuple(str(tails).lower() for tails in _schema.SPLINE_TAILS) == ("linear", "circular", "none")
    kinds = enumerators("cpu/_spline.h", "Parametrization")
    assert tuple(kinds) == _schema.SPLINE_PARAMETRIZATIONS
    numbers = enumerators("cpu/_spline_definition.h", "Number")
    assert (*_schema.SPLINE_NUMBERS, "num_numbers") == tuple(numbers) and Numbers._fields == _schema.SPLINE_NUMBERS


def test_layouts_of_the_cpu_kernels():
    assert tuple(enumerators("cpu/squeeze.cpp", "Order")) == _schema.SQUEEZE_ORDERS
    assert tuple(enumerators("cpu/gaussian_log_prob.cpp", "Layout")) == _schema.GAUSSIAN_LAYOUTS


def fields(file: str, name: str) -> list[str]:
    """The integers of a C++ struct, in order."""
    body = re.search(rf"struct {name} \{{[^\n]*\n\s*std::int64_t ([^;]*);", (CSRC / file).read_text())
    assert body, f"{file} has no struct {name} that begins with integers"
    return body.group(1).split(", ")


def test_programs_of_the_cpu_kernels():
    header = "cpu/incremental_program.h"
    assert tuple(enumerators(header, "Kind")) == _schema.INSTRUCTIONS
    assert tuple(enumerators(header, "Moment")) == _schema.MOMENTS
    assert tuple(enumerators("cpu/_node_activation.h", "NodeActivation")) == _schema.NODE_ACTIVATIONS
    assert tuple(fields(header, "Buffer")) == _schema.BUFFER_COLUMNS
    assert tuple(enumerators("cpu/incremental.cpp", "DrawKind")) == _schema.DRAWS
    assert ("kind", *fields_after(header="cpu/incremental.cpp", name="Draw"), "step") == _schema.DRAW_COLUMNS


def test_programs_of_masked_networks():
    header = "cpu/_masked_network.h"
    for name, columns in (
        ("Layer", _schema.NETWORK_LAYER),
        ("Level", _schema.NETWORK_LEVEL),
        ("Task", _schema.NETWORK_TASK),
        ("Header", _schema.NETWORK_HEADER),
    ):
        assert tuple(fields(header, name)) == columns
    assert tuple(enumerators("cpu/autoregressive_inverse.cpp", "Scale")) == _schema.AUTOREGRESSIVE_SCALES


def fields_after(header: str, name: str) -> list[str]:
    """The integers of a C++ struct behind its first member."""
    body = re.search(rf"struct {name} \{{[^\n]*\n[^;]*;\n\s*std::int64_t ([^;]*);", (CSRC / header).read_text())
    assert body, f"{header} has no struct {name} whose second members are integers"
    return body.group(1).split(", ")


@pytest.mark.parametrize("op", _schema.FAMILY_OF)
def test_every_op_is_defined_with_its_reference_its_fake_and_its_check(op):
    assert str(getattr(torch.ops.fastgen, op).default._schema).startswith(f"fastgen::{op}(")
    module = _library.reference(op)
    assert module.__name__ == f"fastgen.reference.{_schema.FAMILY_OF[op]}"
    assert all(callable(getattr(module, op + part)) for part in ("", "_fake", "_check"))
    for key, expected in (("CompositeExplicitAutograd", True), ("CUDA", _schema.FAMILY_OF[op] not in _schema.CPU_ONLY)):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fastgen::{op}", key) == expected


def test_an_op_belongs_to_one_family():
    assert sum(len(ops) for ops in _schema.SCHEMAS.values()) == len(_schema.FAMILY_OF)
    for family, ops in _schema.SCHEMAS.items():
        assert all(op == family or op.startswith(f"{family}_") for op in ops)
