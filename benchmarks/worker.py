"""The child of `compare.py`: fastgen from a given checkout, the cases from this one; one JSON message a line, one answer each.

Run as a file, not as a module: which fastgen is imported must be settled before anything of `benchmarks` is.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parents[1]


def import_fastgen(checkout: Path) -> None:
    """Import fastgen from ``checkout`` and nowhere else; then make this checkout's `benchmarks` importable.

    Raises:
        ImportError: fastgen came from another place.
    """
    sys.path[:] = [str(checkout)] + [p for p in sys.path if Path(p).resolve() != HERE / "benchmarks"]
    import fastgen

    origin = Path(fastgen.__file__).resolve().parent
    if origin != checkout.resolve() / "fastgen":
        raise ImportError(f"fastgen came from {origin}, not from {checkout}")
    sys.path.insert(0, str(HERE))


class Session:
    """Keeps the case that was loaded last, and times one sample of it on request."""

    def __init__(self, device_name: str) -> None:
        import torch

        self._device = torch.device(device_name)
        self._known: dict[str, Any] = {}
        self._calls: dict[str, Any] = {}

    def list(self, cases: str | None) -> list[str]:
        from benchmarks.cases import collect

        def listed(full: bool, pattern: str | None) -> dict[str, Any]:
            families, _ = collect(self._device, full, pattern)
            return {case.id: case for found in families.values() for case in found}

        self._known = listed(True, None) | listed(False, None)
        return [*listed(False, cases)]

    def load(self, case_id: str) -> dict[str, Any]:
        """Set up, check and calibrate; the answer says how long a sample takes, or what is wrong."""
        from benchmarks import verify
        from benchmarks.timing import calibrate, clock_for

        self._calls = {}
        if not self._known:
            self.list(None)
        case = self._known[case_id]
        try:
            self._workload = case.build(False)
            red = [check for check in verify.check(self._workload) if check.provider == "fastgen" and not check.ok]
        except Exception as error:
            return {"ok": False, "reason": f"{type(error).__name__}: {error}"[:300]}
        if red:
            return {"ok": False, "reason": red[0].reason}
        self._calls = {p.name: p.call for p in self._workload.providers if p.role == "fastgen"}
        with self._workload.grad_mode():
            self._clock = clock_for(self._device, case.clock, self._calls)
            self._iterations = calibrate(self._calls, self._clock)
        return {"ok": True, "seconds": self.sample() * self._iterations["fastgen"]}

    def sample(self) -> float:
        with self._workload.grad_mode():
            return self._clock.round(self._calls, self._iterations)["fastgen"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkout", type=Path, required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    import_fastgen(args.checkout)
    import torch

    if args.threads:
        torch.set_num_threads(args.threads)
    answers = sys.stdout
    sys.stdout = sys.stderr  # whatever a library prints must not mix with the answers
    session = Session(args.device)
    for line in sys.stdin:
        message = json.loads(line)
        match message["command"]:
            case "list":
                answer: Any = session.list(message["cases"])
            case "load":
                answer = session.load(message["case"])
            case "sample":
                answer = session.sample()
            case other:
                answer = {"ok": False, "reason": f"unknown command {other!r}"}
        print(json.dumps(answer), file=answers, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
