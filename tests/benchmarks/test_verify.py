"""No figure for a wrong result: the check before the timing, and what a red case leaves behind."""

import pytest
import torch

from benchmarks import results, run, verify
from benchmarks.cases import Case, Provider, Workload

EXPECTED = torch.linspace(1, 2, 64, dtype=torch.float64)
RIGHT = EXPECTED.float()


def verdicts(**outputs):
    outputs = {name: [tensor] for name, tensor in outputs.items()}
    return {check.provider: check for check in verify.compare(outputs, [EXPECTED], yardstick="eager")}


def test_twice_the_error_of_plain_torch_passes_and_more_does_not():
    plain = RIGHT + 1e-3
    checks = verdicts(eager=plain, good=RIGHT + 1.9e-3, bad=RIGHT + 2.1e-3)
    assert checks["good"].ok
    assert not checks["bad"].ok and "off by 0.0021" in checks["bad"].reason


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_one_element_that_is_no_number_is_red(wrong):
    broken = RIGHT.clone()
    broken[17] = wrong
    assert not verdicts(eager=RIGHT, fastgen=broken)["fastgen"].ok


def test_shape_and_zeros_are_red():
    checks = verdicts(eager=RIGHT, fastgen=RIGHT[:-1])
    assert "shape" in checks["fastgen"].reason
    zeros = verify.compare({"fastgen": [torch.zeros(8)]}, [torch.zeros(8).double()], tolerance=1.0)
    assert not zeros[0].ok and "proves nothing" in zeros[0].reason


def case(ours, baseline=RIGHT):
    def build(allow_compile):
        def check():
            outputs = {"fastgen": [ours], "eager": [baseline]}
            return verify.compare(outputs, [EXPECTED], tolerance=1e-3)

        providers = [Provider("fastgen", lambda: ours.clone(), "fastgen"), Provider("eager", lambda: baseline.clone())]
        return Workload(providers, check, min_bytes=1, flops=1)

    return Case("group_norm", "silu", (64,), "fp32", build)


def measure(case):
    return run.measure(case, torch.device("cpu"), seconds=0.0, min_rounds=3, allow_compile=False)


def test_a_wrong_case_gets_no_figure():
    row = measure(case(RIGHT + 1))
    assert not row["green"] and row["providers"] == {} and row["ratios"] == {}
    assert "off by 1" in row["checks"][0]["reason"]


def test_a_wrong_baseline_is_no_baseline():
    row = measure(case(RIGHT, RIGHT + 1))
    assert row["green"] and set(row["providers"]) == {"fastgen"} and row["ratios"] == {}
    assert any("eager is not timed" in note for note in row["notes"])


def test_a_case_that_cannot_be_set_up_is_red():
    def build(allow_compile):
        raise RuntimeError("no such kernel")

    row = measure(Case("group_norm", "silu", (64,), "fp32", build))
    assert not row["green"] and "no such kernel" in row["checks"][0]["reason"]


def test_a_right_case_is_timed_round_by_round():
    row = measure(case(RIGHT))
    assert row["green"] and set(row["ratios"]) == {"eager"}
    assert len(row["providers"]["fastgen"]["seconds"]) == len(row["providers"]["eager"]["seconds"]) >= 3
    results._check_keys(row, results._ROW_KEYS, "row")
