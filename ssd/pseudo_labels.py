"""Labels that are clusters of a frozen network's features, found once, before a run begins."""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ssd.data.clusters import kmeans
from ssd.distributed import from_first_rank, object_from_first_rank, rank
from ssd.errors import UserError

SMALLEST_SHARE = 1e-10
"""Of the largest variance, and of a hundredth of the largest feature squared: components with less are rounding alone."""


class PseudoLabels(nn.Module):
    """Which cluster each training sample belongs to, with the clustering that says so.

    Features are centred and whitened to their main components (PCA, Jégou and Chum 2012), brought to unit length and
    clustered by k-means, as in DeepCluster (Caron et al. 2018, arXiv 1807.05520). Clusters without a sample are left out and
    the others numbered anew. One process clusters and tells the others.

    Args:
        num_clusters: K; fewer come out where some have no sample.
        whitened_dim: components that are kept; at most as many as there are.
        iterations: of k-means.
        seed: of k-means.

    Attributes:
        labels: (N,) of each training sample, -1 for one that could not be read.
        centres: (K', d) of unit-length features, d components.
        mean: (D,) and `components` (D, d): (features - mean) components is whitened.
        fingerprint: of the data they are of; "" until there are labels.
    """

    labels: Tensor
    centres: Tensor
    mean: Tensor
    components: Tensor
    MEMORY = ("labels", "centres", "mean", "components")

    def __init__(self, num_clusters: int, whitened_dim: int = 128, iterations: int = 20, seed: int = 0):
        super().__init__()
        counts = {"num_clusters": (num_clusters, 2), "whitened_dim": (whitened_dim, 1), "iterations": (iterations, 1)}
        for name, (count, least) in counts.items():
            if count < least:
                raise UserError(f"{name}: {count} is too few. Use {least} or more.")
        self.num_clusters = num_clusters
        self.whitened_dim = whitened_dim
        self.iterations = iterations
        self.seed = seed
        self.fingerprint = ""
        # their sizes follow from the data, so they travel as extra state
        self.register_buffer("labels", torch.zeros(0, dtype=torch.long), persistent=False)
        for name in self.MEMORY[1:]:
            self.register_buffer(name, torch.zeros(0), persistent=False)

    def forward(self, index: Tensor) -> Tensor:
        """Labels (B,) of the training samples `index` (B,); -1 for what is none of them."""
        if not len(self.labels):
            raise UserError("there are no pseudo-labels yet. They are found where a run begins: ssd fit, or `survey`.")
        known = index < len(self.labels)
        return torch.where(known, self.labels[torch.where(known, index, 0)], -1)

    @property
    def num_present(self) -> int:
        """K', clusters with a sample."""
        return len(self.centres)

    @torch.no_grad()
    def settle(self, features: Tensor, index: Tensor, samples: int, fingerprint: str) -> None:
        """Clusters features (n, D) of the samples `index` (n,) of `samples` in all; the same on every process.

        Raises UserError for fewer samples than clusters, and for features that are not finite or all alike.
        """
        if len(features) < self.num_clusters:
            raise UserError(
                f"num_clusters: {self.num_clusters} are more than the {len(features)} training samples that can be read. Use "
                "fewer, at most a tenth of them."
            )
        if not features.isfinite().all():
            raise UserError(
                "the labeller's features are not finite. Look at its weights, and at the data (ssd check-data)."
            )
        found = clustered(features, self) if rank() == 0 else None
        found = object_from_first_rank(found)
        if len(found["centres"]) < 2:
            raise UserError(
                "the labeller answers the same to every sample, so that there is nothing to tell apart. Use other weights."
            )
        labels = torch.full((samples,), -1)
        labels[index.cpu()] = torch.from_numpy(found.pop("labels")).long()
        self._remember({"labels": labels, **{name: torch.from_numpy(value) for name, value in found.items()}})
        self.fingerprint = fingerprint

    @torch.no_grad()
    def nearest(self, features: Tensor) -> Tensor:
        """The cluster that features (n, D) of any sample fall into. (n,)"""
        whitened = (features.to(self.mean) - self.mean) @ self.components
        return torch.cdist(nn.functional.normalize(whitened, dim=1), self.centres).argmin(1)

    def sizes(self) -> Tensor:
        """Samples of each cluster, (K',)."""
        return torch.bincount(self.labels[self.labels >= 0], minlength=self.num_present)

    def _remember(self, memory: dict[str, Tensor]) -> None:
        for name in self.MEMORY:
            setattr(self, name, memory[name].to(self.labels.device, copy=True))

    def get_extra_state(self) -> dict[str, Any]:
        return {"fingerprint": self.fingerprint, **{name: getattr(self, name).cpu() for name in self.MEMORY}}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.fingerprint = str(state["fingerprint"])
        self._remember(state)


def clustered(features: Tensor, settings: PseudoLabels) -> dict[str, np.ndarray]:
    """Labels (n,) and what `PseudoLabels` keeps beside them, of features (n, D)."""
    exact = features.double().cpu()
    mean, components = whitening(exact, settings.whitened_dim)
    points = nn.functional.normalize((exact - mean) @ components, dim=1).float().numpy()
    labels, centres = kmeans(points, settings.num_clusters, settings.seed, settings.iterations)
    clustering = {"mean": mean.float().numpy(), "components": components.float().numpy()}
    return {"labels": labels, "centres": centres.astype(np.float32), **clustering}


def whitening(features: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Mean (D,) and components (D, d) of features (n, D): (features - mean) components has variance 1 along each of d axes,
    uncorrelated, the main ones first. d is `dim`, or as many as the features vary along; one of zeros where they are all alike.
    """
    mean = features.mean(0)
    centred = features - mean
    variances, axes = torch.linalg.eigh(centred.mT @ centred / max(len(features) - 1, 1))
    variances, axes = variances.flip(0), axes.flip(1)
    least = SMALLEST_SHARE * torch.maximum(variances[0], features.abs().max().square() / 100)
    count = min(dim, int((variances > least).sum()))
    if count == 0:
        return mean, torch.zeros_like(axes[:, :1])
    return mean, axes[:, :count] / variances[:count].sqrt()


def same_on_all_ranks(network: nn.Module) -> None:
    """Gives every process the weights that the first one has of a network, in place."""
    with torch.no_grad():
        for value in network.state_dict().values():
            value.copy_(from_first_rank(value))
