"""Which backend takes a call, and the sentences of those that do not."""

import importlib.util
import sys
from types import ModuleType

import pytest
import torch

from fastgen import _dispatch, _library, _schema

from .backends import requires_triton

OP = "made_up_bwd_weight"


@pytest.fixture
def made_up(monkeypatch):
    """A family that is in no room, and nothing remembered of it."""
    monkeypatch.setitem(_schema.SCHEMAS, "made_up", {OP: "(Tensor x) -> Tensor"})
    monkeypatch.setitem(_schema.FAMILY_OF, OP, "made_up")
    library = torch.library.Library(_schema.NAMESPACE, "FRAGMENT")
    library.define(OP + "(Tensor x) -> Tensor")
    _dispatch.Triton._absent.cache_clear()
    yield
    _dispatch.Triton._absent.cache_clear()
    library._destroy()


def load(monkeypatch, **functions) -> None:
    module = ModuleType("fastgen.kernels.made_up")
    vars(module).update(functions)
    monkeypatch.setitem(sys.modules, "fastgen.kernels.made_up", module)


@requires_triton
def test_a_family_without_triton_kernels_is_a_sentence(made_up):
    for args in ((), (1, 2)):
        assert _dispatch.Triton.reasons(OP, *args) == ["made_up has no Triton kernels"]
        assert _dispatch.cuda_reasons(OP, *args)["triton"] == ["made_up has no Triton kernels"]


@requires_triton
def test_an_op_without_a_triton_kernel_is_a_sentence(made_up, monkeypatch):
    load(monkeypatch, reasons=lambda *args: [])
    assert _dispatch.Triton.reasons(OP) == [f"{OP} has no Triton kernel"]


@requires_triton
def test_kernels_that_do_not_import_are_a_sentence(made_up, monkeypatch):
    def fails(op):
        raise ImportError("cannot import name 'gone' from 'triton'")

    monkeypatch.setattr(_dispatch.Triton, "_module", fails)
    sentence = "the Triton kernels of made_up failed to load: cannot import name 'gone' from 'triton'"
    assert _dispatch.Triton.reasons(OP, 1) == [sentence]


def test_without_triton(made_up, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert _dispatch.Triton.reasons(OP, 1) == ["triton is not installed"]


@requires_triton
def test_a_family_with_kernels_speaks_for_itself(made_up, monkeypatch):
    load(monkeypatch, reasons=lambda op, *args: [f"{op} of {args}"], **{OP: lambda x: x + 1})
    assert _dispatch.Triton.reasons(OP) == []
    assert _dispatch.Triton.reasons(OP, 3) == [f"{OP} of (3,)"]
    assert _dispatch.Triton.kernel(OP)(3) == 4


def test_the_reference_answers_where_no_backend_does(monkeypatch):
    """The function registered for CUDA, with one warning that gives every reason."""

    class No:
        name = "no"

        @staticmethod
        def reasons(op, *args):
            return [f"no {op} today"]

    monkeypatch.setattr(_dispatch, "CUDA_BACKENDS", (No,))
    monkeypatch.setattr(_library, "checked", lambda op: lambda x: 2 * x)
    _dispatch.warn_once.cache_clear()
    entry = _dispatch.cuda_entry("philox_normal")
    with pytest.warns(
        UserWarning, match="philox_normal runs on the plain-torch reference: no philox_normal today"
    ) as said:
        assert entry(3) == 6 and entry(4) == 8
    assert len(said) == 1


@requires_triton
def test_doctor_says_it_too(made_up, capsys):
    from fastgen.cli.main import main

    assert main(["doctor"]) == 0
    assert "made_up has no Triton kernels" in capsys.readouterr().out


def test_the_reference_that_stands_in_checks_its_arguments_too(monkeypatch):
    """What no CUDA kernel takes goes to plain torch, which would broadcast."""
    monkeypatch.setattr(_dispatch, "CUDA_BACKENDS", ())
    monkeypatch.setattr(_dispatch, "warn_once", lambda message: None)
    x0, t, table = torch.ones(3, 2), torch.tensor([0, 1, 2]), torch.ones(4)
    entry = _dispatch.cuda_entry("q_sample_fwd")
    assert entry(x0, t, table, table, x0, None, 0, -1)[0].shape == x0.shape
    with pytest.raises(RuntimeError, match="q_sample: noise must have shape"):
        entry(x0, t, table, table, x0[:1], None, 0, -1)
