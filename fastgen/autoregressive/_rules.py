"""What an ATen operation on the image becomes, operation by operation: :data:`RULES`.

A rule is called as the operation is, after the :class:`Builder`, with a :class:`Value` in place of every tensor that depends on the
image, and returns what stands for its results. A new operation is a function of three lines under ``@rule("namespace.name")``.
"""

from collections.abc import Callable
from typing import Any

from ._values import NotPlannable

Rule = Callable[..., Any]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    def enter(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return enter


def refuse(reason: str, *names: str) -> None:
    def refusal(*_: Any, **__: Any) -> None:
        raise NotPlannable(reason)

    RULES.update(dict.fromkeys(names, refusal))


refuse(
    "GroupNorm averages over the whole image, so a pixel's value would depend on later pixels", "aten.native_group_norm"
)
refuse(
    "pooling takes whole blocks of pixels, so a pixel's value would depend on later pixels",
    "aten.max_pool2d_with_indices", "aten.avg_pool2d", "aten._adaptive_avg_pool2d", "aten.adaptive_max_pool2d",
)  # fmt: skip
refuse("torch.roll brings the last rows or columns to the first", "aten.roll")
refuse("turns the image about, so a pixel's value would depend on later pixels", "aten.flip", "aten.rot90")
refuse("a cumulative sum over positions is not computed pixel by pixel here", "aten.cumsum")
refuse(
    "a recurrent layer is not computed pixel by pixel here",
    "aten.lstm", "aten.gru", "aten.mkldnn_rnn_layer", "aten._cudnn_rnn",
)  # fmt: skip
refuse(
    "reads the image's numbers in Python, and what it computes would depend on them",
    "aten._local_scalar_dense", "aten.is_nonzero", "aten.nonzero", "aten.equal",
)  # fmt: skip
