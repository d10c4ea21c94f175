"""No figure for a wrong result: the check before the timing is of the calls that are timed, and a red case has no figure."""

import pytest
import torch

from benchmarks import measure, results, tables, verify
from benchmarks.cases import Case, Provider, SetUp, Workload
from benchmarks.timing import CudaClock, HostClock
from benchmarks.verify import Normals, Values

EXPECTED = torch.linspace(1, 2, 64, dtype=torch.float64)
RIGHT = EXPECTED.float()


def workload(expected=None, **outputs):
    expected = expected or Values(lambda: [EXPECTED], yardstick="eager")
    providers = [
        Provider(
            name, tensor if callable(tensor) else lambda t=tensor: t, "fastgen" if name == "fastgen" else "baseline"
        )
        for name, tensor in outputs.items()
    ]
    return Workload(providers, (expected,), min_bytes=1, flops=1)


def verdicts(**outputs):
    return {check.provider: check for check in verify.check(workload(**outputs))}


def test_twice_the_error_of_plain_torch_passes_and_more_does_not():
    plain = RIGHT + 1e-3
    checks = verdicts(eager=plain, good=RIGHT + 1.9e-3, bad=RIGHT + 2.1e-3)
    assert checks["good"].ok
    assert not checks["bad"].ok and "off by 0.0021" in checks["bad"].reason


def test_many_small_errors_are_red_where_the_yardstick_has_one():
    plain = RIGHT.clone()
    plain[0] += 1e-3
    check = verdicts(eager=plain, fastgen=RIGHT + 1e-3)["fastgen"]
    assert not check.ok and "root mean square" in check.reason


def test_a_sum_may_be_off_by_what_halves_may_round():
    total = torch.tensor(1.0, dtype=torch.float64)
    one_off = total.float() + 3 * torch.finfo(torch.float32).eps
    outputs = {"eager": total.float(), "fastgen": one_off}
    for terms, ok in ((None, False), ((2**20,), True), ((2,), False)):
        checks = verify.check(workload(Values(lambda: [total], yardstick="eager", terms=terms), **outputs))
        assert checks[1].ok is ok, terms


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_one_element_that_is_no_number_is_red(wrong):
    broken = RIGHT.clone()
    broken[17] = wrong
    assert not verdicts(eager=RIGHT, fastgen=broken)["fastgen"].ok


def test_shape_count_and_zeros_are_red():
    assert "shape" in verdicts(eager=RIGHT, fastgen=RIGHT[:-1])["fastgen"].reason
    assert "2 outputs instead of 1" in verdicts(eager=RIGHT, fastgen=lambda: (RIGHT, RIGHT))["fastgen"].reason
    zeros = verify.check(workload(Values(lambda: [torch.zeros(8)], tolerance=1.0), fastgen=torch.zeros(8)))
    assert not zeros[0].ok and "proves nothing" in zeros[0].reason


def test_the_second_call_is_checked_too():
    answers = iter([RIGHT, RIGHT + 1])
    check = verdicts(eager=RIGHT, fastgen=lambda: next(answers))["fastgen"]
    assert not check.ok and "off by 1" in check.reason


def test_a_provider_with_an_expectation_of_its_own_is_held_to_that_alone():
    other = Values(lambda: [EXPECTED + 1], tolerance=1e-6)
    made = workload(eager=RIGHT, fastgen=RIGHT)
    made.providers.append(Provider("other", lambda: RIGHT + 1, expected=(other,)))
    assert [check.ok for check in verify.check(made)] == [True, True, True]


def test_normals_are_known_by_mean_and_variance():
    drawn = torch.randn(4096, generator=torch.Generator().manual_seed(0))
    shared = Normals(lambda outputs: outputs[0])
    for outputs, ok in ((drawn, True), (drawn * 1.1, False), (drawn + 0.2, False), (drawn * float("nan"), False)):
        assert verify.check(workload(shared, fastgen=outputs))[0].ok is ok


def measured(made, **options):
    case = Case("group_norm", "silu", (64,), "fp32", lambda allow_compile: made, "GroupNorm")
    return measure.measure(case, torch.device("cpu"), seconds=0.0, min_rounds=3, allow_compile=False, **options)


