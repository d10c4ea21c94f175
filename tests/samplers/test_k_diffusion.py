"""k-diffusion's functions against k-diffusion itself: same model and noise, 1e-10 in float64, in float32 what rounding allows."""

import contextlib
from typing import Any

import pytest
import torch
from torch import Tensor

from fastgen.samplers import k_diffusion as ours

from ..backends import import_peer
from .rounding import assert_as_exact

SHAPE = (2, 3, 5, 4)


@pytest.fixture(scope="module")
def peer() -> Any:
    return import_peer("k_diffusion.sampling")


def denoiser(x: Tensor, sigma: Tensor, shift: float = 0.0) -> Tensor:
    s = sigma.reshape(-1, 1, 1, 1)
    return torch.tanh(0.7 * x / (1 + s)) * (1 + 0.1 * torch.cos(s)) + shift


def sigmas(steps: int, dtype: torch.dtype) -> Tensor:
    return ours.get_sigmas_karras(steps, 0.03, 14.6).to(dtype)


def start(dtype: torch.dtype) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype) * 14.6


def noise_sampler(dtype: torch.dtype) -> Any:
    """The same noise for the same pair of sigmas, whatever the precision they come in."""

    def draw(sigma: Any, sigma_next: Any) -> Tensor:
        seed = int(float(f"{float(sigma):.3g}") * 1e6) * 1000003 + int(float(f"{float(sigma_next):.3g}") * 1e6)
        return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float32).to(dtype)

    return draw


CASES = [
    ("sample_euler", {}),
    ("sample_euler", {"s_churn": 4.0, "s_tmin": 0.05, "s_tmax": 5.0, "s_noise": 1.01}),
    ("sample_euler_ancestral", {"eta": 0.7, "s_noise": 1.1, "noise": True}),
    ("sample_heun", {}),
    ("sample_heun", {"s_churn": 4.0, "s_tmin": 0.05, "s_tmax": 5.0}),
    ("sample_dpm_2", {}),
    ("sample_dpm_2", {"s_churn": 4.0}),
    ("sample_dpm_2_ancestral", {"noise": True}),
    ("sample_lms", {}),
    ("sample_lms", {"order": 2}),
    ("sample_dpmpp_2s_ancestral", {"noise": True}),
    ("sample_dpmpp_2s_ancestral", {"noise": True, "eta": 0.0}),
    ("sample_dpmpp_sde", {"noise": True}),
    ("sample_dpmpp_sde", {"noise": True, "r": 0.4, "eta": 0.5}),
    ("sample_dpmpp_2m", {}),
    ("sample_dpmpp_2m_sde", {"noise": True}),
    ("sample_dpmpp_2m_sde", {"noise": True, "solver_type": "heun", "eta": 0.6}),
    ("sample_dpmpp_3m_sde", {"noise": True}),
    ("sample_dpmpp_3m_sde", {"noise": True, "eta": 0.4, "s_noise": 0.9}),
]


def run(
    module: Any, name: str, options: dict[str, Any], dtype: torch.dtype, steps: int, model: Any = None
) -> tuple[Tensor, list[Any]]:
    options = dict(options)
    if options.pop("noise", False):
        options["noise_sampler"] = noise_sampler(dtype)
    seen: list[Any] = []

    def callback(info: dict[str, Any]) -> None:
        seen.append(
            (info["i"], float(info["sigma"]), float(info["sigma_hat"]), info["x"].clone(), info["denoised"].clone())
        )

    torch.manual_seed(7)
    x = getattr(module, name)(
        model or denoiser, start(dtype), sigmas(steps, dtype), {"shift": 0.05}, callback, disable=True, **options
    )
    return x, seen


@pytest.mark.parametrize("steps", [1, 2, 3, 10])
@pytest.mark.parametrize(("name", "options"), CASES)
def test_against_k_diffusion(peer, name, options, steps):
    """Few steps over so much noise round badly in float32, the peer's and ours: see `assert_as_exact`."""
    if steps == 1 and ("2m_sde" in name or "3m_sde" in name):
        pytest.skip("k-diffusion reads an unset variable where the only step ends at zero")
    results = {}
    for dtype in (torch.float32, torch.float64):
        mine, seen = run(ours, name, options, dtype, steps)
        other, expected = run(peer, name, options, dtype, steps)
        compare_callbacks(seen, expected, steps, dtype)
        results[dtype] = mine.double(), other.double()
    (single, single_peer), (double, double_peer) = results[torch.float32], results[torch.float64]
    scale = double_peer.abs().max().clamp_min(1)
    assert (double - double_peer).abs().max() <= 1e-10 * scale
    rounded = run(
        ours, name, options, torch.float64, steps, lambda *args, **kwargs: denoiser(*args, **kwargs).float().double()
    )[0]
    assert_as_exact(single, single_peer, double_peer, float((rounded - double).abs().max() / scale))


