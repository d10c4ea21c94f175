"""Rows of GroupNorm, SiLU and convolution in the forwards of `foreign_forwards`: what is fused, and what must stay as it is."""

import copy
import inspect
import io
import linecache
import pickle
import traceback

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastgen
from fastgen.integrations import forwards, fusing
from fastgen.integrations.forwards import Forward, rewritten
from fastgen.integrations.stand_in import mixin_of

from .. import fresh
from ..modules import randomize
from . import foreign_forwards as foreign
from .numerics import WINOGRAD, assert_accelerated, error

X = torch.randn(2, 16, 8, 9, generator=torch.Generator().manual_seed(0))
FUSED = {  # and how many norms are called with their activation
    foreign.Nested: 2, foreign.OneAfterAnother: 2, foreign.Returned: 4, foreign.ByFlags: 1, foreign.Between: 1,
    foreign.InContainers: 1, foreign.WithSuper: 1, foreign.Closed: 1, foreign.Guarded: 1, foreign.Captured: 1,
}  # fmt: skip
ALONE = (foreign.OtherActivation, foreign.Decorated, foreign.Private, foreign.Reassigned, foreign.Shadowed)


def make(kind: type[nn.Module]) -> nn.Module:
    return randomize(kind()).eval()


@pytest.fixture
def fused(monkeypatch):
    """The norms that are called with their activation."""
    norms: list[nn.Module] = []

    def norm_silu(norm, input):
        norms.append(norm)
        return F.silu(norm(input))

    monkeypatch.setattr(fusing, "norm_silu", norm_silu)
    return norms


@pytest.mark.parametrize("kind", FUSED)
def test_in_every_mode(kind):
    assert_accelerated(make(kind), lambda m, dtype: m(X.to(dtype)), (kind.__name__, "GroupNorm"))


@torch.no_grad()
@pytest.mark.parametrize("kind", FUSED)
def test_what_is_one_call(kind, fused):
    model = fastgen.accelerate(make(kind), exact=True)
    assert mixin_of(model) is Forward
    model(X)
    assert len(fused) == FUSED[kind]
    (row,) = [row for row in fastgen.report(model).rows if row.name == ""]
    assert row.accelerated and row.detail == Forward.does


@torch.no_grad()
@pytest.mark.parametrize("kind", ALONE)
def test_what_has_no_row_or_another_source_is_left_alone(kind):
    model = make(kind)
    expected = model(X)
    fastgen.accelerate(model)
    assert mixin_of(model) is None and error(model(X), expected.double()) < WINOGRAD
    assert [row.name for row in fastgen.report(model).rows if row.name == ""] == []


@pytest.mark.parametrize("kind, reason", [
    (foreign.Watched, "its class looks at what is derived from it"),
    (foreign.Reduced, "its class is copied and pickled in a way of its own"),
])  # fmt: skip
def test_classes_of_which_none_is_derived(kind, reason):
    model = fastgen.accelerate(make(kind))
    assert mixin_of(model) is None
    assert [row.detail for row in fastgen.report(model).rows if row.name == ""] == [reason]


def test_a_forward_of_the_module_itself():
    model = make(foreign.Nested)
    model.forward = lambda x: x
    assert mixin_of(fastgen.accelerate(model)) is None and model(X) is X


@torch.no_grad()
def test_flags_are_read_at_every_call(monkeypatch):
    model, plain = (make(foreign.ByFlags) for _ in range(2))
    fastgen.accelerate(model)

    def check(*args):
        assert error(model(X, *args), plain(X, *args).double()) < WINOGRAD

    check()
    check("norm")
    for other in (model, plain):
        other.train()
    check()
    for other in (model, plain):
        other.eval().activated = False
    check()
    monkeypatch.setattr(foreign, "FLAG", True)
    check()
    assert torch.equal(model(X), fastgen.restore(model).norm1(X)) or error(model(X), model.norm1(X).double()) < 1e-6


@torch.no_grad()
def test_properties_are_looked_at_as_often_and_in_the_same_order():
    model, plain = (make(foreign.Properties) for _ in range(2))
    fastgen.accelerate(model)
    assert mixin_of(model) is Forward
    for looks in range(2, 8, 2):
        assert error(model(X), plain(X).double()) < 1e-6 and model.looks == plain.looks == looks


