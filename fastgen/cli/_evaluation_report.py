"""What `fastgen evaluate` says: everything as one dictionary, for `--json`, and of that the table."""

import argparse
import contextlib
import importlib.metadata
import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import __version__
from .._files import write_atomically
from ..metrics import Accuracy
from ..metrics.features import INCEPTION
from ._evaluation import Gathered, Result

TITLES = {"fid": "FID", "kid": "KID", "precision-recall": "precision", "accuracy": "accuracy"}
SETTINGS = (
    "feature_range",
    "classifier_range",
    "batch_size",
    "kid_subsets",
    "kid_subset_size",
    "kid_seed",
    "neighbours",
    "num",
)
OTHER_FEATURES = "not Inception's: no number here compares with a published one"


def report(args: argparse.Namespace, gathered: Gathered, result: Result, ranks: int) -> dict[str, Any]:
    """All numbers, and all that decided them, ready for JSON."""
    inputs = gathered.inputs
    images = inputs.images
    found: dict[str, Any] = {}
    if result.fid is not None:
        found["fid"] = result.fid
    if result.kid is not None:
        found["kid"] = {"mean": result.kid.mean, "deviation": result.kid.deviation}
    if result.precision_recall is not None:
        found |= {"precision": result.precision_recall.precision, "recall": result.precision_recall.recall}
    for name, accuracy in (("accuracy", result.accuracy), ("reference_accuracy", result.reference_accuracy)):
        if accuracy is not None:
            found[name] = _accuracy(accuracy)
    return {
        "metrics": found,
        "not_computed": result.missing,
        "images": {"name": images.name, "count": inputs.num, "of": len(images), "shape": list(images.shape)},
        "reference": None if args.reference is None else _reference(args, gathered),
        "features": {
            "name": inputs.features.name,
            "text": inputs.features.text,
            "number": len(gathered.images.moments.mean),
            "published": inputs.features.name == INCEPTION,
        },
        "classifier": inputs.classifier and inputs.classifier.name,
        "settings": {name: getattr(args, name) for name in SETTINGS},
        "device": str(args.device),
        "ranks": ranks,
        "threads": torch.get_num_threads(),
        "versions": _versions(),
    }


def table(report: dict[str, Any]) -> str:
    """The report for a person."""
    features, images = report["features"], report["images"]
    part = "" if images["count"] == images["of"] else f", the first of {images['of']:,}"
    rows = [("images", images["name"], f"{images['count']:,} of {'x'.join(map(str, images['shape']))}{part}")]
    if report["reference"] is not None:
        rows.append(("reference", report["reference"]["name"], _said_of_reference(report["reference"])))
    rows.append(("features", features["name"], features["text"]))
    if not features["published"]:
        rows.append(("", "", OTHER_FEATURES))
    rows += [("", "", "")]
    rows += _metric_rows(report)
    rows += [
        (TITLES[metric], "-", f"not computed: {reason}")
        for metric, reason in report["not_computed"].items()
        if reason != "not asked for"
    ]
    first, second = (max(len(row[column]) for row in rows) for column in (0, 1))
    return "\n".join(f"{name:{first}}  {value:{second}}  {text}".rstrip() for name, value, text in rows)


def write(path: Path, report: dict[str, Any]) -> None:
    """The report as a JSON file, whole or not at all."""
    text = json.dumps(report, indent=2) + "\n"
    write_atomically(path, partial(Path.write_text, data=text, encoding="utf-8"), durable=True)


def _metric_rows(report: dict[str, Any]) -> list[tuple[str, str, str]]:
    metrics, settings, rows = report["metrics"], report["settings"], []
    if "fid" in metrics:
        counts = [report["images"]["count"], report["reference"]["statistics_count"]]
        fewest = min(count for count in counts if count is not None)
        few = fewest <= report["features"]["number"]
        note = (
            f"of fewer images ({fewest:,}) than features ({report['features']['number']:,}): far too high"
            if few
            else ""
        )
        rows.append(("FID", f"{metrics['fid']:.6g}", note))
    if "kid" in metrics:
        kid = metrics["kid"]
        drawn = f"{settings['kid_subsets']} times {settings['kid_subset_size']:,} images"
        rows.append(("KID", f"{kid['mean']:.6g}", f"+- {kid['deviation']:.2g} over {drawn}"))
    for name in ("precision", "recall"):
        if name in metrics:
            rows.append((name, f"{metrics[name]:.4f}", f"k = {settings['neighbours']}"))
    if "accuracy" in metrics:
        other = metrics.get("reference_accuracy")
        beside = f"; of the reference {other['share']:.2%}" if other else ""
        rows.append(("accuracy", f"{metrics['accuracy']['share']:.2%}", f"read by {report['classifier']}{beside}"))
    return rows


def _said_of_reference(reference: dict[str, Any]) -> str:
    count = reference["statistics_count"]
    of = "" if count is None else f" of {count:,} images"
    statistics = f"statistics{of}" if reference["statistics"] else ""
    images = "" if reference["count"] is None else f"{reference['count']:,} images"
    return " and ".join(filter(None, (statistics, images)))


def _reference(args: argparse.Namespace, gathered: Gathered) -> dict[str, Any]:
    images, statistics = gathered.inputs.reference, gathered.inputs.statistics
    count = None if images is None else len(images)
    return {
        "name": args.reference,
        "count": count,
        "statistics": statistics is not None,
        "statistics_count": count if statistics is None else statistics.count,
    }


def _accuracy(accuracy: Accuracy) -> dict[str, Any]:
    return {"share": accuracy.share, "right": accuracy.right, "count": accuracy.total}


def _versions() -> dict[str, str]:
    found = {"fastgen": __version__, "torch": torch.__version__, "numpy": np.__version__}
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        found["torch-fidelity"] = importlib.metadata.version("torch-fidelity")
    return found
