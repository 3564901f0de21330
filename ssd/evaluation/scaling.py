"""Features on a common footing before a linear probe: standardised, and turned into their principal axes."""

import torch
from torch import Tensor


def standardise(train: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """Every dimension with mean 0 and deviation 1 over the training set; `others` get the same change. float32.

    (N, D) -> (N, D). A dimension that is constant up to rounding becomes 0. Labels are not needed, so the
    whole training set counts even where few of its samples are labelled.
    """
    train = train.float()
    deviation, mean = torch.std_mean(train, dim=0, correction=0)
    constant = deviation <= 1e-6 * (mean.abs() + deviation.max())
    factor = torch.where(constant, 0.0, 1 / deviation)
    return tuple((part.float() - mean) * factor for part in (train, *others))


def principal_axes(features: Tensor) -> tuple[Tensor, Tensor]:
    """The directions that the features vary in, and the mean square along each, the strongest last.

    (..., N, D) -> orthonormal (..., D, R) and (..., R), with R = min(N, D); where there are fewer directions than
    R, the rest are 0. A linear probe whose penalty is on the length of its weights has the same solution
    in these axes, where its curvature is nearly diagonal.
    """
    number, width = features.shape[-2:]
    if width <= number:
        power, basis = torch.linalg.eigh(features.mT @ features / number)
        return basis, power.clamp_min(0)
    exact = features.double()
    power, left = torch.linalg.eigh(exact @ exact.mT / number)
    power = torch.where(power > 1e-10 * power[..., -1:], power, 0.0)
    length = torch.where(power > 0, (number * power).rsqrt(), 0.0)
    return (exact.mT @ left * length[..., None, :]).to(features.dtype), power.to(features.dtype)
