"""Targets from inner layers of an average of the student that sees whole samples: what the versions of data2vec share."""

from collections.abc import Sequence

from torch import Tensor, nn

from ssd.backbones.base import Backbone
from ssd.batch import Tokens
from ssd.errors import UserError
from ssd.teachers import Teacher


class Encoder(nn.Module):
    """The backbone of a branch, as the network that its average is of: what sees whole samples has no use for the rest."""

    def __init__(self, backbone: Backbone):
        super().__init__()
        self.backbone = backbone

    def forward(self, pictures: Tensor, taps: Sequence[int | str] = ()) -> Tokens:
        """(B, C, H, W) -> tokens, with the intermediate outputs that are asked for."""
        return self.backbone(pictures, taps=taps)


def patch_layers(teacher: Teacher, pictures: Tensor, taps: Sequence[str]) -> list[Tensor]:
    """What a teacher over an `Encoder` makes of whole pictures (B, C, H, W) at its taps, of patches alone: (B, N, D) each."""
    prefix = getattr(teacher.network.backbone, "num_prefix", 0)
    tapped = teacher(pictures, taps=taps).taps
    return [tapped[tap][:, prefix:] for tap in taps]


def last_blocks(backbone: Backbone, count: int) -> list[int]:
    """Numbers of the last `count` blocks. Raises UserError where there are not so many."""
    if not 1 <= count <= backbone.num_blocks:
        raise UserError(
            f"top_blocks: {count} of {backbone.num_blocks} blocks cannot be. Use 1 to {backbone.num_blocks}."
        )
    return list(range(backbone.num_blocks - count + 1, backbone.num_blocks + 1))


SHARED = {"patches": "backbone.model.patch_embed.", "positions": "backbone.model.pos_embed"}
"""What a teacher may have from its student as it is -> how the names of it begin."""


def shared_names(shared: Sequence[str] | None) -> list[str]:
    """Beginnings of parameters' names. Raises UserError for what is not in `SHARED`."""
    unknown = [name for name in shared or () if name not in SHARED]
    if unknown:
        raise UserError(f"teacher_shares: '{unknown[0]}' is unknown. Choose of {', '.join(SHARED)}, or [] for nothing.")
    return [SHARED[name] for name in shared or ()]
