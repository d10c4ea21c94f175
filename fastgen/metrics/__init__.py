"""How good drawn images are: FID, KID, precision and recall, class accuracy; `fastgen evaluate` is all of it from the shell."""

from .._ranks import RankError
from ._exchange import agreed
from .accuracy import Accuracy, class_accuracy
from .features import (
    DigitFeatures,
    FeatureError,
    FileNetwork,
    InceptionFeatures,
    Network,
    load_classifier,
    load_features,
)
from .frechet import frechet_distance
from .kernel_distance import KernelDistance, kernel_distance
from .measuring import Measured, measure
from .precision_recall import PrecisionRecall, precision_recall
from .statistics import Gaussian, Moments, StatisticsError, holds_statistics

__all__ = [
    "Accuracy",
    "DigitFeatures",
    "FeatureError",
    "FileNetwork",
    "Gaussian",
    "InceptionFeatures",
    "KernelDistance",
    "Measured",
    "Moments",
    "Network",
    "PrecisionRecall",
    "RankError",
    "StatisticsError",
    "agreed",
    "class_accuracy",
    "frechet_distance",
    "holds_statistics",
    "kernel_distance",
    "load_classifier",
    "load_features",
    "measure",
    "precision_recall",
]
