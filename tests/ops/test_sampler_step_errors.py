"""What `sampler_step` refuses, and how it says so."""

import pytest
import torch

from fastgen.ops import sampler_step

from .sampler_step_cases import make_table

X = (2, 3)


@pytest.mark.parametrize(
    ("error", "message", "changes"),
    [
        (TypeError, "sample must be a floating-point tensor, got torch.int64", {"sample": torch.zeros(X).long()}),
        (TypeError, "sample must be a floating-point tensor, got list", {"sample": [1.0]}),
        (ValueError, r"sample must be \[N, \*\], got a scalar", {"sample": torch.tensor(1.0)}),
        (TypeError, "table must be a float32 or float64 tensor, got torch.float16", {"table": make_table().half()}),
        (TypeError, "table must be a float32 or float64 tensor, got list", {"table": [[1.0]]}),
        (ValueError, r"table must be \[steps, >= 19 \+ 0 of the history\]", {"table": make_table()[:, :18]}),
        (ValueError, "table must be .* 19 \\+ 0", {"table": make_table()[0]}),
        (ValueError, r"table must be \[steps, >= 19 \+ 7", {"history": [torch.zeros(X)] * 7}),
        (ValueError, "table must be on the device of sample", {"table": make_table().to("meta")}),
        (IndexError, r"step must be in \[0, 3\), got 3", {"step": 3}),
        (IndexError, r"step must be in \[0, 3\), got -1", {"step": -1}),
        (TypeError, "model_output must be a floating-point tensor, got NoneType", {"model_output": None}),
        (
            ValueError,
            r"model_output must have the shape of sample \(2, 3\), got shape \(2, 4\)",
            {"model_output": torch.zeros(2, 4)},
        ),
        (ValueError, "model_output must be on the device", {"model_output": torch.zeros(X, device="meta")}),
        (ValueError, "uncond must have the shape of sample", {"uncond": torch.zeros(1, 3)}),
        (TypeError, "uncond must be a floating-point tensor, got torch.bool", {"uncond": torch.zeros(X).bool()}),
        (
            ValueError,
            r"history\[1\] must have the shape of sample",
            {"history": [torch.zeros(X), torch.zeros(3)]},
        ),
        (ValueError, "noise must have the shape of sample", {"noise": torch.zeros(3)}),
        (ValueError, "give noise or seeds, not both", {"noise": torch.zeros(X), "seeds": [1, 2]}),
        (ValueError, r"seeds must be one per sample, got 3 for shape \(2, 3\)", {"seeds": [1, 2, 3]}),
        (TypeError, "seeds must be integers of at most 64 bits", {"seeds": [1, 2.5]}),
        (TypeError, "seeds must be an int64 tensor", {"seeds": torch.zeros(2)}),
        (ValueError, "seeds must be one-dimensional", {"seeds": torch.zeros(2, 1).long()}),
        (ValueError, "seeds must be on the device of sample", {"seeds": torch.zeros(2, device="meta").long()}),
        (ValueError, "variance scales the noise: give noise or seeds", {"variance": torch.zeros(X)}),
        (ValueError, "variance must have the shape", {"variance": torch.zeros(3), "noise": torch.zeros(X)}),
        (ValueError, "mask and known come together", {"mask": torch.ones(X)}),
        (ValueError, "mask and known come together", {"known": torch.ones(X)}),
        (ValueError, "known_noise comes with mask and known", {"known_noise": torch.ones(X)}),
        (
            ValueError,
            r"mask must broadcast to shape \(2, 3\) of sample, got shape \(2, 2\)",
            {"mask": torch.ones(2, 2), "known": torch.ones(X)},
        ),
        (ValueError, "known must broadcast", {"mask": torch.ones(X), "known": torch.ones(1, 2, 3)}),
        (
            ValueError,
            "known_noise must broadcast",
            {"mask": torch.ones(X), "known": torch.ones(X), "known_noise": torch.ones(5)},
        ),
        (
            TypeError,
            "mask must be a floating-point tensor, got torch.bool",
            {"mask": torch.ones(X).bool(), "known": torch.ones(X)},
        ),
        (TypeError, "mask must be a floating-point tensor, got float", {"mask": 1.0, "known": torch.ones(X)}),
        (ValueError, r"threshold must be one per sample \(2\), got shape \(3,\)", {"threshold": torch.ones(3)}),
        (TypeError, "threshold must be a floating-point tensor, got float", {"threshold": 1.0}),
        (ValueError, "threshold must be on the device", {"threshold": torch.ones(2, device="meta")}),
        (
            ValueError,
            r"table must be \[steps, >= 19 \+ 8",
            {"history": [torch.zeros(X)] * 4, "return_corrected": True},
        ),
        (ValueError, "out must be 1 tensors, as many as are returned, got 2", {"out": [torch.zeros(X)] * 2}),
        (ValueError, "out must be 2 tensors", {"out": torch.zeros(X), "return_prediction": True}),
        (ValueError, r"out\[0\] must have the shape of sample", {"out": torch.zeros(3)}),
        (TypeError, r"out\[0\] must have the dtype of sample \(torch.float32\)", {"out": torch.zeros(X).double()}),
        (ValueError, "out= has no gradient", {"out": torch.zeros(X), "uncond": torch.zeros(X, requires_grad=True)}),
    ],
)
def test_errors(error, message, changes):
    arguments = {"sample": torch.zeros(X), "model_output": torch.zeros(X), "table": make_table(), "step": 0}
    with pytest.raises(error, match=f"sampler_step: {message}"):
        sampler_step(**{**arguments, **changes})
