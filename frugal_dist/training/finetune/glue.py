"""GLUE: its tasks, their columns and their metrics."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Values = npt.NDArray[Any]


@dataclass(frozen=True)
class Task:
    """A task as the hub's nyu-mll/glue has it: its text columns, what it is measured by, its validation split."""

    columns: tuple[str, ...]
    metrics: tuple[str, ...]
    validation: str = "validation"
    regression: bool = False


TASKS = {
    "cola": Task(("sentence",), ("matthews",)),
    "sst2": Task(("sentence",), ("accuracy",)),
    "mrpc": Task(("sentence1", "sentence2"), ("accuracy", "f1")),
    "stsb": Task(("sentence1", "sentence2"), ("pearson", "spearman"), regression=True),
    "qqp": Task(("question1", "question2"), ("accuracy", "f1")),
    "mnli": Task(("premise", "hypothesis"), ("accuracy",), "validation_matched"),
    "qnli": Task(("question", "sentence"), ("accuracy",)),
    "rte": Task(("sentence1", "sentence2"), ("accuracy",)),
}


# --- metrics ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Metric:
    """``compute(labels, predictions)``; whether it is for numbers instead of classes."""

    compute: Callable[[Values, Values], float]
    regression: bool = False


def _accuracy(labels: Values, predictions: Values) -> float:
    from sklearn.metrics import accuracy_score

    return float(accuracy_score(labels, predictions))


def _f1(labels: Values, predictions: Values) -> float:
    """Of class 1 where there are two classes, as in GLUE; otherwise the mean over the classes."""
    from sklearn.metrics import f1_score

    several = max(labels.max(), predictions.max()) > 1
    return float(f1_score(labels, predictions, average="macro" if several else "binary", zero_division=0.0))


def _matthews(labels: Values, predictions: Values) -> float:
    from sklearn.metrics import matthews_corrcoef

    return float(matthews_corrcoef(labels, predictions))


def _pearson(labels: Values, predictions: Values) -> float:
    from scipy.stats import pearsonr

    return float(pearsonr(labels, predictions).statistic)


def _spearman(labels: Values, predictions: Values) -> float:
    from scipy.stats import spearmanr

    return float(spearmanr(labels, predictions).statistic)


METRICS = {
    "accuracy": Metric(_accuracy),
    "f1": Metric(_f1),
    "matthews": Metric(_matthews),
    "pearson": Metric(_pearson, regression=True),
    "spearman": Metric(_spearman, regression=True),
}


def measure(names: Sequence[str], labels: Values, predictions: Values) -> dict[str, float]:
    """Each metric by name; those that are not defined, such as the correlation with a constant, are 0."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about a constant: it shows
        scores = {name: METRICS[name].compute(labels, predictions) for name in names}
    return {name: value if np.isfinite(value) else 0.0 for name, value in scores.items()}