def compare_callbacks(seen: list[Any], expected: list[Any], steps: int, dtype: torch.dtype) -> None:
    assert [s[0] for s in seen] == [e[0] for e in expected] == list(range(steps))
    if dtype == torch.float64:
        for (_, *a), (_, *b) in zip(seen, expected, strict=True):
            for x, y in zip(a, b, strict=True):
                torch.testing.assert_close(torch.as_tensor(x), torch.as_tensor(y), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("n", [3, 4, 5, 6, 8, 15])
@pytest.mark.parametrize("eta", [0.0, 0.8])
def test_dpm_fast(peer, n, eta):
    args = (denoiser, start(torch.float64), 0.03, 14.6, n)
    kwargs = {"disable": True, "eta": eta}
    torch.set_default_dtype(torch.float64)  # k-diffusion works its sigmas out in the default dtype
    try:
        expected = peer.sample_dpm_fast(*args, noise_sampler=noise_sampler(torch.float64), **kwargs)
    finally:
        torch.set_default_dtype(torch.float32)
    mine = ours.sample_dpm_fast(*args, noise_sampler=noise_sampler(torch.float64), **kwargs)
    torch.testing.assert_close(mine, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("eta", [0.0, 0.5])
def test_dpm_adaptive(peer, order, eta):
    args = (denoiser, start(torch.float64), 0.03, 14.6)
    kwargs = {"order": order, "eta": eta, "disable": True, "return_info": True}
    torch.set_default_dtype(torch.float64)
    try:
        expected, info = peer.sample_dpm_adaptive(*args, noise_sampler=noise_sampler(torch.float64), **kwargs)
    finally:
        torch.set_default_dtype(torch.float32)
    mine, mine_info = ours.sample_dpm_adaptive(*args, noise_sampler=noise_sampler(torch.float64), **kwargs)
    assert mine_info == info
    torch.testing.assert_close(mine, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["get_sigmas_karras", "get_sigmas_exponential", "get_sigmas_polyexponential"])
def test_schedules(peer, name):
    torch.testing.assert_close(
        getattr(ours, name)(9, 0.03, 14.6), getattr(peer, name)(9, 0.03, 14.6), rtol=1e-5, atol=1e-6
    )


def test_vp_schedule(peer):
    torch.testing.assert_close(ours.get_sigmas_vp(9), peer.get_sigmas_vp(9))


def test_one_kernel_a_call():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        names: list[str] = []  # noqa: RUF012

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            first = out[0] if isinstance(out, tuple) else out
            large = isinstance(first, Tensor) and first.shape == SHAPE and "empty" not in str(func)
            if large or func is torch.ops.fastgen.sampler_step_out.default:
                self.names.append(str(func))
            return out

    fixed, x = torch.zeros(SHAPE), torch.ones(SHAPE)
    levels = sigmas(6, torch.float32)
    with Count() as count:
        ours.sample_dpmpp_2m(lambda x, s: fixed, x, levels, disable=True)
    assert count.names == ["fastgen.sampler_step_out.default"] * 6


def test_brownian_tree_noise_by_default():
    torch.manual_seed(1)
    a = ours.sample_dpmpp_2m_sde(denoiser, start(torch.float32), sigmas(8, torch.float32), disable=True)
    torch.manual_seed(1)
    assert torch.equal(
        a, ours.sample_dpmpp_2m_sde(denoiser, start(torch.float32), sigmas(8, torch.float32), disable=True)
    )
    torch.manual_seed(2)
    assert not torch.equal(
        a, ours.sample_dpmpp_2m_sde(denoiser, start(torch.float32), sigmas(8, torch.float32), disable=True)
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: ours.sample_euler(denoiser, x, torch.tensor([1.0, 2.0])), "sigmas must go down"),
        (lambda x: ours.sample_euler(denoiser, x, torch.tensor([1.0])), "at least two levels"),
        (lambda x: ours.sample_dpm_fast(denoiser, x, 0.0, 1.0, 4), "sigma_min and sigma_max"),
        (lambda x: ours.sample_lms(denoiser, x, sigmas(4, torch.float32), order=0), "order must be"),
        (lambda x: ours.sample_dpmpp_2m_sde(denoiser, x, sigmas(4, torch.float32), solver_type="x"), "solver_type"),
        (lambda x: ours.sample_dpm_adaptive(denoiser, x, 0.1, 1.0, order=5), "order must be 2 or 3"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.ones(SHAPE))


def one_for_all(sigma, sigma_next):
    return torch.randn(1, *SHAPE[1:], generator=torch.Generator().manual_seed(1))


def test_noise_of_one_sample_is_spread_over_the_batch(peer):
    """A user's ``noise_sampler`` may draw for one sample: an addition spreads it, and so does the kernel's operand."""
    for name in ("sample_euler_ancestral", "sample_dpmpp_sde", "sample_dpmpp_2m_sde"):
        arguments = (denoiser, start(torch.float32), sigmas(5, torch.float32))
        found = getattr(ours, name)(*arguments, noise_sampler=one_for_all, disable=True)
        expected = getattr(peer, name)(*arguments, noise_sampler=one_for_all, disable=True)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("draw", "error", "message"),
    [
        (lambda: torch.zeros(3, *SHAPE[1:]), ValueError, "noise_sampler must broadcast to the shape"),
        (lambda: torch.zeros(SHAPE[1:][1:]), None, ""),
        (lambda: torch.zeros(SHAPE, device="meta"), ValueError, "noise_sampler must be on the device"),
        (lambda: torch.zeros(SHAPE).numpy(), TypeError, "noise_sampler must be a tensor, got ndarray"),
    ],
)
def test_a_noise_sampler_is_checked(draw, error, message):
    arguments = (denoiser, start(torch.float32), sigmas(3, torch.float32))
    with pytest.raises(error, match=message) if error else contextlib.nullcontext():
        ours.sample_euler_ancestral(*arguments, noise_sampler=lambda *levels: draw(), disable=True)
