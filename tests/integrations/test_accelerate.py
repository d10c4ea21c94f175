"""`accelerate`, `report`, `restore`: the mechanism, and everything users do with modules afterwards."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.ao import quantization

import fastgen
from fastgen.integrations import StandIn, walk
from fastgen.integrations.stand_in import mixin_of

from .. import fresh
from ..modules import randomize
from . import foreign
from .numerics import WINOGRAD, error


def make() -> nn.Sequential:
    """Two residual blocks without embeddings between convolutions, all that stand-ins know of torch in between."""
    return randomize(
        nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1),
            nn.Sequential(nn.GroupNorm(4, 16), nn.SiLU(), nn.Conv2d(16, 32, 3, padding=1)),
            nn.Sequential(nn.GroupNorm(4, 32), nn.SiLU(), nn.Dropout(0.0), nn.Conv2d(32, 3, 3, padding=1)),
        )
    ).eval()


X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model():
    return make()


def stand_ins(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if mixin_of(module)]


@torch.no_grad()
def test_twice_is_once_and_nothing_else_changes(model):
    before, parameters, state = model(X), dict(model.named_parameters()), list(model.state_dict())
    fastgen.accelerate(model)
    classes = [type(m) for m in model.modules()]
    fastgen.accelerate(model)
    assert [type(m) for m in model.modules()] == classes
    assert stand_ins(model) == ["0", "1", "1.0", "1.2", "2", "2.0", "2.3"]
    assert list(model.state_dict()) == state and all(p is parameters[n] for n, p in model.named_parameters())
    assert isinstance(model[0], nn.Conv2d) and type(model[0]).__name__ == "Conv2d" and repr(model) == repr(make())
    assert 0 < error(model(X), before.double()) < WINOGRAD


@torch.no_grad()
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), "torch.save"])
def test_copies(model, copied):
    fastgen.accelerate(model)
    if copied == "torch.save":
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    else:
        other = copied(model)
    assert torch.equal(other(X), model(X)) and [type(m) for m in other.modules()] == [type(m) for m in model.modules()]
    fastgen.restore(other)
    assert stand_ins(other) == [] and stand_ins(model)
    assert torch.equal(other(X), make()(X))


@torch.no_grad()
def test_weights_that_change_later_are_noticed(model):
    plain = copy.deepcopy(model)
    fastgen.accelerate(model)(X)
    low_rank = torch.randn(32, 144, generator=torch.Generator().manual_seed(1)).view(32, 16, 3, 3)

    def fuse(m):
        m[1][2].weight.add_(low_rank, alpha=0.1)

    def swap(m):
        m[1][2].weight.data = low_rank.clone()

    def load(m):
        m.load_state_dict({name: 0.5 * value for name, value in make().state_dict().items()})

    def another(m):
        m[1][2] = randomize(nn.Conv2d(16, 32, 3, padding=1), seed=3)

    for change in (fuse, swap, load, another):
        change(model), change(plain)
        assert error(model(X), plain(X).double()) < WINOGRAD, change.__name__
    assert stand_ins(model)[:3] == ["0", "1", "1.0"] and "1.2" not in stand_ins(model)  # a module that came later
    assert "1.2" in stand_ins(fastgen.accelerate(model))


@torch.no_grad()
@pytest.mark.parametrize("at", ["1.0", "1.1", "1.2", "1", ""])
@pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook"])
def test_hooks_see_what_they_saw(model, at, kind):
    seen: list[torch.Tensor] = []
    hook = {
        "register_forward_hook": lambda module, args, output: seen.append(output),
        "register_forward_pre_hook": lambda module, args: seen.append(args[0]),
    }[kind]
    getattr(model.get_submodule(at), kind)(hook)
    model(X)
    fastgen.accelerate(model)(X)
    assert len(seen) == 2 and error(seen[1], seen[0].double()) < WINOGRAD


def test_training_is_unchanged(model):
    """The loss and gradients, and with checkpoints, of blocks with an embedding."""
    emb = torch.randn(2, 24, generator=torch.Generator().manual_seed(2))
    blocks = [randomize(foreign.ResBlock(3 + 13, 24, 16, ckpt=ckpt)).train() for ckpt in (False, False, True)]
    for block in blocks[1:]:
        fastgen.accelerate(block)
    x = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(3)).requires_grad_()
    expected, *found = ([*torch.autograd.grad(b(x, emb).square().mean(), (x, *b.parameters()))] for b in blocks)
    for grads in found:
        for grad, like in zip(grads, expected, strict=True):
            torch.testing.assert_close(grad, like, rtol=1e-4, atol=1e-5 * like.abs().max().item())


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_to_another_dtype(model, dtype):
    exact = copy.deepcopy(model).double()(X.double())
    own = error(copy.deepcopy(model).to(dtype)(X.to(dtype)), exact)
    accelerated = fastgen.accelerate(model).to(dtype)(X.to(dtype))
    assert accelerated.dtype == dtype and error(accelerated, exact) <= 2 * own + 1e-12


@torch.no_grad()
def test_channels_last_and_autocast(model):
    expected = model(X)
    fastgen.accelerate(model)
    last = model.to(memory_format=torch.channels_last)(X.contiguous(memory_format=torch.channels_last))
    assert error(last, expected.double()) < WINOGRAD and last.is_contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(X).dtype == torch.bfloat16 and error(model(X), expected.double()) < 2e-2


@torch.no_grad()
def test_under_the_compiler(model):
    fastgen.accelerate(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert error(compiled(X), model(X).double()) < WINOGRAD


@torch.no_grad()
def test_include_and_exclude(model):
    assert stand_ins(fastgen.accelerate(model, include="1.*")) == ["1.0", "1.2"]
    assert stand_ins(fastgen.restore(model)) == []
    assert stand_ins(fastgen.accelerate(model, include="1")) == ["1", "1.0", "1.2"]
    fastgen.restore(model)
    assert stand_ins(fastgen.accelerate(model, exclude=["2", nn.Conv2d])) == ["1", "1.0"]
    fastgen.restore(model)
    assert stand_ins(fastgen.accelerate(model, include=nn.GroupNorm, exclude="2.*")) == ["1.0"]


@torch.no_grad()
def test_exact_takes_winograd_back(model):
    expected = model(X)
    assert not torch.equal(fastgen.accelerate(model)(X), expected)
    assert [n for n in stand_ins(fastgen.accelerate(model, exact=True)) if n in ("0", "1.2", "2.3")] == []
    assert error(model(X), expected.double()) < 1e-6


def test_the_report(model, capsys):
    model.append(nn.Conv2d(3, 3, 3, padding=1, padding_mode="circular"))
    before = fastgen.report(model)
    assert not before.accelerated and {row.detail for row in before.left_alone} >= {"padding_mode 'circular'"}
    fastgen.accelerate(model)
    capsys.readouterr()
    after = fastgen.report(model)
    text = capsys.readouterr().out
    assert str(after) in text and len(after.accelerated) == 7 and [row.name for row in after.left_alone] == ["3"]
    assert [row.name for row in after.rows] == ["", "0", "1", "1.0", "1.2", "2", "2.0", "2.3", "3"][1:]
    assert "padding_mode 'circular'" in text and "Winograd" in text


class Mine(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.factor * x


class MineFaster(StandIn):
    of, project, does, takes, has = "Mine", "ours", "two by a sum", ("x",), ("factor",)

    @classmethod
    def reasons(cls, module):
        if module.factor < 0:
            yield "a negative factor"

    def forward(self, x):
        return x + x if self.factor == 2 else self.theirs(x)


def test_a_stand_in_of_ones_own(monkeypatch):
    monkeypatch.setattr(walk, "STAND_INS", {})
    model = nn.Sequential(Mine(2.0), Mine(3.0), Mine(-1.0))
    fastgen.integrations.register(MineFaster)
    fastgen.integrations.register(MineFaster)
    assert stand_ins(fastgen.accelerate(model)) == ["0", "1"] and torch.equal(model(X), -6 * X)
    assert {row.name: row.detail for row in fastgen.report(model).rows} == {
        "0": "two by a sum", "1": "two by a sum", "2": "a negative factor",
    }  # fmt: skip
    copied = pickle.loads(pickle.dumps(model))
    assert stand_ins(copied) == ["0", "1"] and type(fastgen.restore(copied)[0]) is Mine


@pytest.mark.parametrize(
    "bad, message",
    [
        (Mine, "must be a subclass of StandIn, got"),
        (type("Bare", (StandIn,), {"of": "Mine"}), "Bare must say project, does"),
    ],
)
def test_a_stand_in_must_say_what_it_is(bad, message):
    with pytest.raises(TypeError, match=message):
        fastgen.integrations.register(bad)


WITH_TWO_PROCESSES = """
import sys, torch, torch.distributed as dist, torch.multiprocessing as mp, fastgen
from tests.integrations.test_accelerate import X, make

