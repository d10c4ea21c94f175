"""The examples: each compiles and says what it is; what they share does what it prints."""

import importlib.util
from pathlib import Path

import pytest
import torch
from torch import nn

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_it_compiles_and_says_what_it_is(path):
    code = compile(path.read_text(encoding="utf-8"), str(path), "exec")
    assert code.co_consts[0].endswith(".") or "\n" in code.co_consts[0]  # the docstring
    assert path.stem == "both_ways" or "main" in code.co_names


def test_both_ways(capsys):
    spec = importlib.util.spec_from_file_location("both_ways", EXAMPLES / "both_ways.py")
    both_ways = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(both_ways)
    model = nn.Sequential(
        nn.Conv2d(4, 32, 3, padding=1), nn.GroupNorm(4, 32), nn.SiLU(), nn.Conv2d(32, 8, 3, padding=1)
    )
    nn.init.zeros_(model[3].weight)
    both_ways.random_weights(model)
    assert model[3].weight.any() and not model.training
    x = torch.randn(1, 4, 32, 32)
    both_ways.compare(model, lambda each: each(x))
    printed = capsys.readouterr().out
    assert printed.startswith("accelerated") and "times as fast" in printed
    assert "of the norm of the output" in printed and printed.rstrip().endswith("restored: the same bits True")
