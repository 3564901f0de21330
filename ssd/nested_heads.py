"""Prototype heads on nested widths of the features: coarse clusters on few dimensions, fine ones on all."""

from typing import Any

import torch
from torch import Tensor, nn

from ssd.batch import Scores
from ssd.errors import UserError
from ssd.heads import PrototypeHead, make_prototypes


class NestedHead(nn.Module):
    """One prototype head for each of the first D / 2^(L-1), ..., D / 2, D dimensions, with prototypes in proportion.

    Venkataramanan et al. 2025, arXiv 2507.14137, section 3.

    Args:
        in_dim: D.
        num_prototypes: K of the widest level; a level of width m has int(K m / D).
        levels: L; 1 is a plain head.
        projected: each level sees a learned projection of all D dimensions instead of the first m, and its prototypes meet
            features of any length: the released code.
        sizes: of each level's head, as of `PrototypeHead`.
    """

    def __init__(self, in_dim: int, num_prototypes: int, levels: int, projected: bool = False, **sizes: Any):
        super().__init__()
        if levels < 1 or in_dim % 2 ** (levels - 1):
            raise UserError(f"levels: {levels} does not halve {in_dim} dimensions so often. Use 1 or more, at most 5.")
        self.widths = [in_dim // 2**level for level in reversed(range(levels))]
        self.projected = projected
        self.heads = nn.ModuleList()
        for width in self.widths:
            prototypes = int(num_prototypes * width / in_dim)
            projection = ProjectedHead(in_dim, width, prototypes, **sizes) if projected else None
            self.heads.append(projection or PrototypeHead(width, prototypes, **sizes))

    def forward(self, features: Tensor) -> list[Scores]:
        """(..., D) -> of each level, narrowest first, Scores with features (..., d)."""
        seen = [features if self.projected else features[..., :width] for width in self.widths]
        return [head(part) for head, part in zip(self.heads, seen, strict=True)]


class ProjectedHead(nn.Module):
    """A level as Franca's released code has it: a projection, an MLP with a GELU behind its bottleneck too, and prototypes
    that meet what comes out as it is.

    Args:
        in_dim, width: of the projection.
        sizes: see `PrototypeHead`.
    """

    def __init__(
        self,
        in_dim: int,
        width: int,
        num_prototypes: int,
        *,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        num_layers: int = 3,
        batch_norm: bool = False,
        train_gain: bool = False,
        renormalize: bool = False,
    ):
        super().__init__()
        widths = [width] + [hidden_dim] * (num_layers - 1) + [bottleneck_dim]
        layers: list[nn.Module] = [nn.Linear(in_dim, width)]
        for number, (width_in, width_out) in enumerate(zip(widths, widths[1:], strict=False), 1):
            normalised = batch_norm and number < num_layers
            layers += [nn.Linear(width_in, width_out), *([nn.BatchNorm1d(width_out)] if normalised else []), nn.GELU()]
        for layer in layers:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        self.mlp = nn.Sequential(*layers)
        self.last_layer = make_prototypes(
            bottleneck_dim, num_prototypes, train_gain=train_gain, renormalize=renormalize
        )

    def forward(self, features: Tensor) -> Scores:
        """(..., D) -> Scores with features (..., d)."""
        bottleneck = self.mlp(features)
        return Scores(bottleneck.to(torch.promote_types(bottleneck.dtype, torch.float32)), self.last_layer())
