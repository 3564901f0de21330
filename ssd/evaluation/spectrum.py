"""What the singular values of features say of collapse, without labels."""

import torch
from torch import Tensor

from ssd.errors import UserError


def singular_values(features: Tensor) -> Tensor:
    """Singular values of (N, D) in float64, the largest first; those of rounding alone are 0. (min(N, D),)"""
    exact = features.double()
    gram = exact @ exact.T if len(exact) < exact.shape[1] else exact.T @ exact
    return torch.linalg.eigvalsh(gram).flip(0).clamp_min(0).sqrt()


def effective_rank(shares: Tensor, epsilon: float = 1e-7) -> float:
    """Exponential of the entropy of non-negative numbers brought to sum 1; 0 where all are 0, NaN where one is."""
    total = shares.sum()
    if total == 0:
        return 0.0
    probs = shares / total + epsilon
    return float((-(probs * probs.log()).sum()).exp())


def rankme(features: Tensor) -> float:
    """Effective rank of (N, D) features, between 1 and min(N, D). NaN where a feature is not finite.

    Garrido et al., "RankMe: Assessing the Downstream Performance of Pretrained Self-Supervised
    Representations by Their Rank", ICML 2023, eqs. 1-2. The features are not centred: a constant has rank 1.
    """
    if not features.isfinite().all():
        return float("nan")
    return effective_rank(singular_values(features))


def alpha_req(features: Tensor, first: int = 1, last: int | None = None) -> float:
    """Exponent a of the decay  eigenvalue_i ~ i^-a  of the features' covariance; flat is 0, steep is large.

    Agrawal et al., "alpha-ReQ: Assessing Representation Quality in Self-Supervised Learning by Measuring
    Eigenspectrum Decay", NeurIPS 2022. A straight line through log eigenvalue over log i from `first` to
    `last` (all that are above rounding), each place weighted by 1 / i so that every octave counts alike. NaN where
    a feature is not finite or fewer than two eigenvalues remain.
    """
    if first < 1 or (last is not None and last <= first):
        raise UserError(f"alpha-ReQ over eigenvalues {first} to {last}: give 1 <= first < last.")
    if not features.isfinite().all():
        return float("nan")
    exact = features.double()
    eigenvalues = singular_values(exact - exact.mean(0)).square()
    eigenvalues = eigenvalues[eigenvalues > 1e-10 * eigenvalues[0]][first - 1 : last]
    if len(eigenvalues) < 2:
        return float("nan")
    place = torch.arange(first, first + len(eigenvalues)).to(eigenvalues)
    weight = 1 / place / (1 / place).sum()
    x, y = place.log(), eigenvalues.log()
    x, y = x - (weight * x).sum(), y - (weight * y).sum()
    return float(-(weight * x * y).sum() / (weight * x * x).sum())


def lidar(views: Tensor, delta: float = 1e-4) -> float:
    """Effective rank of what tells samples apart, measured against what views of one sample change.

    (B, V, D): V views of each of B samples. Thilak et al., "LiDAR: Sensing Linear Probing Performance in Joint
    Embedding SSL Architectures", ICLR 2024; `delta` is added to the scatter inside samples. NaN
    where a feature is not finite.
    """
    if views.dim() != 3 or views.shape[1] < 2 or len(views) < 2:
        raise UserError(f"LiDAR needs at least 2 samples with 2 views each as (B, V, D), not {tuple(views.shape)}.")
    if not views.isfinite().all():
        return float("nan")
    exact = views.double()
    means = exact.mean(1)  # (B, D)
    between = (means - means.mean(0)).T @ (means - means.mean(0)) / len(means)
    inside = (exact - means[:, None]).flatten(0, 1)
    within = inside.T @ inside / len(inside)
    within.diagonal().add_(delta)
    half = torch.linalg.cholesky(within)
    whitened = torch.linalg.solve_triangular(half, between, upper=False)
    # the eigenvalues are those of within^(-1/2) between within^(-1/2)
    whitened = torch.linalg.solve_triangular(half, whitened.T, upper=False)
    return effective_rank(torch.linalg.eigvalsh((whitened + whitened.T) / 2).clamp_min(0))
