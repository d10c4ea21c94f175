"""Draws docs/solvers.png and fills the solver table of docs/samplers.md: the shipped digits by every solver and step count.

python docs/make_solver_grid.py      (two or three minutes; needs scikit-learn and matplotlib)
"""

import time

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from _pages import replace_part, save_figure, table
from tqdm import tqdm

from fastgen.cli.demo.digit_scores import DigitJudge
from fastgen.models import UNet, find_weights
from fastgen.samplers import SOLVERS, make_solver, sample, squared_cosine_betas

STEPS = (5, 10, 20, 50)
LEFT_OUT = {
    "lcm": "its models are distilled", "tcd": "its models are distilled", "consistency": "its models are distilled",
    "repaint": "for inpainting",
    "flow_euler": "for flow models", "flow_heun": "for flow models", "edm_euler": "for EDM models",
    "edm_heun": "for EDM models", "edm_dpmpp_2m": "for EDM models",
}  # fmt: skip
COUNT = 100


def arguments(name: str) -> dict[str, object]:
    """The schedule the digits were trained on; at its end alpha_bar is nearly 0, so sigma begins at 80, as in EDM."""
    given: dict[str, object] = {"betas": squared_cosine_betas(), "clip_sample": True}
    if name == "ddim":
        given["use_clipped_model_output"] = True
    if name not in ("ddpm", "ddim", "pndm"):
        given |= {"sigma_spacing": "karras", "sigma_max": 80.0, "sigma_min": 0.02}
    return given


def main() -> None:
    model = UNet.load(find_weights("digits-ddpm"))
    judge = DigitJudge()
    labels = torch.arange(10).repeat_interleave(COUNT // 10)
    names = [name for name in SOLVERS if name not in LEFT_OUT]
    figure, axes = plt.subplots(
        len(names), len(STEPS), figsize=(9.5, 0.27 * len(names) + 0.4), layout="constrained", squeeze=False
    )
    rows = []
    for row, name in enumerate(tqdm(names, unit="solver")):
        cells = [f"`{name}`"]
        for column, steps in enumerate(STEPS):
            solver = make_solver(name, **arguments(name))
            start = time.perf_counter()
            images = sample(
                model, (COUNT, 1, 8, 8), solver, steps=steps, seeds=range(COUNT), classes=labels, progress=False
            )
            seconds = time.perf_counter() - start
            axis = axes[row][column]
            broken = int((~images.isfinite().flatten(1).all(1)).sum())
            if broken:  # a solver that fails is to be seen, not drawn as grey
                cells.append(f"{broken} of {COUNT} not finite ({seconds:.1f} s)")
                axis.text(0.5, 0.5, "not finite", ha="center", va="center", fontsize=7, transform=axis.transAxes)
            else:
                cells.append(f"{judge.recognised(images, labels):.0%} ({seconds:.1f} s)")
                strip = torch.cat(list(images[:: COUNT // 10, 0]), dim=1).clamp(-1, 1)
                axis.imshow(strip, cmap="gray", vmin=-1, vmax=1)
            axis.set_xticks([])
            axis.set_yticks([])
            if row == 0:
                axis.set_title(f"{steps} steps", fontsize=9)
            if column == 0:
                axis.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
        rows.append(cells)
    save_figure(figure, "solvers.png")
    held_out = f"Real held-out digits: {judge.held_out_recognised():.1%}."
    left = "; ".join(f"`{name}` ({why})" for name, why in LEFT_OUT.items())
    text = table(["solver", *(f"{n} steps" for n in STEPS)], rows)
    replace_part("samplers.md", "solvers", f"{text}\n\n{held_out} Not drawn: {left}.")


if __name__ == "__main__":
    main()
