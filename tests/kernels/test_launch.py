"""The direct way to a compiled kernel: its key says what Triton says, and what is started gets every argument in its place."""

import itertools
from unittest import mock

import pytest
import torch

from ..backends import MISSING

if "triton" in MISSING:
    pytest.skip(MISSING["triton"], allow_module_level=True)

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

import fastgen  # noqa: F401  (makes fastgen.kernels importable)
from fastgen.kernels import _launch, diffusion_loss, group_norm, q_sample, sampler_step
from tests.kernels.compile_worker import launches

pytestmark = pytest.mark.skipif(
    triton.knobs.runtime.interpret, reason="TRITON_INTERPRET=1: there are no JIT functions to launch"
)


@triton.jit(do_not_specialize=["step"])
def example(out, x, history, size, step, weight, BLOCK: tl.constexpr, ACC: tl.constexpr):
    tl.store(out, tl.load(x) + size + step + weight)


def specialisation(*args, **constants):
    """What Triton compiles `example` for, from its own binder."""
    binder = create_function_from_signature(example.signature, example.params, make_backend(GPUTarget("cuda", 90, 32)))
    return str(binder(*args, **constants)[1])


MEMORY = torch.zeros(64)
ARGUMENTS = {
    "out": [MEMORY, MEMORY[1:], MEMORY[4:], MEMORY.half(), MEMORY.double()],
    "x": [MEMORY, MEMORY[1:], None],
    "history": [None, (MEMORY,), (MEMORY[1:],), (MEMORY, MEMORY), (MEMORY, None)],
    "size": [0, 1, 2, 3, 16, 17, 48, -16, 2**31 - 1, 2**31, 2**31 + 1, 2**40, 2**63, -(2**31), -(2**31) - 1],
    "step": [0, 1, 5, 16, 2**31 - 1, -1],
    "weight": [0.0, 1.0, 0.5, 16.0],
}


def test_a_key_is_what_triton_specialises_on():
    """Two calls have equal keys if and only if Triton compiles them alike: over every value of each pair of arguments."""
    first = {name: values[0] for name, values in ARGUMENTS.items()}
    calls = [first]
    for pair in itertools.combinations(ARGUMENTS, 2):
        for values in itertools.product(*(ARGUMENTS[name] for name in pair)):
            calls.append({**first, **dict(zip(pair, values, strict=True))})
    _, general = _launch._parameters(example)
    keys, of_triton = {}, {}
    for call in calls:
        key = _launch.kinds(tuple(call.values()), general)
        theirs = specialisation(*call.values(), BLOCK=1, ACC=tl.float32)
        assert keys.setdefault(theirs, key) == key, f"Triton has one kernel for what has two keys: {theirs}"
        assert of_triton.setdefault(key, theirs) == theirs, f"one key for two kernels: {key}"
    assert len(keys) > 80


def test_a_key_knows_the_device():
    """Triton keeps kernels by device; a tensor elsewhere must not start this one's."""

    class Elsewhere(torch.Tensor):
        def get_device(self):
            return 1

    assert _launch.kinds((MEMORY,)) != _launch.kinds((MEMORY.as_subclass(Elsewhere),))


class Started(CompiledKernel):
    """A compiled kernel that writes down how it is started."""

    def __init__(self):
        self.calls = []

    def __del__(self):
        pass

    def __getitem__(self, grid):
        return lambda *args: self.calls.append((grid, args))


@pytest.fixture
def jit():
    """Launches through the JIT, as (kernel, arguments by name), each answered with a compiled kernel of its own."""
    found = []

    def run(self, *args, grid, warmup, **kwargs):
        compiled = Started()
        found.append(
            (
                self,
                dict(self.signature.bind(*args, **{k: kwargs[k] for k in self.arg_names if k in kwargs}).arguments),
                grid,
                compiled,
            )
        )
        return compiled

    with mock.patch.object(JITFunction, "run", run), mock.patch.dict(_launch._compiled, clear=True):
        yield found


def call_example(out=MEMORY, x=MEMORY, history=None, size=33, step=4, weight=0.5, programs=7, block=8, **options):
    constants = {"ACC": tl.float32, "BLOCK": block}  # not in the order of the kernel
    _launch.launch(
        example, programs, out, x, history, size, step, weight,
        **constants, **{"num_warps": 4, "enable_fp_fusion": False, **options},
    )  # fmt: skip


def test_the_second_call_starts_what_the_first_compiled(jit):
    call_example()
    assert len(jit) == 1 and jit[0][2] == (7,) and not jit[0][3].calls
    call_example(size=35, step=1, weight=1.0, programs=9)
    assert len(jit) == 1, "a call that differs in nothing Triton compiles for went through the JIT"
    grid, args = jit[0][3].calls[0]
    assert grid == (9, 1, 1)
    given = dict(zip(example.arg_names, args, strict=True))
    assert given.pop("out") is MEMORY and given.pop("x") is MEMORY
    assert given == {"history": None, "size": 35, "step": 1, "weight": 1.0, "BLOCK": 8, "ACC": tl.float32}


