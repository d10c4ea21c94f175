"""`fastgen doctor` says what the library itself says."""

import json
import os
import subprocess
import sys

from fastgen import _library
from fastgen.cli.main import main

from ..backends import requires_cpu


def test_json(capsys):
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["cpu"]["isa"] == _library.ISA
    assert set(report["backends"]) == {"group_norm", "sampler_step", "philox_normal", "q_sample", "diffusion_loss"}
    assert report["failures"] == _library.FAILURES
    assert report["versions"]["torch"]


@requires_cpu
def test_text_names_the_variant_and_why(capsys):
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert f"instruction set variant: {_library.ISA}" in text and _library.ISA_REASON in text
    assert f"group_norm, CPU tensors: C++ ({_library.ISA})" in text
    assert "not triton" in text or "CUDA tensors: triton" in text


def run_with(isa: str) -> tuple[dict, str]:
    command = [sys.executable, "-m", "fastgen", "doctor", "--json"]
    result = subprocess.run(command, env={**os.environ, "FASTGEN_ISA": isa}, capture_output=True, text=True, check=True)
    return json.loads(result.stdout), result.stderr


@requires_cpu
def test_the_override_is_obeyed_and_an_impossible_one_reported():
    report, _ = run_with("portable")
    assert report["cpu"]["isa"] == "portable" and report["cpu"]["isa_reason"] == "FASTGEN_ISA=portable"
    report, _ = run_with("reference")
    assert report["cpu"]["isa"] is None and report["backends"]["group_norm"]["cpu"]["backend"] == "reference"
    report, warning = run_with("mmx")
    assert report["cpu"]["isa"] is not None and "FASTGEN_ISA=mmx" in report["failures"]["mmx"] and "mmx" in warning
