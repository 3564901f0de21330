"""Networks that answer for whole pictures and for chosen patches: what masked prediction in latent space runs."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ssd.backbones.base import Backbone
from ssd.batch import Scores, Tokens
from ssd.heads import PrototypeHead


@dataclass
class Answers:
    """What a `PatchBranch` answers.

    Args:
        pictures: of all views, features (S, B, d).
        patches: of the patches asked for, features (U, d).
        tokens: name of the view -> what the backbone gave, V * B pictures together.
    """

    pictures: Scores
    patches: Scores
    tokens: dict[str, Tokens]


class PatchHead(nn.Module):
    """One prototype head for pictures and patches, which pass its MLP together.

    Zhou et al. 2022, section 3.2: class token and patches share the head, so that patches take over the meaning which
    whole pictures have got. Batch normalisation counts pictures and patches apart: pictures differ far less from each other
    than from patches, and statistics of both together would leave them nearly one.

    Args:
        head: the MLP, and the prototypes of pictures.
        patch_prototypes: those of patches; None where they are the pictures'.
    """

    def __init__(self, head: PrototypeHead, patch_prototypes: nn.Module | None = None):
        super().__init__()
        self.head = head
        self.patch_last_layer = patch_prototypes
        self.apart = any(isinstance(part, nn.BatchNorm1d) for part in head.modules())

    def forward(self, pooled: Tensor, patches: Tensor) -> tuple[Scores, Scores]:
        """(S, B, D) of pictures and (U, D) of patches -> Scores with features (S, B, d), and with features (U, d)."""
        if self.apart:
            of_pictures, of_patches = self.head(pooled), self.head(patches)
        else:
            scores = self.head(torch.cat([pooled.flatten(0, 1), patches]))
            pictures = len(scores.features) - len(patches)
            of_pictures, of_patches = scores[:pictures].unflatten(0, tuple(pooled.shape[:2])), scores[pictures:]
        if self.patch_last_layer is not None:
            of_patches = Scores(of_patches.features, self.patch_last_layer())
        return of_pictures, of_patches


class PatchBranch(nn.Module):
    """Backbone and heads for pictures and patches as one network, called once a step with all it is to see.

    Args:
        head: for pictures and patches, called with pooled features (S, B, D) and patches (U, D), as `PatchHead`; for
            pictures alone, as `PrototypeHead`, where there is a `patch_head`.
        patch_head: for patches alone (U, D), sharing nothing with the other.
        own_local_norm: gives the class tokens of "local" views a final norm of their own (DINOv3's 7B); evaluation uses the
            backbone's.

    Attributes:
        mask_token: (1, D), from zero; what the student sees at masked patches. A teacher, which masks nothing, is made
            without it. It is no part of the backbone, so that what is exported is what timm knows.
    """

    mask_token: Tensor | None

    def __init__(
        self,
        backbone: Backbone,
        head: nn.Module,
        patch_head: nn.Module | None = None,
        *,
        own_local_norm: bool = False,
    ):
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.patch_head = patch_head
        self.mask_token = nn.Parameter(torch.zeros(1, backbone.embed_dim))
        self.local_norm = copy.deepcopy(backbone.model.norm) if own_local_norm else None

    def forward(
        self,
        views: Mapping[str, Tensor],
        *,
        masked: Mapping[str, Tensor] | None = None,
        places: Mapping[str, Tensor | None],
    ) -> Answers:
        """What the heads answer.

        Args:
            views: name -> (V, B, C, H, W).
            masked: name -> (V, B, N) True at patches whose embedding becomes the mask token.
            places: name -> (U,) the patches that go to the head, counted through (V, B, N); None for all of them.
        """
        seen, pooled, chosen = {}, [], []
        for name, pictures in views.items():
            hidden = None if masked is None or name not in masked else masked[name].flatten(0, 1)
            last = f"block{self.backbone.num_blocks}"
            own_norm = self.local_norm if name == "local" else None
            taps = () if own_norm is None else (last,)
            tokens = self.backbone(pictures.flatten(0, 1), masked=hidden, mask_token=self.mask_token, taps=taps)
            seen[name] = tokens
            vectors = tokens.pooled() if own_norm is None else own_norm(tokens.taps[last][:, 0])
            pooled.append(vectors.unflatten(0, pictures.shape[:2]))
            if name in places:
                rows, where = tokens.patches.flatten(0, 1), places[name]
                chosen.append(rows if where is None else rows.index_select(0, where))
        if self.patch_head is None:
            of_pictures, of_patches = self.head(torch.cat(pooled), torch.cat(chosen))
        else:
            of_pictures, of_patches = self.head(torch.cat(pooled)), self.patch_head(torch.cat(chosen))
        return Answers(of_pictures, of_patches, seen)
