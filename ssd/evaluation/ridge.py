"""Ridge classification in closed form: the cheap linear monitor during training."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ssd.errors import UserError
from ssd.evaluation.heads import Fit
from ssd.evaluation.protocol import check_finite, check_labels, count_classes
from ssd.evaluation.scaling import principal_axes, standardise

PENALTIES = (1.0, 1e1, 1e2, 1e3, 1e4)


def ridge_predict(
    train: Tensor, labels: Tensor, test: Tensor, num_classes: int | None = None, l2: Sequence[float] = PENALTIES
) -> Fit:
    """Classes of the test features by least squares on one-hot labels, from standardised training features.

    (N, D), (N,) and (Q, D). `l2` multiplies the squared length of the weights, beside the sum of the squared
    errors. One eigendecomposition serves all values; the best is chosen by the accuracy of leaving each
    training sample out, which the same decomposition gives (Hastie, Tibshirani and Friedman, "The Elements of
    Statistical Learning", eq. 7.64). Ties go to the larger penalty.
    """
    check_labels("the ridge probe", train=labels)
    check_finite(train=train, test=test)
    if min(l2, default=0) <= 0:
        raise UserError(f"penalties l2 = {list(l2)} of the ridge probe: give at least one, all above 0.")
    num_classes = num_classes or count_classes(labels)
    train, test = standardise(train, test)
    basis, power = principal_axes(train)
    train, test = train @ basis, test @ basis  # (N, R), (Q, R)
    values = torch.tensor(sorted(l2, reverse=True)).to(train)
    targets = F.one_hot(labels, num_classes).to(train)
    mean = targets.mean(0)
    shrink = 1 / (len(train) * power[:, None] + values)  # (R, P)
    weight = shrink[:, :, None] * (train.T @ (targets - mean))[:, None]  # (R, P, C)
    fitted = (train @ weight.flatten(1)).unflatten(1, weight.shape[1:]) + mean  # (N, P, C)
    leverage = 1 / len(train) + train.square() @ shrink  # (N, P)
    error = (targets[:, None] - fitted) / (1 - leverage).clamp_min(1e-6)[:, :, None]
    correct = ((targets[:, None] - error).argmax(2) == labels[:, None]).sum(0)
    best = int(correct.argmax())
    return Fit((test @ weight[:, best] + mean).argmax(1), float(values[best]))
