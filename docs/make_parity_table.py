"""Fills the parity table of docs/samplers.md: the largest error of a stand-in and of its parent over the cases of the test suite.

python docs/make_parity_table.py      (needs diffusers)
"""

from _pages import replace_part, table
from tqdm import tqdm

from fastgen.samplers import from_diffusers
from tests.samplers.diffusers.cases import CASES
from tests.samplers.diffusers.parity import error, parents, run


def main() -> None:
    worst: dict[str, list[float]] = {}
    for case in tqdm(CASES, unit="case"):
        theirs = parents(case)
        mine = from_diffusers(theirs.scheduler)
        seen = worst.setdefault(case.name, [0, 0.0, 0.0, 0.0])
        seen[0] += 1
        single, double = run(mine, case), run(mine, case, dtype=theirs.exact[0].dtype, exact=True)
        for place, off in enumerate((error(single, theirs.exact), theirs.off, error(double, theirs.exact)), start=1):
            seen[place] = max(seen[place], off)
    rows = [
        [f"`{name}`", f"{cases:.0f}", f"{single:.1e}", f"{of_parent:.1e}", f"{double:.1e}"]
        for name, (cases, single, of_parent, double) in sorted(worst.items())
    ]
    replace_part(
        "samplers.md", "parity", table(["scheduler", "configurations", "float32", "its parent", "float64"], rows)
    )


if __name__ == "__main__":
    main()
