"""Raw ops called with anything: an argument too short, too long, of another rank, dtype or device is an error, never a crash.

By kernel, reference and fake alike; the launchers of the Triton kernels are asked the same by `tests/kernels/interpreter`.
"""

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

import fastgen
from fastgen import _schema

from .families import case_files
from .raw_calls import CALLS, FAMILIES, arguments, changed, spoiled

REFUSED = [refusal for module in case_files().values() for refusal in module.REFUSED]


def call(op: str, args: tuple) -> object:
    return getattr(torch.ops.fastgen, op).default(*args)


@pytest.mark.parametrize("op", CALLS)
def test_every_tensor_argument_is_recorded(op):
    given = {name for args in CALLS[op] for name, value in zip(arguments(op), args, strict=True) if value is not None}
    assert set(arguments(op, "Tensor")) <= given


@pytest.mark.isa
@pytest.mark.parametrize("op", CALLS)
def test_a_spoiled_argument_is_refused(op):
    count = 0
    for name, how, args in spoiled(op):
        with pytest.raises((RuntimeError, NotImplementedError), match=_schema.FAMILY_OF[op]):
            call(op, args)
            pytest.fail(f"{op} took {name} with {how}")
        count += 1
    assert count >= (8 if len(arguments(op, "Tensor")) > 1 else 3)  # of a tensor alone the sizes may be free


@pytest.mark.parametrize("op", CALLS)
def test_the_fake_refuses_it_too(op):
    unknown = getattr(FAMILIES[_schema.FAMILY_OF[op]], "unknown_to_fakes", lambda *_: False)
    for name, how, args in spoiled(op):
        if how == "the meta device" or unknown(op, name, how):
            continue
        faked = tree_map_only(Tensor, lambda t: t.to("meta"), args)
        with pytest.raises(RuntimeError, match=_schema.FAMILY_OF[op]):
            call(op, faked)
            pytest.fail(f"the fake of {op} took {name} with {how}")


@pytest.mark.isa
@pytest.mark.parametrize("op", CALLS)
def test_what_was_recorded_is_taken(op):
    for args in CALLS[op]:
        call(op, args)


@pytest.mark.isa
@pytest.mark.parametrize(("op", "changes", "message"), REFUSED)
def test_what_else_does_not_fit_is_refused(op, changes, message):
    for args in CALLS[op]:
        with pytest.raises(RuntimeError, match=f"{_schema.FAMILY_OF[op]}.*{message}"):
            call(op, changed(op, args, changes))


@pytest.mark.isa
@pytest.mark.parametrize("value", [-1, 20, 2**62, -(2**63)])
@pytest.mark.parametrize("op", [op for op in CALLS if "t" in arguments(op, "Tensor")])
def test_a_timestep_out_of_range_is_refused(op, value):
    for args in CALLS[op]:
        t = args[arguments(op).index("t")].clone()
        t[-1] = value
        with pytest.raises(RuntimeError, match=rf"t must be in \[0, \d+\), got t\[{len(t) - 1}\] = {value}"):
            call(op, changed(op, args, {"t": t}))


@pytest.mark.isa
def test_no_message_names_a_file():
    """Of the kernels and of torch's own headers, a sample of each kind of message."""
    messages = []
    for op in CALLS:
        for _, _, args in spoiled(op):
            try:
                call(op, args)
            except (RuntimeError, NotImplementedError) as error:
                messages.append(str(error))
    assert len(messages) > 100
    here = str(fastgen.__file__).removesuffix("/fastgen/__init__.py")
    assert [m for m in messages if here in m or ".cpp" in m or ".h:" in m] == []