@torch.no_grad()
@pytest.mark.parametrize("change", [
    lambda m: setattr(m, "norm1", randomize(nn.GroupNorm(8, 16), seed=3)),
    lambda m: setattr(m, "norm1", nn.BatchNorm2d(16).eval()),
    lambda m: setattr(m, "norm1", nn.Identity()),
    lambda m: setattr(m, "act", nn.ReLU()),
    lambda m: setattr(m, "conv1", randomize(nn.Conv2d(16, 16, 1), seed=3)),
    lambda m: setattr(m, "conv2", nn.Sequential(nn.Identity(), m.conv2)),
    lambda m: setattr(m, "dropout", nn.Tanh()),
    lambda m: setattr(m.norm1, "num_groups", 2),
    lambda m: m.load_state_dict({name: 0.5 * value for name, value in m.state_dict().items()}),
    lambda m: m.norm2.register_forward_hook(lambda module, args, output: 2 * output),
    lambda m: m.act.register_forward_pre_hook(lambda module, args: (args[0] + 1,)),
    lambda m: m.dropout.register_forward_hook(lambda module, args, output: output - 1),
    lambda m: m.conv2.register_forward_pre_hook(lambda module, args: (-args[0],)),
    lambda m: m.norm1.register_forward_hook(lambda module, args, output: setattr(m, "act", nn.Tanh())),
    lambda m: setattr(m.norm1, "forward", lambda input: input),
    lambda m: setattr(m.act, "forward", lambda input: input),
])  # fmt: skip
@pytest.mark.parametrize("kind", [foreign.Nested, foreign.OneAfterAnother])
def test_what_changes_later(kind, change):
    model, plain = (make(kind) for _ in range(2))
    fastgen.accelerate(model)(X)
    change(model), change(plain)
    assert error(model(X), plain(X).double()) < WINOGRAD


class BigSwish(nn.Module):
    """Another function under the name of one that is known."""

    def __init__(self):
        super().__init__()
        self.beta = 2.0

    def forward(self, x):
        return x * torch.sigmoid(self.beta * x)


BigSwish.__name__ = "Swish"


@torch.no_grad()
def test_another_function_of_that_name_and_a_norm_with_an_activation():
    for change in (
        lambda m: setattr(m, "act", BigSwish()),
        lambda m: setattr(m, "norm2", randomize(fastgen.nn.GroupNorm(4, 16, activation="silu"))),
    ):
        model, plain = make(foreign.Nested), make(foreign.Nested)
        change(model), change(plain)
        fastgen.accelerate(model)
        assert mixin_of(model) is Forward and error(model(X), plain(X).double()) < WINOGRAD


@torch.no_grad()
def test_after_many_calls():
    """The interpreter has other instructions in the place of those it was given."""
    for kind in FUSED:
        model = make(kind)
        for _ in range(100):
            model(X[:1, :, :2, :2])
        assert forwards._rewritten.__wrapped__(kind.forward) is not None


def test_gradients_and_dropout_in_training():
    models = [randomize(foreign.OneAfterAnother(dropout=0.5)).train() for _ in range(2)]
    fastgen.accelerate(models[1])
    found = []
    for model in models:
        torch.manual_seed(0)
        x = X.clone().requires_grad_()
        loss = model(x, X.mean((2, 3)), scale=2.0).square().mean()
        found.append(torch.autograd.grad(loss, (x, *model.parameters())))
    for grad, like in zip(*reversed(found), strict=True):
        torch.testing.assert_close(grad, like, rtol=1e-4, atol=2e-5 * like.abs().max().item())


@torch.no_grad()
@pytest.mark.parametrize("kind", [foreign.OneAfterAnother, foreign.WithSuper, foreign.Closed])
@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, lambda m: pickle.loads(pickle.dumps(m)), "torch.save"])
def test_copies(kind, copied):
    model = fastgen.accelerate(make(kind))
    if copied == "torch.save":
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    else:
        other = copied(model)
    assert torch.equal(other(X), model(X)) and mixin_of(other) is Forward and isinstance(other, kind)
    assert type(fastgen.restore(other)) is kind


