# SPDX-License-Identifier: Apache-2.0
"""Accuracy and macro F1 through the `evaluate` library, without a network."""

from __future__ import annotations

from collections.abc import Callable

import datasets
import evaluate
import numpy as np
from example_data import DataError
from sklearn.metrics import accuracy_score, f1_score
from transformers import EvalPrediction


class AccuracyAndF1(evaluate.Metric):
    """Share of right predictions, and the mean of the classes' F1 scores."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Accuracy and macro F1 of a single-label classification.",
            citation="",
            inputs_description="predictions and references: class numbers",
            features=datasets.Features({"predictions": datasets.Value("int32"), "references": datasets.Value("int32")}),
        )

    def _compute(self, predictions: list[int], references: list[int]) -> dict[str, float]:
        return {
            "accuracy": float(accuracy_score(references, predictions)),
            "macro_f1": float(f1_score(references, predictions, average="macro", zero_division=0)),
        }


def build_compute_metrics(
    hub_metric: str | None = None, classes: int = 2
) -> Callable[[EvalPrediction], dict[str, float]]:
    """Build the function that the Trainer calls after each evaluation.

    Args:
        hub_metric: name of one more metric, for `evaluate.load`.
        classes: number of classes, for a trial of that metric.

    Returns:
        A function from logits and labels to named numbers.

    Raises:
        DataError: the metric cannot be loaded, or does not fit.
    """
    metrics = [AccuracyAndF1()]
    if hub_metric is not None:
        try:
            metrics.append(evaluate.load(hub_metric))
        except Exception as error:  # evaluate raises many kinds, offline and online
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise DataError(
                f"--metric {hub_metric!r} cannot be loaded ({reason}): give the name of a metric on a Hub that can "
                "be reached, or the path of a metric script."
            ) from None
        # Tried here, since otherwise the training would end at its first evaluation.
        try:
            values = metrics[1].compute(predictions=range(classes), references=range(classes))
            others = [f"{name} is a {type(value).__name__}" for name, value in values.items() if not np.isscalar(value)]
            reason = ", ".join(others)
        except Exception as error:  # whatever the metric's own code raises
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if reason:
            raise DataError(
                f"--metric {hub_metric!r} does not fit {classes} classes ({reason}): give one that makes numbers from "
                "the classes alone."
            )

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
        classes = np.argmax(logits, axis=-1)
        results: dict[str, float] = {}
        for metric in metrics:
            results.update(metric.compute(predictions=classes, references=prediction.label_ids))
        return results

    return compute_metrics
