"""DISCOVR: a network for clips and one for their frames, each its own teacher's student, and clusters that both must agree on.

Mishra et al., "Self-supervised Learning of Echocardiographic Video Representations via Online Cluster Distillation",
NeurIPS 2025, arXiv 2506.11777.
Departs from the published code: a token of a clip is compared with the patch of its own place and of the first of its frames
(there with another place for all but one), decoded tokens lie in the order of their targets, centres average logits and not
softmaxed ones, the loss of frames is a plain mean over all of them (there the last chunk's, scaled), schedules reach the
optimiser, assignments are soft and both terms of SCD teach the prototypes (`hard_assignments` and `prototypes_from_both` give
the released forms), teachers move behind the optimiser's step. Positions are those of each axis (VideoViT.positions: flat gives
the released ones); crops are any in the range of the published ones.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_modules.base import SelfDistillation
from ssd.backbones.base import Backbone
from ssd.batch import Batch, Scores, Targets, Whole
from ssd.decoders import MaskedDecoder
from ssd.errors import UserError
from ssd.heads import PrototypeHead, UnitPrototypes
from ssd.losses.prototype import cross_view_cross_entropy, token_cross_entropy
from ssd.masked_branch import require_exact, visible_places
from ssd.masking.batch import MaskPlan
from ssd.masking.recipes import Masking, RandomMasks
from ssd.normalisers import standardised_over_patches
from ssd.optim import AdamW, Clip, OptimizerRule
from ssd.schedules import Cosine, Linear, Schedule
from ssd.targets import Centering, sinkhorn_knopp
from ssd.teachers import EMA
from ssd.views.view import Views


@dataclass
class Answers:
    """What networks make of clips and frames; a teacher decodes nothing, a student may be asked for no more than that.

    Args:
        clips: features of heads (M, B, d), with their prototypes.
        frames: the same of F frames of each clip (F, B, d), under M masks (M, F, B, d).
        patches: (F, B, n, D) of whole frames.
        tokens: (B, N, D) decoded for all places of a clip.
        prototypes: (K', D) that both branches share.
    """

    clips: Scores | None = None
    frames: Scores | None = None
    patches: Tensor | None = None
    tokens: Tensor | None = None
    prototypes: Tensor | None = None


class Branches(nn.Module):
    """Network and head for clips, network and head for frames: what a teacher consists of."""

    def __init__(self, backbone: Backbone, head: nn.Module, image_backbone: Backbone, image_head: nn.Module):
        super().__init__()
        self.backbone, self.head = backbone, head
        self.image_backbone, self.image_head = image_backbone, image_head

    def forward(self, clips: Tensor, frames: Tensor, judged: list[int]) -> Answers:
        """Of whole clips (1, B, C, T, H, W) and whole frames (F, B, C, H, W), of which the head sees those at `judged`."""
        of_clips = self.head(self.backbone(clips[0]).pooled()[None])
        tokens = self.image_backbone(frames.flatten(0, 1))
        pooled = chosen(tokens.pooled().unflatten(0, frames.shape[:2]), judged)
        return Answers(of_clips, self.image_head(pooled), patches=tokens.patches.unflatten(0, frames.shape[:2]))


class Students(Branches):
    """The two branches from visible patches alone, the decoder behind the one of clips, and the shared prototypes."""

    def __init__(self, branches: Branches, decoder: MaskedDecoder, num_prototypes: int):
        super().__init__(branches.backbone, branches.head, branches.image_backbone, branches.image_head)
        self.decoder = decoder
        self.clusters = UnitPrototypes(branches.image_backbone.embed_dim, num_prototypes)

    def forward(  # type: ignore[override]
        self, clips: Tensor, visible: Tensor, frames: Tensor | None = None, visible_frames: Tensor | None = None
    ) -> Answers:
        """What is decoded from the first mask, and what the heads say of clips under the others, of frames under all.

        Args:
            clips: (1, B, C, T, H, W).
            visible: (1 + M, B, n) tokens of clips, or (1, B, n).
            frames: (F, B, C, H, W).
            visible_frames: (M, F, B, n) patches of frames.
        """
        masks, batch = visible.shape[:2]
        tokens = self.backbone(clips[0], visible=visible.flatten(0, 1))
        decoded = self.decoder(tokens.patches[:batch], visible[0], tokens.grid)
        answers = Answers(tokens=decoded, prototypes=self.clusters())
        if masks > 1:
            answers.clips = self.head(tokens.pooled().unflatten(0, (masks, batch))[1:])
        if frames is not None and visible_frames is not None:
            seen = self.image_backbone(frames.flatten(0, 1), visible=visible_frames.flatten(0, 2))
            answers.frames = self.image_head(seen.pooled().unflatten(0, visible_frames.shape[:3]))
        return answers


class DISCOVR(SelfDistillation):
    """DISCOVR (Mishra et al. 2025).

    Args:
        backbone: of clips, a VideoViT.
        image_backbone: of frames, a ViT with as large patches.
        views: recipe of clips with one "global" view; the only difference between student and teacher is the mask.
        masks: how tokens are hidden, the same number in each sample; of frames as of a clip of one time.
        num_masks: masks of a clip, and of each frame, from which a student predicts its teacher's head.
        image_frame_step: the loss of frames is over every so many-th one; published is each.
        num_prototypes: of each of the heads.
        num_clusters: prototypes that tokens of clips and patches of frames are assigned to.
        student_temperature: what the students' logits are divided by.
        teacher_temperature: of both teachers.
        cluster_temperature: of predicted assignments.
        sinkhorn_temperature, sinkhorn_iterations: of the assignments that are targets.
        hard_assignments: targets are 1 at the largest assignment, as released.
        prototypes_from_both: false: the frames' term of SCD teaches nothing, as released; it is then only measured.
        video_weight, image_weight, scd_weight: of the three terms.
        momentum: share of the old teachers that is kept.
        center_momentum: share of the old centres that is kept.
        decoder_dim, decoder_depth, decoder_heads: of the decoder's blocks.
        head_hidden_dim, head_bottleneck_dim, head_layers: sizes of the heads' MLPs.
    """

    student: Students
    teacher: EMA

    def __init__(
        self,
        backbone: Backbone,
        image_backbone: Backbone,
        *,
        views: str | Views = "clip_crop",
        masks: Masking = RandomMasks(0.9, tube=True),  # noqa: B008 (frozen)
        num_masks: int = 4,
        image_frame_step: int = 1,
        num_prototypes: int = 16_384,
        num_clusters: int = 3000,
        student_temperature: float = 0.1,
        teacher_temperature: float | Schedule = Linear(0.04, 0.07, until="30 epochs", every="epoch"),  # noqa: B008
        cluster_temperature: float = 0.1,
        sinkhorn_temperature: float = 0.05,
        sinkhorn_iterations: int = 10,
        hard_assignments: bool = False,
        prototypes_from_both: bool = True,
        video_weight: float | Schedule = 1.0,
        image_weight: float | Schedule = 1.0,
        scd_weight: float | Schedule = 1.0,
        momentum: float | Schedule = 0.99,
        center_momentum: float = 0.9,
        decoder_dim: int = 384,
        decoder_depth: int = 4,
        decoder_heads: int = 6,
        head_hidden_dim: int = 2048,
        head_bottleneck_dim: int = 256,
        head_layers: int = 3,
        lr: float | Schedule = Cosine(1.5e-4, 1e-6, warmup=0.1),  # noqa: B008
        optimizer: OptimizerRule = AdamW(betas=(0.9, 0.95)),  # noqa: B008
        weight_decay: float | Schedule = 0.05,
        clip: Clip | None = None,
        freeze_last_layer: float | str = 0.0,
        **engine,
    ):
        super().__init__(
            views=views,
            lr=lr,
            optimizer=optimizer,
            weight_decay=weight_decay,
            clip=clip,
            freeze_last_layer=freeze_last_layer,
            **engine,
        )
        self._check(backbone, image_backbone, masks, num_masks, image_frame_step)
        self.masking = {"global": masks}
        self.masks_per_view = 1 + num_masks  # the first is the decoder's
        self.num_masks = num_masks
        self.student_temperature = student_temperature
        self.teacher_temperature = teacher_temperature
        self.cluster_temperature = cluster_temperature
        self.sinkhorn_temperature = sinkhorn_temperature
        self.sinkhorn_iterations = sinkhorn_iterations
        self.hard_assignments = hard_assignments
        self.prototypes_from_both = prototypes_from_both
        self.video_weight, self.image_weight, self.scd_weight = video_weight, image_weight, scd_weight
        self.momentum = momentum

        frames, *size = self.views.kinds()["global"][0].lengths
        tubelet = frames // backbone.grid(frames, *size)[0]
        self.paired = list(range(0, frames, tubelet))  # the first frame of each tube
        self.judged = list(range(0, frames, image_frame_step))
        self.shown = sorted({*self.paired, *self.judged})

        sizes: dict[str, Any] = {
            "hidden_dim": head_hidden_dim,
            "bottleneck_dim": head_bottleneck_dim,
            "num_layers": head_layers,
        }
        heads = [PrototypeHead(part.embed_dim, num_prototypes, **sizes) for part in (backbone, image_backbone)]
        branches = Branches(backbone, heads[0], image_backbone, heads[1])
        decoder = MaskedDecoder(
            backbone.embed_dim,
            image_backbone.embed_dim,
            dim=decoder_dim,
            depth=decoder_depth,
            num_heads=decoder_heads,
            has_cls=False,
            embed_bias=False,  # as published
        )
        self.teacher = EMA(branches)
        self.student = Students(branches, decoder, num_clusters)
        self.center = Centering(num_prototypes, center_momentum)
        self.image_center = Centering(num_prototypes, center_momentum)

    def mask_plans(self) -> dict[str, MaskPlan]:
        """Also "frames": (num_masks F, B, n) masks of the frames that are judged, all frames under their first mask first."""
        plans = super().mask_plans()
        _, *size = self.views.kinds()["global"][0].lengths
        grid = (1, *self.student.image_backbone.grid(*size))
        masks = (self.masking["global"], len(self.judged), grid)
        return plans | {"frames": MaskPlan(*masks, self.micro_batches, masks_per_view=self.num_masks)}

    def targets(self, batch: Batch) -> Targets:
        clips = batch.views["global"]
        judged, paired = ([self.shown.index(frame) for frame in which] for which in (self.judged, self.paired))
        answers = self.teacher(clips, frames_of(clips, self.shown), judged)
        temperature = self.at("teacher_temperature")
        logits, image_logits = answers.clips.logits(), answers.frames.logits()
        patches = chosen(answers.patches, paired)  # (t, B, n, D)
        features = standardised_over_patches(patches.flatten(0, 1)).unflatten(0, patches.shape[:2])
        of_frames = F.normalize(features, dim=-1).transpose(0, 1).flatten(1, 2)  # (B, t n, D), in the order of tokens

        # of the whole batch, which a slice alone could not be balanced over
        decoded = self.student(clips, visible_places(batch.masks["global"])[:1])
        of_clips = F.normalize(decoded.tokens.float(), dim=-1)
        return Targets(
            logits=logits,  # (1, B, K)
            probs=self.center(logits, temperature),
            image_logits_mean=Whole(image_logits.flatten(0, 1).float().mean(0, keepdim=True)),
            image_probs=self.image_center(image_logits, temperature),  # (F, B, K)
            patches=of_frames[None],  # (1, B, N, D), of unit length
            patch_probs=self.assigned(of_frames, decoded.prototypes)[None],  # (1, B, N, K')
            token_probs=self.assigned(of_clips, decoded.prototypes)[None],
        )

    def assigned(self, features: Tensor, prototypes: Tensor) -> Tensor:
        """Assignments that use all prototypes alike over the tokens of all processes. (B, N, D) -> (B, N, K')"""
        with torch.autocast(features.device.type, enabled=False):
            scores = features.flatten(0, 1) @ prototypes.float().T
            found = sinkhorn_knopp(scores, self.sinkhorn_temperature, self.sinkhorn_iterations)
        if self.hard_assignments:
            found = torch.zeros_like(found).scatter_(1, found.argmax(1, keepdim=True), 1.0)
        return found.unflatten(0, features.shape[:2])

    def losses(self, batch: Batch, targets: Targets) -> dict[str, Tensor]:
        clips = batch.views["global"]
        hidden = visible_places(batch.masks["frames"])
        judged = hidden.unflatten(0, (self.num_masks, -1))  # (M, F, B, n)
        answers = self.student(clips, visible_places(batch.masks["global"]), frames_of(clips, self.judged), judged)
        temperature = self.student_temperature
        video = cross_view_cross_entropy(answers.clips, targets.probs, temperature, skip_same_view=False)  # (B,)
        of_frames = Scores(answers.frames.features.flatten(1, 2), answers.frames.prototypes)
        image = cross_view_cross_entropy(
            of_frames, targets.image_probs.flatten(0, 1)[None], temperature, skip_same_view=False
        )  # (F B,)
        return {
            "video": video.sum() / batch.total,
            "image": image.sum() / (len(self.judged) * batch.total),
            "scd": self.cluster_loss(answers.tokens, answers.prototypes, targets) / batch.total,
        }

    def cluster_loss(self, tokens: Tensor, prototypes: Tensor, targets: Targets) -> Tensor:
        """The sum over samples of both terms of SCD, each the mean over a sample's tokens. Mishra et al. 2025."""

        def term(features: Tensor, taught: Tensor, assigned: Tensor) -> Tensor:
            scores = Scores(features.flatten(0, 1), taught)
            return token_cross_entropy(scores, assigned.flatten(0, 2), self.cluster_temperature).sum()

        of_clips = F.normalize(tokens.float(), dim=-1)
        taught_by_frames = prototypes if self.prototypes_from_both else prototypes.detach()
        total = term(of_clips, prototypes, targets.patch_probs)
        total = total + term(targets.patches[0], taught_by_frames, targets.token_probs)
        return total / of_clips.shape[1]

    def update(self, targets: Targets) -> None:
        self.center.update(targets.logits)
        self.image_center.update(targets.image_logits_mean)
        self.teacher.update(self.student, self.at("momentum"))

    def _check(
        self, backbone: Backbone, image_backbone: Backbone, masks: Masking, num_masks: int, image_frame_step: int
    ) -> None:
        backbone.require("visible", by="DISCOVR")
        image_backbone.require("visible", by="DISCOVR")
        require_exact(masks)
        for name, count in {"num_masks": num_masks, "image_frame_step": image_frame_step}.items():
            if count < 1:
                raise UserError(f"{name}: {count} is not a positive count. The published values are 4 and 1.")
        if backbone.axes != 3 or image_backbone.axes != 2:
            raise UserError(
                f"backbone is {type(backbone).__name__} and image_backbone {type(image_backbone).__name__}, and DISCOVR needs "
                "one for clips and one for pictures. Use VideoViT and ViT."
            )
        views = self.views.kinds().get("global", ())
        lengths = views[0].lengths if views else None
        if len(views) != 1 or lengths is None or len(lengths) != 3:
            raise UserError(
                "views: DISCOVR learns from one 'global' view of a clip, which masks alone make different. Use the recipe "
                "'clip_crop', or ClipViews with global_count: 1."
            )
        if backbone.grid(*lengths)[1:] != image_backbone.grid(*lengths[1:]):
            raise UserError(
                f"backbone has {backbone.grid(*lengths)[1:]} places in a frame and image_backbone "
                f"{image_backbone.grid(*lengths[1:])}, and each is paired with one of the other. Give both as large patches."
            )
        if image_backbone.grid(*lengths[1:]) == (1, 1):
            raise UserError(
                f"views of {lengths[1]} px are one patch, of which nothing can be hidden. Use larger views."
            )


def frames_of(clips: Tensor, which: list[int]) -> Tensor:
    """Some frames of clips (1, B, C, T, H, W). -> (F, B, C, H, W)"""
    return chosen(clips[0].movedim(2, 0), which)


def chosen(rows: Tensor, which: list[int]) -> Tensor:
    """The rows at places that are known before the step, which no device has to be asked for."""
    return rows if which == list(range(len(rows))) else torch.stack([rows[place] for place in which])