def test_a_pickle_is_read_in_another_process(tmp_path):
    file = tmp_path / "model.pt"
    model = fastgen.accelerate(make(foreign.OneAfterAnother))
    with torch.no_grad():
        torch.save((model, X, model(X)), file)
    fresh.run(
        "import sys, torch, fastgen\n"
        "model, x, y = torch.load(sys.argv[1], weights_only=False)\n"
        "from fastgen.integrations.forwards import Forward\n"
        "from fastgen.integrations.stand_in import mixin_of\n"
        "with torch.no_grad():\n"
        "    assert mixin_of(model) is Forward and torch.allclose(model(x), y, rtol=1e-4, atol=1e-5)",
        str(file),
    )


def test_it_looks_as_it_did():
    """To those who ask for arguments, defaults, documentation, the place of an error."""
    model = fastgen.accelerate(make(foreign.OneAfterAnother))
    ours, theirs = type(model).forward, foreign.OneAfterAnother.forward
    assert ours is not theirs and inspect.signature(ours) == inspect.signature(theirs)
    for name in (
        "__doc__",
        "__name__",
        "__qualname__",
        "__module__",
        "__kwdefaults__",
        "__defaults__",
        "__annotations__",
    ):
        assert getattr(ours, name) == getattr(theirs, name)
    assert repr(model) == repr(make(foreign.OneAfterAnother)) and ours.__globals__ is theirs.__globals__
    with pytest.raises(ValueError, match="weight must have shape") as caught:
        model(X[:, :8])
    lines = [
        frame.lineno for frame in traceback.extract_tb(caught.value.__traceback__) if frame.filename == foreign.__file__
    ]
    assert linecache.getline(foreign.__file__, lines[0]).strip() == "h = self.norm1(x)"


@torch.no_grad()
@pytest.mark.parametrize("kind", [foreign.Nested, foreign.OneAfterAnother, foreign.Returned, foreign.WithSuper])
def test_under_the_compiler(kind):
    model = fastgen.accelerate(make(kind))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert error(compiled(X), model(X).double()) < WINOGRAD


@torch.no_grad()
def test_channels_last_and_autocast():
    model, plain = make(foreign.Nested), make(foreign.Nested)
    last = X.contiguous(memory_format=torch.channels_last)
    fastgen.accelerate(model.to(memory_format=torch.channels_last))
    assert error(model(last), plain(X).double()) < WINOGRAD
    with torch.autocast("cpu", torch.bfloat16):
        assert model(last).dtype == plain(last).dtype and error(model(last), plain(X).double()) < 2e-2


def rows(kind: type[nn.Module]) -> list[list[str]]:
    made = rewritten(kind.forward)
    assert made is not None
    return [[".".join(map(str, path)) or "silu" for path in row] for row in made.rows]


def test_rows():
    assert rows(foreign.Nested) == [["norm1", "silu", "conv1"], ["norm2", "act", "dropout", "conv2"]]
    assert rows(foreign.OneAfterAnother) == [["norm1", "act", "conv1"], ["norm2", "silu", "dropout", "conv2"]]
    assert rows(foreign.Returned) == [["norm1", "silu"], ["norm2", "act", "conv1", "norm1", "act"]]
    assert rows(foreign.ByFlags) == [["norm1", "silu", "conv2"]]
    assert rows(foreign.Between) == [["norm2", "silu", "conv2"]]
    assert rows(foreign.Guarded) == [["norm2", "silu", "conv1"]]
    assert rows(foreign.Captured) == [["norm1", "silu", "conv1"]]
    assert rows(foreign.InContainers) == [["norms.1", "act", "blocks.a"]]


def source_of(tmp_path, text: str):
    file = tmp_path / "written.py"
    file.write_text(text)
    space: dict = {"nn": nn, "F": F, "__name__": "written"}
    exec(compile(text, str(file), "exec"), space)
    return file, space["M"]


TEXT = """
class M(nn.Module):
    def forward(self, x):
        return self.conv(F.silu(self.norm(x)))
"""


def test_a_file_that_has_changed_since_is_not_believed(tmp_path):
    file, kind = source_of(tmp_path, TEXT)
    file.write_text(TEXT.replace("self.norm(x)", "self.norm(x * 2)"))
    assert rewritten(kind.forward) is None
    file, kind = source_of(tmp_path, TEXT)
    linecache.checkcache(str(file))
    assert rewritten(kind.forward) is not None
    space: dict = {"nn": nn, "F": F, "__name__": "nowhere"}
    exec(compile(TEXT, "<nowhere>", "exec"), space)
    assert rewritten(space["M"].forward) is None
