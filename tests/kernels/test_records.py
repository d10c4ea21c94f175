"""The cache of compile gates: nothing that a record depends on may change without a miss, and a hit is what was measured."""

import importlib.util
import json

import pytest

from ..backends import requires_triton
from .test_compile import faults

pytestmark = requires_triton

SOURCE = """
import triton, triton.language as tl

@triton.jit
def helper(x):
    return x * {factor}

@triton.jit
def some_kernel(x, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(x + i, helper(tl.load(x + i, i < n, 0.0)) + {added}, i < n)
"""
OPTIONS = {"num_warps": 4}
RED = {
    "reg": 255, "stack": 64, "local": 0, "shared": 99999, "f64": ["mul.f64"], "loads": {"2": 8}, "stores": {"2": 8},
    "loads after a store": 1,
}  # fmt: skip
LAUNCH = {"case": "contiguous fp32", "kernel": "some_kernel", "aligned": True, "vectors": {"16": 32}}


@pytest.fixture
def record(monkeypatch, tmp_path):
    """`records.record_of` with an empty cache, and whether it compiled; compiling answers with a record over every budget."""
    from . import records

    compiled = []

    def measure(source, arch, options):
        compiled.append(source)
        return RED

    def record(source, arch=90, options=OPTIONS):
        before = len(compiled)
        return records.record_of(source, arch, options, cache=tmp_path / "cache"), len(compiled) > before

    monkeypatch.setattr(records, "measure", measure)
    return record


def source(tmp_path, factor="2.0", added="1.0", pointer="*fp32", block=128, above=""):
    from triton.compiler import ASTSource

    from . import records

    file = tmp_path / f"kernel_{abs(hash((factor, added, above)))}.py"
    file.write_text(above + SOURCE.format(factor=factor, added=added))
    spec = importlib.util.spec_from_file_location("some_kernels", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    records.forget_lines(module)
    signature = {"x": pointer, "n": "i32", "BLOCK": "constexpr"}
    return ASTSource(fn=module.some_kernel, signature=signature, constexprs={(2,): block}, attrs={})


def test_a_second_time_is_a_hit_and_red_again(record, tmp_path):
    assert record(source(tmp_path)) == (RED, True)
    again, compiled = record(source(tmp_path))
    assert not compiled
    assert [fault.partition(":")[0] for fault in faults({**LAUNCH, **again})] == [
        "spills", "fp64 instructions", "registers", "shared memory", "loads that wait for a store",
        "narrow loads or stores",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [{"added": "3.0"}, {"factor": "5.0"}, {"pointer": "*bf16"}, {"block": 256}],
    ids=lambda change: next(iter(change)),
)
def test_a_changed_source_or_signature_misses(record, tmp_path, change):
    """The kernel's own text, that of a function it calls, what it is called with."""
    record(source(tmp_path))
    assert record(source(tmp_path, **change))[1]


def test_what_stands_above_a_kernel_is_none_of_it(record, tmp_path):
    record(source(tmp_path))
    assert not record(source(tmp_path, above="import math\n\n"))[1]


def test_another_architecture_option_or_triton_misses(record, tmp_path, monkeypatch):
    record(source(tmp_path))
    assert record(source(tmp_path), arch=80)[1]
    assert record(source(tmp_path), options={"num_warps": 8})[1]
    monkeypatch.setattr("triton.__version__", "0.0.1")
    assert record(source(tmp_path))[1]


def test_only_whole_records_are_there(record, tmp_path):
    record(source(tmp_path))
    (file,) = (tmp_path / "cache").iterdir()
    assert json.loads(file.read_text()) == RED


def test_what_does_not_compile_is_no_record(record, tmp_path, monkeypatch):
    def fails(*_):
        raise RuntimeError("ptxas")

    with monkeypatch.context() as broken:
        broken.setattr("tests.kernels.records.measure", fails)
        with pytest.raises(RuntimeError, match="ptxas"):
            record(source(tmp_path))
    assert record(source(tmp_path))[1]
