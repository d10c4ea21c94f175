"""What a model predicts, and what the clean sample is made of: the conversion of every parameterisation, in one place."""

import math
from dataclasses import dataclass

from ..._schema import PREDICTION_TYPES


@dataclass(frozen=True, kw_only=True)
class Prediction:
    r"""A parameterisation. With :math:`x = \alpha x_0 + \sigma\varepsilon` and :math:`r = \sqrt{\alpha^2 + \sigma^2}`:

    ======================  =============================================================================
    ``"epsilon"``           :math:`x_0 = (x - \sigma g) / \alpha` (Ho et al. 2020)
    ``"sample"``            :math:`x_0 = g`
    ``"v_prediction"``      :math:`x_0 = (\alpha x / r - \sigma g) / r` (Salimans and Ho 2022, appendix D)
    ``"flow_prediction"``   :math:`x_0 = x - \sigma g`, with :math:`\alpha = 1 - \sigma` (Lipman et al. 2023)
    ======================  =============================================================================

    Args:
        prediction_type: one of the above; g is the model's output.
        clip: bound of the predicted clean sample, [-clip, clip]; None does not clip.
        threshold_ratio: quantile of dynamic thresholding (Saharia et al. 2022, section 2.3), in place of ``clip``.
        sample_max_value: largest bound that thresholding may choose.
        sigma_data: with it, x = x0 + sigma eps and the model is preconditioned as in Karras et al. 2022, table 1.
        sigma_min: with ``sigma_data``, where the preconditioning becomes the identity (Song et al. 2023, section 3).
    """

    prediction_type: str = "epsilon"
    clip: float | None = None
    threshold_ratio: float | None = None
    sample_max_value: float = 1.0
    sigma_data: float | None = None
    sigma_min: float = 0.0

    def __post_init__(self) -> None:
        if self.prediction_type not in PREDICTION_TYPES:
            raise ValueError(f"prediction_type must be one of {PREDICTION_TYPES}, got {self.prediction_type!r}")
        if self.clip is not None and not self.clip > 0:
            raise ValueError(f"clip_sample_range must be positive, got {self.clip}")
        if self.threshold_ratio is not None and not 0 <= self.threshold_ratio <= 1:
            raise ValueError(f"dynamic_thresholding_ratio must be in [0, 1], got {self.threshold_ratio}")

    def input_scale(self, alpha: float, sigma: float) -> float:
        """What the x of the formulas is multiplied by before the model sees it."""
        if self.sigma_data is not None:
            return 1 / math.hypot(sigma, self.sigma_data)
        if self.prediction_type == "flow_prediction":
            return 1.0
        r = math.hypot(alpha, sigma)
        return 1.0 if abs(r - 1) < 1e-6 else 1 / r

    def to_sample(self, alpha: float, sigma: float) -> tuple[float, float]:
        """(p, q) with x0 = p x + q g.

        Raises:
            ValueError: epsilon prediction where alpha is 0: the sample is all noise.
        """
        if self.sigma_data is not None:
            return self._preconditioned(sigma, self.sigma_data)
        if self.prediction_type == "epsilon":
            if alpha == 0:
                raise ValueError("epsilon prediction at alpha_bar = 0 says nothing about the sample: use v_prediction")
            return 1 / alpha, -sigma / alpha
        if self.prediction_type == "sample":
            return 0.0, 1.0
        if self.prediction_type == "flow_prediction":
            return 1.0, -sigma
        r = math.hypot(alpha, sigma)
        return alpha / r**2, -sigma / r

    def _preconditioned(self, sigma: float, sigma_data: float) -> tuple[float, float]:
        total = math.hypot(sigma, sigma_data)
        above = sigma - self.sigma_min
        c_skip, c_out = sigma_data**2 / (above**2 + sigma_data**2), above * sigma_data / total
        if self.prediction_type == "epsilon":
            return c_skip, c_out
        if self.prediction_type == "v_prediction":
            return c_skip, -c_out
        raise ValueError(f"a preconditioned model predicts epsilon or v_prediction, not {self.prediction_type}")
