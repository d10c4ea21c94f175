"""flowjax under JAX as a baseline, in a process of its own: JAX and torch do not share their threads well.

The process is the Python that ``FASTGEN_JAX_PYTHON`` names, one that has flowjax installed (`pip install flowjax`), or else this
one. Messages are pickled tuples with their length before them. Everything that is timed is jitted, and has run once.
"""

import contextlib
import importlib.util
import os
import pickle
import struct
import subprocess
import sys
from collections.abc import Callable
from typing import Any, BinaryIO


class Peer:
    """``peer(name, *arrays)`` calls the function ``name`` below in the other process."""

    def __init__(self, python: str) -> None:
        self._process = subprocess.Popen([python, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def __call__(self, *message: Any) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        _send(self._process.stdin, message)
        kind, answer = _receive(self._process.stdout)
        if kind == "error":
            raise RuntimeError(f"flowjax: {answer}")
        return answer

    def __del__(self) -> None:
        with contextlib.suppress(OSError, AttributeError):
            self._process.stdin.close()  # type: ignore[union-attr]
            self._process.wait(5)


def started(allow: bool, notes: list[str]) -> Peer | None:
    """The other process, or None where there can be none; ``notes`` says why."""
    python = os.environ.get("FASTGEN_JAX_PYTHON")
    if python is None and importlib.util.find_spec("flowjax") is not None:
        python = sys.executable
    if not allow or python is None:
        reason = "FASTGEN_JAX_PYTHON names no Python that has it" if allow else "conversions are switched off"
        notes.append(f"flowjax is not measured: {reason}")
        return None
    try:
        peer = Peer(python)
        notes.append(f"flowjax {peer('version')}")
        return peer
    except (OSError, EOFError, RuntimeError) as error:
        notes.append(f"flowjax is not measured: {type(error).__name__}: {error}")
        return None


def _send(to: BinaryIO, message: Any) -> None:
    data = pickle.dumps(message, protocol=5)
    to.write(struct.pack("<Q", len(data)) + data)
    to.flush()


def _receive(source: BinaryIO) -> Any:
    header = source.read(8)
    if len(header) < 8:
        raise EOFError("the other process has ended")
    return pickle.loads(source.read(struct.unpack("<Q", header)[0]))


# ---- in the other process ------------------------------------------------------------------------------------------------------


class _Session:
    def __init__(self) -> None:
        self._run: Callable[[], Any] | None = None

    def version(self) -> str:
        import flowjax
        import jax

        return f"{getattr(flowjax, '__version__', '')} under JAX {jax.__version__}".strip()

    def maf(self, features: int, width: int, depth: int, y: Any, inverse: bool) -> list[Any]:
        """Set up a masked autoregressive layer with affine maps; its weights [(weight, bias, mask), ...] as they are applied.

        Of the outputs of a feature the shift comes first, then the raw scale, of which 0 stands for a scale of 1.
        """
        import equinox as eqx
        import jax
        import jax.random as jr
        import numpy as np
        import paramax
        from flowjax.bijections import Affine, MaskedAutoregressive

        layer = MaskedAutoregressive(jr.key(0), transformer=Affine(), dim=features, nn_width=width, nn_depth=depth)
        layer = paramax.unwrap(layer)  # masks applied once, before anything is timed
        given = jax.numpy.asarray(y)
        way = "inverse_and_log_det" if inverse else "transform_and_log_det"
        function = eqx.filter_jit(lambda layer, y: jax.vmap(getattr(layer, way))(y))
        self._run = lambda: function(layer, given)
        self.run()
        linears = layer.masked_autoregressive_mlp.layers
        return [(np.asarray(one.weight), np.asarray(one.bias), np.asarray(one.weight) != 0) for one in linears]

    def spline(self, x: Any, parameters: Any, bound: float, inverse: bool) -> None:
        """Set up a rational-quadratic spline in [-bound, bound] of each element of x [N, D], by its parameters [N, D, 3 K + 1]: of
        widths, of heights and of the slopes at all knots, added to those of the identity. Log-dets are summed a row, [N]."""
        import equinox as eqx
        import jax
        import paramax
        from flowjax.bijections import RationalQuadraticSpline
        from flowjax.utils import get_ravelled_pytree_constructor

        bins = (parameters.shape[-1] - 1) // 3
        template = RationalQuadraticSpline(knots=bins - 1, interval=bound)
        constructor, count = get_ravelled_pytree_constructor(
            template, filter_spec=eqx.is_inexact_array, is_leaf=lambda leaf: isinstance(leaf, paramax.NonTrainable)
        )
        assert count == parameters.shape[-1]
        one = "inverse_and_log_det" if inverse else "transform_and_log_det"
        each = jax.vmap(jax.vmap(lambda x, row: getattr(constructor(row), one)(x)))

        def whole(x: Any, parameters: Any) -> tuple[Any, Any]:
            y, log_det = each(x, parameters)
            return y, log_det.sum(1)

        function = jax.jit(whole)
        arrays = [jax.numpy.asarray(a) for a in (x, parameters)]
        self._run = lambda: function(*arrays)
        self.run()

    def run(self) -> Any:
        """What was set up: (values, log-dets)."""
        import jax
        import numpy as np

        assert self._run is not None
        return [np.asarray(a) for a in jax.block_until_ready(self._run())]


def main() -> None:
    """Answer messages until they end."""
    source, answers = sys.stdin.buffer, sys.stdout.buffer
    sys.stdout = sys.stderr  # whatever a library prints must not mix with the answers
    session = _Session()
    while True:
        try:
            name, *arguments = _receive(source)
        except EOFError:
            return
        try:
            answer = ("ok", getattr(session, name)(*arguments))
        except Exception as error:
            answer = ("error", f"{type(error).__name__}: {error}")
        _send(answers, answer)


if __name__ == "__main__":
    main()
