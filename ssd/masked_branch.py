"""An encoder of visible patches with a decoder or predictor behind it: what masked regression and prediction train."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from ssd.backbones.base import Backbone
from ssd.backbones.video import VideoViT
from ssd.batch import Masks, Scores, Tokens
from ssd.decoders import ConvDecoder, MaskedDecoder
from ssd.errors import UserError
from ssd.masking.recipes import Masking
from ssd.normalisers import patchified, standardised, unpatchified


@dataclass
class Decoded:
    """What a `MaskedBranch` answers for M masks of each of B samples, whatever their number of views.

    Args:
        patches: (M, B, N, out_dim) predictions for all places.
        cls: (M, B, out_dim) prediction of the class token, None where the decoder has none.
        tokens: of the encoder, M * B samples of n visible patches.
        projected: name of a tap -> (M, B, prefix + n, width) what its projector makes of it.
    """

    patches: Tensor
    cls: Tensor | None
    tokens: Tokens
    projected: dict[str, Tensor] = field(default_factory=dict)


class MaskedBranch(nn.Module):
    """Backbone and decoder as one network, called once a step with all it is to see.

    Args:
        backbone: one that can encode `visible` patches alone.
        decoder: what predicts for every place.
        projectors: name of a tap of the backbone, such as "block9" -> what brings it to a teacher's width.
    """

    encodes_visible: ClassVar[bool] = True
    """Whether visible patches are all that is encoded in a step."""

    def __init__(
        self,
        backbone: Backbone,
        decoder: MaskedDecoder | ConvDecoder,
        projectors: Mapping[str, nn.Module] | None = None,
    ):
        super().__init__()
        self.backbone = backbone
        self.decoder = decoder
        self.projectors = nn.ModuleDict(projectors or {})

    def forward(self, pictures: Tensor, visible: Tensor) -> Decoded:
        """What is predicted from visible patches.

        Args:
            pictures: (V, B, C, H, W).
            visible: (M, B, n) sorted places; M is V, or a multiple of it: all views under their first mask, then under their
                second. Each picture is embedded once.
        """
        masks, batch = visible.shape[:2]
        places = visible.flatten(0, 1)
        tokens = self.backbone(pictures.flatten(0, 1), visible=places, taps=tuple(self.projectors))
        if isinstance(self.decoder, ConvDecoder):
            decoded, cls = self.decoder(tokens.patches, places, tokens.grid), None
        else:
            decoded = self.decoder(tokens.patches, places, tokens.grid, tokens.cls)
            cls = decoded[:, 0] if self.decoder.has_cls else None
            decoded = decoded[:, 1:] if self.decoder.has_cls else decoded
        cls = None if cls is None else cls.unflatten(0, (masks, batch))
        projected = {
            tap: projector(tokens.taps[tap]).unflatten(0, (masks, batch)) for tap, projector in self.projectors.items()
        }
        return Decoded(decoded.unflatten(0, (masks, batch)), cls, tokens, projected)


class PredictingBranch(nn.Module):
    """A backbone that can "predict", and a head over what it predicts, as one network."""

    encodes_visible: ClassVar[bool] = True
    predicts_patches: ClassVar[bool] = True
    """Whether patches alone are what it is taught."""

    def __init__(self, backbone: Backbone, head: nn.Module):
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(self, pictures: Tensor, visible: Tensor, predicted: Tensor) -> Scores:
        """Pictures (V, B, C, H, W), of which patches (V, B, n) are seen -> the head's answer for the places (V, B, P)."""
        seen, asked = visible.flatten(0, 1), predicted.flatten(0, 1)
        tokens = self.backbone(pictures.flatten(0, 1), visible=seen)
        answers = self.backbone.predict(tokens, visible=seen, predicted=asked)
        return self.head(answers.unflatten(0, predicted.shape[:2]))


class WholePatches(nn.Module):
    """A backbone that is asked for the patches of whole pictures."""

    def __init__(self, backbone: Backbone):
        super().__init__()
        self.backbone = backbone

    def forward(self, pictures: Tensor) -> Tensor:
        """(V, B, C, H, W) -> (V, B, N, D)"""
        return self.backbone(pictures.flatten(0, 1)).patches.unflatten(0, pictures.shape[:2])


def visible_places(masks: Masks) -> Tensor:
    """(M, B, n) places that the student sees. Raises UserError for masks that hide another number in each sample."""
    if masks.visible is None:
        raise UserError(
            "masks: this recipe hides another number of patches in each sample, and visible patches alone are encoded as one "
            "table. Use RandomMasks, InverseSquareMasks or another recipe with a fixed count."
        )
    return masks.visible


def has_cls(backbone: Backbone) -> bool:
    """Whether the backbone answers a class token."""
    return getattr(backbone.model, "cls_token", None) is not None


def require_exact(masks: Masking, nothing_hidden: bool = False) -> None:
    """Raises UserError for masks that hide another number in each sample, and for ones that hide nothing unless that is
    allowed."""
    if not masks.exact:
        raise UserError(f"masks: {type(masks).__name__} hides another number in each sample. Use RandomMasks.")
    if getattr(masks, "ratio", None) == 0 and getattr(masks, "keep", None) is None and not nothing_hidden:
        raise UserError("masks: a ratio of 0 hides nothing, so that nothing is left to predict. Use a share above 0.")


def square_patch(backbone: Backbone) -> int:
    """Side of the patches, px. Raises UserError where they are not square."""
    if not isinstance(backbone.patch_size, int):
        raise UserError(f"patches of {backbone.patch_size} px are not square, which pixels are cut into.")
    return backbone.patch_size


def patch_of(backbone: Backbone) -> tuple[int, ...]:
    """Lengths of a patch along each axis: (rows, columns), of clips (frames, rows, columns)."""
    if isinstance(backbone, VideoViT):
        return backbone.patch
    side = square_patch(backbone)
    return side, side


def pixel_targets(pictures: Tensor, patch: int | Sequence[int], normalize: bool) -> Tensor:
    """Pixels of each patch, each patch at mean 0 and variance 1 with `normalize`. (V, B, C, H, W) -> (V, B, N, p p C), of
    clips (V, B, C, T, H, W) -> (V, B, N, t p p C)."""
    pixels = patchified(pictures.flatten(0, 1).float(), patch)
    return (standardised(pixels) if normalize else pixels).unflatten(0, pictures.shape[:2])


def painted(network: MaskedBranch, pictures: Tensor, masks: Masks, normalized: bool) -> Tensor:
    """Pictures (B, C, H, W) with what a network that predicts pixels paints in the hidden patches of (1, B, N) masks.

    `normalized` predictions are at mean 0 and variance 1, and get the mean and the deviation of the patch that they stand for.
    """
    patch = square_patch(network.backbone)
    decoded = MaskedBranch.forward(network, pictures[None], visible_places(masks)).patches[0].float()
    true = patchified(pictures.float(), patch)
    if normalized:
        deviation, mean = torch.std_mean(true, dim=-1, keepdim=True)
        decoded = decoded * deviation + mean
    whole = torch.where(masks.boolean[0, ..., None], decoded, true)
    rows, columns = network.backbone.grid(*pictures.shape[2:])
    return unpatchified(whole, (rows, columns), patch)


def mean_over_hidden(error: Tensor, masks: Masks, total: int) -> Tensor:
    """Of (M, B, N) the sum over hidden places, divided by their number in the whole step of `total` samples; 0 where nothing
    is hidden."""
    hidden = masks.boolean.sum(-1)[0, 0].clamp_min(1)  # the same in all
    return torch.where(masks.boolean, error, 0).sum() / (len(masks.boolean) * hidden * total)
