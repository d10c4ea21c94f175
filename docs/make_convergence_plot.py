"""Draws docs/convergence.png: the global error of the deterministic solvers on a Gaussian mixture with its exact score.

python docs/make_convergence_plot.py
"""

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from _pages import save_figure
from tqdm import tqdm

from tests.samplers.convergence import ORDERS, integrate

STEPS = (24, 48, 96, 192, 384)


def main() -> None:
    x = torch.randn(64, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 100.0
    exact = integrate("dpmpp_3m", 4096, x, {"lower_order_final": False})
    figure, axes = plt.subplots(1, 3, figsize=(12, 4), sharey=True, layout="constrained")
    for name, (order, arguments) in tqdm(ORDERS.items(), unit="solver"):
        errors = [float((integrate(name, n, x, arguments) - exact).norm() / exact.norm()) for n in STEPS]
        axes[order - 1].loglog(STEPS, errors, marker="o", markersize=3, label=name)
    for order, axis in enumerate(axes, start=1):
        ends = [STEPS[0], STEPS[-1]]
        guide = [3.0 / ends[0] ** order, 3.0 / ends[1] ** order]
        axis.loglog(
            ends, [g * (8.0 ** (order - 1)) for g in guide], color="0.6", linestyle="--", label=f"order {order}"
        )
        axis.set_title(f"order {order}")
        axis.set_xlabel("steps")
        axis.set_xticks(STEPS, [str(n) for n in STEPS])
        axis.minorticks_off()
        axis.legend(fontsize=7)
    axes[0].set_ylabel("global error, relative")
    save_figure(figure, "convergence.png")


if __name__ == "__main__":
    main()
