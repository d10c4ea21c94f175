"""docs/models.md: its examples run, and every model is in its table."""

import re
from pathlib import Path

from torch import nn

from fastgen import models

PAGE = (Path(__file__).parents[2] / "docs" / "models.md").read_text(encoding="utf-8")


def test_the_examples_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    for block in re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL):
        exec(compile(block, "models.md", "exec"), names)
    assert names["images"].shape == (2, 3, 32, 32)
    assert names["noise"].shape == (2, 3, 5, 16, 16)
    assert names["unet"].state_dict().keys() == names["theirs"].keys() and not names["unet"].training


def test_every_model_is_in_the_table():
    whole = {
        name
        for name in models.__all__
        if isinstance(getattr(models, name), type) and issubclass(getattr(models, name), nn.Module)
    }
    named = set(re.findall(r"`(\w+)`", "".join(line for line in PAGE.splitlines() if line.startswith("| `"))))
    assert whole - named == {"AutoregressiveModel", "DigitClassifier", "FlowModel"}
