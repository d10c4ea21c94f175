"""What crosses the dispatcher: every op has its files and functions, and the C++ enums have the orders of `fastgen._schema`."""

import re
from pathlib import Path

import pytest
import torch

from fastgen import _library, _schema
from fastgen.ops import COLUMNS, VLB_COLUMNS

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


def fields(file: str, name: str) -> list[str]:
    """The integers of a C++ struct, in order."""
    body = re.search(rf"struct {name} \{{[^\n]*\n\s*std::int64_t ([^;]*);", (CSRC / file).read_text())
    assert body, f"{file} has no struct {name} that begins with integers"
    return body.group(1).split(", ")


def test_programs_of_the_cpu_kernels():
    header = "cpu/incremental_program.h"
    assert tuple(enumerators(header, "Kind")) == _schema.INSTRUCTIONS
    assert tuple(enumerators(header, "Moment")) == _schema.MOMENTS
    assert tuple(enumerators(header, "Activation")) == _schema.NODE_ACTIVATIONS
    assert tuple(fields(header, "Buffer")) == _schema.BUFFER_COLUMNS
    assert tuple(enumerators("cpu/incremental.cpp", "DrawKind")) == _schema.DRAWS
    assert ("kind", *fields_after(header="cpu/incremental.cpp", name="Draw"), "step") == _schema.DRAW_COLUMNS


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
