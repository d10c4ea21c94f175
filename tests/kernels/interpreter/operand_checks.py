"""The launchers of the Triton kernels called with too little: a ValueError that names the op, before a kernel reads past the end.

What they are called with, and what is wrong with it, is what the other kernels are asked to refuse: `tests/ops/raw_calls.py`.
"""

import importlib
from unittest import mock

import pytest
import torch

from fastgen import _dispatch, _schema
from fastgen.reference import _layout
from tests.ops.families import case_files
from tests.ops.raw_calls import CALLS, arguments, changed, spoiled

OPS = [op for op in _schema.FAMILY_OF if not _dispatch.Triton.reasons(op)]
REFUSED = [refusal for module in case_files().values() for refusal in module.REFUSED if refusal[0] in OPS]
X = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(0))
launcher = _dispatch.Triton.kernel


@pytest.mark.parametrize("op", OPS)
def test_the_calls_are_right_as_they_stand(op):
    for args in CALLS[op]:
        launcher(op)(*args)


@pytest.mark.parametrize("op", OPS)
def test_a_spoiled_operand_is_refused(op):
    """Also one that would broadcast: a kernel takes every element from where it would lie. The message names the operand; for what
    gives the others their sizes, one image and one table at most, it may name another."""
    unknown = getattr(
        case_files()[_schema.FAMILY_OF[op]], "unknown_to_fakes", lambda *_: False
    )  # values: a GPU would be waited for
    elsewhere, refused = set(), 0
    for name, how, args in spoiled(op):
        if _dispatch.Triton.reasons(op, *args):
            continue
        try:
            launcher(op)(*args)
        except ValueError as error:
            refused += 1
            assert str(error).startswith(_schema.FAMILY_OF[op])
            if name not in str(error):
                elsewhere.add(name)
        else:
            assert unknown(op, name, how), f"the launcher of {op} took {name} with {how}"
    assert len(elsewhere) <= 2, elsewhere
    assert refused >= (4 if len(arguments(op, "Tensor")) > 1 else 1)  # of a tensor alone the sizes may be free


@pytest.mark.parametrize(("op", "changes", "message"), REFUSED)
def test_what_else_does_not_fit_is_refused(op, changes, message):
    for args in CALLS[op]:
        args = changed(op, args, changes)
        if not _dispatch.Triton.reasons(op, *args):
            with pytest.raises(ValueError, match=f"^{_schema.FAMILY_OF[op]}.*{message}"):
                launcher(op)(*args)


def test_strides_are_computed_once_and_as_the_layout_rule_says():
    operands_module = importlib.import_module("fastgen.kernels._operands")
    for x in (X, X.contiguous(memory_format=torch.channels_last), X[:, :1], X[:1].expand(2, 4, 3, 3)[..., ::2]):
        with mock.patch.object(operands_module, "dense_strides", wraps=_layout.dense_strides) as computed:
            operands_module._strides.cache_clear()
            for _ in range(2):
                assert list(operands_module.dense(x, x).stride()) == _layout.output_strides(x) or 1 in x.shape
        assert computed.call_count == 1