def test_a_wrong_case_gets_no_figure():
    row = measured(workload(eager=RIGHT, fastgen=RIGHT + 1))
    assert not row["green"] and row["times"] == {} and row["ratios"] == {}
    assert "off by 1" in row["red"]["fastgen"]


def test_what_a_provider_took_before_stands_in_the_row():
    made = workload(eager=RIGHT, fastgen=RIGHT)
    assert "set_up" not in measured(made)
    made.set_up["fastgen"] = SetUp(0.123456, 385)
    assert measured(made)["set_up"] == {"fastgen": [0.1235, 385]}


def test_a_wrong_or_failing_baseline_is_no_baseline():
    def fails():
        raise RuntimeError("no such peer")

    exact = Values(lambda: [EXPECTED], tolerance=1e-6)
    row = measured(workload(exact, fastgen=RIGHT, eager=RIGHT + 1, peer=fails))
    assert row["green"] and set(row["times"]) == {"fastgen"} and row["ratios"] == {}
    assert any("eager is not timed" in note for note in row["notes"])
    assert any("no such peer" in note for note in row["notes"])


def test_a_case_that_cannot_be_set_up_is_red():
    def build(allow_compile):
        raise RuntimeError("no such kernel")

    case = Case("group_norm", "silu", (64,), "fp32", build, "GroupNorm")
    row = measure.measure(case, torch.device("cpu"), seconds=0.0, min_rounds=3, allow_compile=False)
    assert not row["green"] and "no such kernel" in row["red"]["fastgen"]


def test_the_calls_that_are_timed_are_the_calls_that_were_checked():
    called = []

    def fastgen():
        called.append(1)
        return RIGHT.clone()

    row = measured(workload(eager=RIGHT.clone, fastgen=fastgen))
    assert row["green"] and set(row["ratios"]) == {"eager"} and row["rounds"] >= 3
    assert len(called) > verify.CALLS
    results._check_keys(row, results._ROW_KEYS, "row")


def test_on_a_gpu_device_time_and_host_time_stand_apart(monkeypatch):
    class Fixed(HostClock):
        def __init__(self, seconds, captured=()):
            self.seconds, self.captured = seconds, list(captured)

        def round(self, calls, iterations):
            return dict.fromkeys(calls, self.seconds)

    monkeypatch.setattr(measure, "clock_for", lambda device, kind, calls: Fixed(2.0, ["fastgen"]))
    monkeypatch.setattr(measure, "HostLaunchClock", lambda: Fixed(3.0))
    case = Case("toy", "toy", (64,), "fp32", lambda _: workload(eager=RIGHT, fastgen=RIGHT), "toys")
    row = measure.measure(case, torch.device("cuda"), seconds=0.0, min_rounds=3, allow_compile=False)
    assert row["times"] == {name: [2.0] * 3 for name in ("eager", "fastgen")} and row["captured"] == ["fastgen"]
    assert row["host"] == {name: [3.0] * 3 for name in ("eager", "fastgen")}
    lines = tables.host_times([row]).splitlines()[2:]
    assert ["graph" in line for line in lines] == [False, True] and all("3 s" in line for line in lines)


@pytest.mark.gpu
def test_a_call_that_can_be_captured_is_replayed_and_one_that_waits_is_not():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    x = torch.randn(64, device="cuda")
    clock = CudaClock(torch.device("cuda"), {"add": lambda: x + 1, "waits": lambda: (x + 1).cpu()})
    assert clock.captured == ["add"]
    times = clock.round({"add": lambda: x + 1, "waits": lambda: (x + 1).cpu()}, {})
    assert all(0 < seconds < 1 for seconds in times.values())


def test_samples_are_kept_only_where_they_are_asked_for():
    made = workload(eager=RIGHT.clone, fastgen=RIGHT.clone)
    assert "samples" not in measured(made)
    row = measured(made, raw=True)
    assert len(row["samples"]["fastgen"]) == len(row["samples"]["eager"]) == row["rounds"]
