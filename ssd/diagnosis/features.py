"""Whether regressed features still differ from token to token: what a logged step tells of methods that regress them."""

from collections.abc import Mapping

from torch import Tensor

KEYS = {"target": "train/teacher/target_std", "prediction": "train/student/prediction_std"}
"""Whose deviation it is -> under which key it is logged; as a measure of a step it is "target_std" and "prediction_std"."""


def deviation(features: Tensor) -> Tensor:
    """Standard deviation over all tokens of (..., D), mean over D; 0 where every token is the same. ()"""
    return features.detach().float().flatten(0, -2).std(0).mean()


def deviations_of(measures: Mapping[str, float]) -> dict[str, float]:
    """Of a step's measures: "target" and "prediction", where there are such."""
    return {what: measures[f"{what}_std"] for what in KEYS if f"{what}_std" in measures}


def deviation_logs(measures: Mapping[str, float]) -> dict[str, float]:
    """The same under the keys they are logged by."""
    return {KEYS[what]: value for what, value in deviations_of(measures).items()}


def logged_deviations(row: Mapping[str, float]) -> dict[str, float]:
    """The same from a row of a log."""
    return {what: row[key] for what, key in KEYS.items() if key in row}