def loss(model, x):
    return model(x).square().mean()

def work(rank, file):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    model = torch.nn.parallel.DistributedDataParallel(make().train())
    fastgen.accelerate(model)
    loss(model, X[rank : rank + 1]).backward()
    plain = make().train()
    loss(plain, X).backward()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5 * theirs.grad.abs().max().item())
    dist.destroy_process_group()

mp.start_processes(work, args=(sys.argv[1],), nprocs=2, start_method="fork")
"""


def test_data_parallel(tmp_path):
    """Two processes, each with half of the batch, have the gradients of the whole."""
    fresh.run(WITH_TWO_PROCESSES, str(tmp_path / "rendezvous"))


def test_without_diffusers_its_schedulers_are_not_looked_for():
    fresh.run(
        "import sys, torch, fastgen\n"
        "fastgen.restore(fastgen.accelerate(torch.nn.Sequential(torch.nn.Conv2d(3, 3, 3))))\n"
        "assert 'diffusers' not in sys.modules and 'fastgen.samplers' not in sys.modules"
    )


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
def test_nothing_to_do():
    for nothing in (nn.Linear(2, 2), nn.Sequential(), fastgen.nn.Conv2d(3, 3, 3), torch.jit.script(nn.Conv2d(3, 3, 3))):
        fastgen.accelerate(nothing)
        assert mixin_of(nothing) is None and "nothing here" in str(fastgen.report(nothing))


class Quantised(nn.Module):
    """A convolution of quantised tensors, and a norm and a linear layer that stay as they are."""

    def __init__(self):
        super().__init__()
        self.quant, self.conv, self.dequant = quantization.QuantStub(), nn.Conv2d(3, 8, 3), quantization.DeQuantStub()
        self.norm, self.linear = nn.GroupNorm(2, 8), nn.Linear(8, 4)

    def forward(self, x):
        return self.linear(self.norm(self.dequant(self.conv(self.quant(x)))).mean((2, 3)))


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_a_quantised_model_keeps_its_quantised_layers():
    model = Quantised().eval()
    model.qconfig = quantization.get_default_qconfig("fbgemm")
    model.norm.qconfig = model.linear.qconfig = None
    prepared = quantization.prepare(model)
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    prepared(x)
    for model in (
        quantization.convert(prepared),
        quantization.quantize_dynamic(nn.Sequential(nn.Flatten(), nn.Linear(192, 4))),
    ):
        expected = model(x)
        fastgen.accelerate(model)
        assert {type(m).__name__ for m in model.modules() if mixin_of(m)} <= {"GroupNorm"}
        torch.testing.assert_close(model(x), expected)


def test_a_compiled_model_is_compiled_again(model):
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    expected = compiled(X)
    fastgen.accelerate(compiled)
    assert stand_ins(model) and error(compiled(X), expected.double()) < WINOGRAD
    fastgen.restore(compiled)
    assert torch.equal(compiled(X), expected)


@pytest.mark.parametrize("function", [fastgen.accelerate, fastgen.restore, fastgen.report])
def test_something_else_is_refused(function):
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module or a pipeline with components, got list"):
        function([make()])


def test_what_is_chosen_must_be_names_or_classes(model):
    with pytest.raises(TypeError, match="exclude must hold names of modules and classes, got 3"):
        fastgen.accelerate(model, exclude=["1", 3])
    assert stand_ins(model) == []
