"""Networks that answer for whole pictures and for chosen patches: what masked prediction in latent space runs."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ssd.backbones.base import Backbone
from ssd.batch import Scores
from ssd.heads import PrototypeHead, Prototypes


class PatchHead(nn.Module):
    """One prototype head for pictures and patches, which pass its MLP together.

    Zhou et al. 2022, section 3.2: class token and patches share the head, so that patches take over the meaning which
    whole pictures have got.

    Args:
        head: the MLP, and the prototypes of pictures.
        patch_prototypes: those of patches; None where they are the pictures'.
    """

    def __init__(self, head: PrototypeHead, patch_prototypes: Prototypes | None = None):
        super().__init__()
        self.head = head
        self.patch_last_layer = patch_prototypes

    def forward(self, pooled: Tensor, patches: Tensor) -> tuple[Scores, Scores]:
        """(S, B, D) of pictures and (U, D) of patches -> Scores with features (S, B, d), and with features (U, d)."""
        scores = self.head(torch.cat([pooled.flatten(0, 1), patches]))
        pictures = len(scores.features) - len(patches)
        of_patches = scores[pictures:]
        if self.patch_last_layer is not None:
            of_patches = Scores(of_patches.features, self.patch_last_layer())
        return scores[:pictures].unflatten(0, tuple(pooled.shape[:2])), of_patches


class PatchBranch(nn.Module):
    """Backbone and a head for pictures and patches as one network, called once a step with all it is to see.

    Args:
        head: called with pooled features (S, B, D) and patches (U, D), as `PatchHead`.

    Attributes:
        mask_token: (1, D), from zero; what the student sees at masked patches. A teacher, which masks nothing, is made
            without it. It is no part of the backbone, so that what is exported is what timm knows.
    """

    mask_token: Tensor | None

    def __init__(self, backbone: Backbone, head: nn.Module):
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.mask_token = nn.Parameter(torch.zeros(1, backbone.embed_dim))

    def forward(
        self,
        views: Mapping[str, Tensor],
        *,
        masked: Mapping[str, Tensor] | None = None,
        places: Mapping[str, Tensor | None],
    ) -> tuple[Scores, Scores]:
        """What the head answers.

        Args:
            views: name -> (V, B, C, H, W).
            masked: name -> (V, B, N) True at patches whose embedding becomes the mask token.
            places: name -> (U,) the patches that go to the head, counted through (V, B, N); None for all of them.
        """
        pooled, patches = [], []
        for name, pictures in views.items():
            hidden = None if masked is None or name not in masked else masked[name].flatten(0, 1)
            tokens = self.backbone(pictures.flatten(0, 1), masked=hidden, mask_token=self.mask_token)
            pooled.append(tokens.pooled().unflatten(0, pictures.shape[:2]))
            if name in places:
                rows, chosen = tokens.patches.flatten(0, 1), places[name]
                patches.append(rows if chosen is None else rows.index_select(0, chosen))
        return self.head(torch.cat(pooled), torch.cat(patches))