@pytest.mark.parametrize(
    "other",
    [
        {"out": MEMORY[1:]}, {"out": MEMORY.half()}, {"x": None}, {"history": (MEMORY,)}, {"size": 1}, {"size": 32},
        {"size": 2**31}, {"block": 16}, {"num_warps": 8}, {"enable_fp_fusion": True},
    ],
    ids=str,
)  # fmt: skip
def test_what_triton_compiles_for_goes_through_the_jit_again(jit, other):
    call_example()
    call_example(**other)
    assert len(jit) == 2
    call_example(**other)
    call_example()
    assert len(jit) == 2 and [len(entry[3].calls) for entry in jit] == [1, 1]


def test_the_cache_is_bounded(jit, monkeypatch):
    monkeypatch.setattr(_launch, "KEPT", 3)
    for block in range(10):
        call_example(block=block)
        assert len(_launch._compiled) <= 3


def test_other_versions_and_other_answers_go_through_the_jit(jit, monkeypatch):
    monkeypatch.setattr(_launch, "DIRECT", False)
    call_example()
    call_example()
    assert len(jit) == 2 and not _launch._compiled
    monkeypatch.setattr(_launch, "DIRECT", True)
    with mock.patch.object(JITFunction, "run", lambda *_, **__: object()):  # no compiled kernel to keep
        call_example()
    assert not _launch._compiled


def test_this_triton_starts_kernels_as_expected():
    """The private part: `compiled[grid](*args)` takes every parameter, and `run` gets them after nine of its own."""
    seen = []
    compiled = Started.__new__(Started)
    compiled.module = compiled.function = compiled.packed_metadata = object()
    compiled._run = lambda *args: seen.append(args)
    compiled.launch_metadata = lambda *_: None
    CompiledKernel.__getitem__(compiled, (5, 1, 1))(*"abc", stream=11)
    (arguments,) = seen
    assert arguments[:4] == (5, 1, 1, 11) and arguments[-3:] == ("a", "b", "c") and len(arguments) == 12
    assert arguments[4] is compiled.function and arguments[5] is compiled.packed_metadata


X, TIMES = torch.zeros(2, 4, 8, 8), torch.zeros(2, dtype=torch.int64)
TABLE = torch.ones(40)


def specialisations(call):
    """kernel -> what is compiled for each launch inside ``call``."""
    found = {}
    with launches(
        lambda kernel, source, options, _: found.setdefault(kernel.fn.__name__, set()).add(
            (source.hash(), str(options))
        )
    ):
        call()
    return found


def norms(shape, groups):
    x = torch.zeros(shape)
    _, mean, rstd = group_norm.group_norm_fwd(x, None, groups, *[None] * 5, 1e-5, 1)
    group_norm.group_norm_bwd(x, x, None, mean, rstd, groups, *[None] * 5, 1)


def step_call(rows, step):
    sampler_step.sampler_step_fwd(X, X, torch.zeros(rows, 19), step, *[None, [], X], *[None] * 6, False, False)


def loss_call(steps, vlb_weight):
    model, bound = torch.zeros(2, 8, 8, 8), torch.zeros(steps, 3)
    arguments = (model, X, X, TIMES, TABLE[:steps], TABLE[:steps], None, bound, 0, vlb_weight)
    diffusion_loss.diffusion_loss_bwd(diffusion_loss.diffusion_loss_fwd(*arguments), *arguments)


def noising_call(steps, step):
    table = TABLE[:steps]
    q_sample.q_sample_fwd(X, TIMES, table, table, None, TIMES, step, 0)
    q_sample.q_sample_bwd(X, X, TIMES, table, table, 0, True, True)


@pytest.mark.parametrize(
    ("call", "variants"),
    [
        (norms, [((n, 4, 128, 128), 1) for n in (1, 3, 16)]),
        # eight splits, and six
        (norms, [((n, 4, 128, 128), 1) for n in (35, 42)]),
        # groups of the same size, of other numbers
        (norms, [((2, 32 * groups, 8, 8), groups) for groups in (1, 3, 16)]),
        (step_call, [(20, 1), (20, 5), (20, 16), (1, 0), (1000, 999)]),
        (loss_call, [(20, 0.001), (20, 1.0), (20, 0.0), (16, 0.5), (1, 2.0)]),
        (noising_call, [(20, 1), (20, 16), (16, 5), (1, -1)]),
    ],
    ids=["batch", "splits", "groups", "step", "loss", "noising"],
)  # fmt: skip
def test_one_kernel_serves_calls_that_differ_in_what_it_is_not_specialised_on(call, variants):
    first, *others = (specialisations(lambda v=v: call(*v)) for v in variants)
    assert all(other == first for other in others)
    assert all(len(kernels) == 1 for kernels in first.values())
