"""Fills the parity table of docs/samplers.md: the largest difference from diffusers over all cases of the test suite.

python docs/make_parity_table.py      (needs diffusers)
"""

import contextlib
import warnings

import torch
from _pages import replace_part, table
from tqdm import tqdm

from tests.samplers.diffusers.parity import error, in_float64, pair, run
from tests.samplers.diffusers.test_parity import CASES

STEPS = 10


def main() -> None:
    warnings.simplefilter("ignore")
    worst: dict[str, list[float]] = {}
    for name, config, options in tqdm(CASES, unit="case"):
        channels = 2 if config.get("variance_type") == "learned_range" else 1
        kwargs = {"channels": channels, **options}
        seen = worst.setdefault(name, [0, 0.0, 0.0])
        seen[0] += 1
        for place, dtype in ((1, torch.float32), (2, torch.float64)):
            mine, peer = pair(name, **config)
            mine.set_timesteps(STEPS)
            peer.set_timesteps(STEPS)
            if "variance_noise" in mine.step.__code__.co_varnames and config.get("algorithm_type", "").startswith(
                "sde"
            ):
                kwargs["variance_noise"] = torch.randn(2, 3, 6, 5, generator=torch.Generator().manual_seed(1)).to(dtype)
            ours = run(mine, dtype, **kwargs)
            with in_float64(peer) if dtype == torch.float64 else contextlib.nullcontext():
                theirs = run(peer, dtype, clock=mine, **kwargs)
            seen[place] = max(seen[place], error(ours, theirs))
    rows = [
        [f"`{name}`", f"{cases:.0f}", f"{single:.1e}", f"{double:.1e}"]
        for name, (cases, single, double) in sorted(worst.items())
    ]
    replace_part("samplers.md", "parity", table(["scheduler", "configurations", "float32", "float64"], rows))


if __name__ == "__main__":
    main()
