"""Hybrid distillation: a student relates its tokens as a masked autoencoder does half-way, and ends with the features of a
contrastive or supervised network, while it drops tokens that repeat others.

Shi et al., "Hybrid Distillation: Connecting Masked Autoencoders with Contrastive Learners", ICLR 2024, arXiv 2306.15876.
No code was published. From the paper: two frozen teachers, relations of tokens in between, features at the end, both weights 1,
tokens dropped on the way. What it leaves open was chosen here and is a setting: which blocks relate, which relation and
divergence, how tokens are chosen, the projection and its distance.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_modules.base import SelfDistillation
from ssd.backbones.base import Backbone
from ssd.batch import Batch, Targets, Tokens
from ssd.decoders import Projector
from ssd.errors import UserError
from ssd.losses.regression import smooth_error, squared_error
from ssd.masked_branch import has_cls
from ssd.masking.counts import floor
from ssd.normalisers import layer_normed
from ssd.optim import AdamW, Clip, OptimizerRule
from ssd.relations import KINDS, compared, relation_divergence, relation_logits
from ssd.schedules import Cosine, Schedule
from ssd.teachers import Frozen, Preprocessed
from ssd.views.view import Views

DISTANCES = {"smooth_l1": smooth_error, "l2": squared_error}


class DroppingStudent(nn.Module):
    """A backbone that drops repeated patches on its way, with what brings its last tokens to a teacher's width.

    Args:
        projector: None where there are no features to match.
        with_cls: whether the class token's feature is matched too.
        relation_blocks: whose queries, keys and values are wanted.
        drop_ratio: share of the patches that goes at each place.
        drop_behind: the places: numbers of blocks, 0 for what enters the first.
    """

    def __init__(
        self,
        backbone: Backbone,
        projector: nn.Module | None,
        *,
        with_cls: bool,
        relation_blocks: Sequence[int],
        drop_ratio: float,
        drop_behind: Sequence[int],
    ):
        super().__init__()
        self.backbone = backbone
        self.projector = projector
        self.with_cls = with_cls
        self.taps = tuple(f"block{block}.qkv" for block in relation_blocks)
        self.drop_ratio = drop_ratio
        self.drop_behind = tuple(drop_behind)

    def forward(self, pictures: Tensor) -> tuple[Tokens, Tensor | None]:
        """Tokens of pictures (V, B, C, H, W) in V B rows, and what the projector makes of the last ones, (V B, n, Dt)."""
        counts = kept_counts(
            math.prod(self.backbone.grid(*pictures.shape[-2:])), self.drop_ratio, len(self.drop_behind)
        )
        keep = dict(zip(self.drop_behind, counts, strict=True)) if self.drop_ratio > 0 else None
        tokens = self.backbone(pictures.flatten(0, 1), taps=self.taps, keep=keep)
        if self.projector is None:
            return tokens, None
        last = torch.cat([tokens.cls[:, None], tokens.patches], dim=1) if self.with_cls else tokens.patches
        return tokens, self.projector(last)


class TwoTeachers(nn.Module):
    """What both frozen networks say of pictures, each run as far as it is asked and no further.

    Args:
        relations: the network whose relations count, with the blocks in which they do; None without.
        features: the network whose last tokens count, with its last block; None without.
    """

    def __init__(self, relations: Preprocessed | None, relation_blocks: Sequence[int], features: Preprocessed | None):
        super().__init__()
        self.relations = relations
        self.relation_blocks = tuple(relation_blocks)
        self.features = features

    def forward(
        self, pictures: Tensor, grid: tuple[int, int], normalisation: Tensor | None
    ) -> tuple[list[Tensor], Tensor | None]:
        """Queries, keys and values of the asked blocks, (3, B, heads, prefix + N, d) each, and tokens (B, prefix + N, D)
        before the final norm."""
        found, tokens = [], None
        if self.relations is not None:
            taps = tuple(f"block{block}.qkv" for block in self.relation_blocks)
            last = max(self.relation_blocks)
            tapped = self.relations(pictures, grid, normalisation, taps=taps, until=last).taps
            found = [tapped[tap] for tap in taps]
        if self.features is not None:
            last = self.features.backbone.num_blocks
            tokens = self.features(pictures, grid, normalisation, taps=(last,)).taps[f"block{last}"]
        return found, tokens


class HybridDistillation(SelfDistillation):
    """Hybrid distillation (Shi et al. 2023).

    Args:
        backbone: the ViT that is pretrained; it drops patches in training alone.
        views: recipe with one "global" view or more; student and teachers see the same.
        relation_teacher: a frozen ViT trained by masking, for instance MAE's, with `weights`. null = without.
        feature_teacher: a frozen ViT with features that tell pictures apart, for instance DeiT's or CLIP's, with `weights`.
            null = without. Patches of either may be of another size than the student's: they see pictures of the size at
            which the grids agree.
        relation: "qk" is the attention itself, "kk" and "vv" compare keys or values with each other.
        relation_blocks: the student's blocks that learn to relate; null is a third and two thirds of the way through.
        teacher_relation_blocks: the teacher's blocks they learn from; null is as far through as the student's.
        relation_heads: heads in which relations are compared, cut anew where a network has another number; null is the
            teacher's.
        relation_weight: of the divergence of relations, alpha in the paper; 0 leaves the relation teacher out.
        feature_weight: of the distance of features, beta in the paper; 0 leaves the feature teacher out.
        feature_distance: "smooth_l1" or "l2", from the teacher's tokens at mean 0 and variance 1.
        projector_hidden: widths of hidden layers between the student's last tokens and the teacher's; none makes it linear.
        drop_ratio: share of the patches that is dropped at each place, at most .5; 0 keeps all.
        drop_behind: blocks behind which patches are dropped, 0 for what enters the first; null is 0, a third and two thirds.
        relation_normalize, feature_normalize: how the teachers' pictures were normalised: "data" = as the data's,
            "imagenet", "clip", or {"mean": [...], "std": [...]}.
    """

    student: DroppingStudent
    teacher: Frozen

    def __init__(
        self,
        backbone: Backbone,
        *,
        views: str | Views = "crop",
        relation_teacher: Backbone | None = None,
        feature_teacher: Backbone | None = None,
        relation: str = "qk",
        relation_blocks: Sequence[int] | None = None,
        teacher_relation_blocks: Sequence[int] | None = None,
        relation_heads: int | None = None,
        relation_weight: float | Schedule = 1.0,
        feature_weight: float | Schedule = 1.0,
        feature_distance: str = "smooth_l1",
        projector_hidden: Sequence[int] = (),
        drop_ratio: float = 0.3,
        drop_behind: Sequence[int] | None = None,
        relation_normalize: str | dict[str, list[float]] = "data",
        feature_normalize: str | dict[str, list[float]] = "data",
        lr: float | Schedule = Cosine(1.5e-4, 0.0, warmup=0.05),  # noqa: B008 (frozen)
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
        backbone.require("taps", "keep", by="hybrid distillation")
        if "global" not in self.views.kinds():
            raise UserError("views: this recipe has no 'global' view, which all networks see. Use the recipe 'crop'.")
        relating = None if relation_weight == 0 else relation_teacher
        describing = None if feature_weight == 0 else feature_teacher
        check_teachers(relating, describing)
        if relation not in KINDS:
            raise UserError(f"relation: '{relation}' is unknown. Choose one of {', '.join(KINDS)}.")
        if feature_distance not in DISTANCES:
            raise UserError(f"feature_distance: '{feature_distance}' is unknown. Choose one of {', '.join(DISTANCES)}.")
        thirds = sorted({max(1, number * backbone.num_blocks // 3) for number in (1, 2)})
        behind = (0, *thirds) if drop_behind is None else tuple(drop_behind)
        check_dropping(drop_ratio, behind, backbone)
        self.relation = relation
        self.relation_weight = relation_weight
        self.feature_weight = feature_weight
        self.feature_distance = feature_distance
        self.relation_blocks: tuple[int, ...] = ()
        theirs: tuple[int, ...] = ()
        if relating is not None:
            self.relation_blocks = tuple(thirds if relation_blocks is None else relation_blocks)
            theirs = matching_blocks(self.relation_blocks, teacher_relation_blocks, backbone, relating)
            self.relation_heads = common_heads(relation_heads, backbone, relating)

        projector, with_cls = None, False
        if describing is not None:
            projector = Projector(backbone.embed_dim, describing.embed_dim, projector_hidden)
            with_cls = has_cls(backbone) and has_cls(describing)
        else:
            freeze_behind(backbone, max(self.relation_blocks))
        self.student = DroppingStudent(
            backbone,
            projector,
            with_cls=with_cls,
            relation_blocks=self.relation_blocks,
            drop_ratio=drop_ratio,
            drop_behind=behind,
        )
        self.teacher = Frozen(
            TwoTeachers(
                None if relating is None else Preprocessed(relating, relation_normalize, "relation_normalize"),
                theirs,
                None if describing is None else Preprocessed(describing, feature_normalize, "feature_normalize"),
            )
        )

    def targets(self, batch: Batch) -> Targets:
        return Targets(**self.taught(batch))

    def teach(self, batch: Batch) -> dict[str, Tensor]:
        pictures, backbone = batch.views["global"], self.student.backbone
        grid = backbone.grid(*pictures.shape[-2:])
        relations, features = self.teacher(pictures.flatten(0, 1), grid, batch.normalisation)
        found: dict[str, Tensor] = {}
        for number, qkv in enumerate(relations):
            shared = shared_tokens(qkv, self._relating, self._relating_cls, dim=3)
            pair = compared(shared, self.relation, self.relation_heads).transpose(0, 1)
            found[f"relation{number}"] = pair.unflatten(0, pictures.shape[:2])  # (V, B, 2, h, N, d)
        if features is not None:
            shared = shared_tokens(features, self._describing, self.student.with_cls, dim=1)
            found["features"] = layer_normed(shared).unflatten(0, pictures.shape[:2])  # (V, B, N, Dt)
        return found

    def asked_of_teacher(self) -> dict[str, Any]:
        teachers = self._teachers
        asked: dict[str, Any] = {"grid": list(self.student.backbone.grid(*self.views.kinds()["global"][0].lengths))}
        if teachers.relations is not None:
            normal = teachers.relations.statistics.tolist()
            asked["relations"] = {
                "relation": self.relation,
                "heads": self.relation_heads,
                "blocks": list(teachers.relation_blocks),
                "cls": self._relating_cls,
                "normalisation": normal,
            }
        if teachers.features is not None:
            normal = teachers.features.statistics.tolist()
            asked["features"] = {"cls": self.student.with_cls, "normalisation": normal}
        return asked

    def losses(self, batch: Batch, targets: Targets) -> dict[str, Tensor]:
        tokens, features = self.student(batch.views["global"])
        samples, backbone = len(batch.views["global"]) * batch.total, self.student.backbone
        terms: dict[str, Tensor] = {}
        apart = []
        for number, block in enumerate(self.relation_blocks):
            shared = shared_tokens(tokens.taps[f"block{block}.qkv"], backbone, self._relating_cls, dim=3)
            mine = compared(shared, self.relation, self.relation_heads)  # (2, V B, h, n, d)
            theirs = getattr(targets, f"relation{number}").flatten(0, 1)  # (V B, 2, h, N, d)
            # rows and columns of tokens that were dropped go before the softmax: what is left sums to 1
            theirs = rows_at(theirs, tokens.places_in(block), self._relating_cls, dim=3).transpose(0, 1)
            divergence = relation_divergence(relation_logits(mine), relation_logits(theirs))  # (V B, h, n)
            apart.append(divergence.mean((1, 2)).sum() / samples)
        if apart:
            terms["relation"] = torch.stack(apart).mean()
        if features is not None:
            places, with_cls = tokens.places_in(backbone.num_blocks), self.student.with_cls
            target = rows_at(targets.features.flatten(0, 1), places, with_cls, dim=1)  # (V B, n, Dt)
            terms["feature"] = DISTANCES[self.feature_distance](features, target).mean(1).sum() / samples
        return terms

    def update(self, targets: Targets) -> None:
        """Nothing: the teachers are frozen."""

    def begin_fresh(self) -> None:
        for setting, network in (("relation_teacher", self._relating), ("feature_teacher", self._describing)):
            if network is not None and network.started_from is None:
                raise UserError(
                    f"{setting}: '{network.name}' has no weights, and a network as it was drawn teaches nothing here. Give "
                    f"model.{setting}.weights: a file, an exported folder, a checkpoint or timm:TAG, or leave it out "
                    f"(model.{setting}: null)."
                )

    @property
    def _teachers(self) -> TwoTeachers:
        network: Any = self.teacher.network
        return network

    @property
    def _relating(self) -> Backbone | None:
        return None if self._teachers.relations is None else self._teachers.relations.backbone

    @property
    def _describing(self) -> Backbone | None:
        return None if self._teachers.features is None else self._teachers.features.backbone

    @property
    def _relating_cls(self) -> bool:
        """Whether the class token is one of those that relate."""
        return self._relating is not None and has_cls(self.student.backbone) and has_cls(self._relating)


def kept_counts(count: int, ratio: float, times: int) -> list[int]:
    """How many of `count` patches are left each time that a share is dropped: n - int(ratio n)."""
    counts = []
    for _ in range(times):
        count -= floor(ratio * count)
        counts.append(count)
    return counts


def shared_tokens(sequence: Tensor, network: Any, with_cls: bool, *, dim: int) -> Tensor:
    """Of a network's whole sequence along `dim` the patches, behind the class token where it counts."""
    prefix = network.num_prefix
    patches = sequence.narrow(dim, prefix, sequence.shape[dim] - prefix)
    return torch.cat([sequence.narrow(dim, 0, 1), patches], dim=dim) if with_cls else patches


def rows_at(tokens: Tensor, places: Tensor | None, with_cls: bool, *, dim: int) -> Tensor:
    """Of `shared_tokens` (B, ...) along `dim` those of the patches at `places` (B, n), where not all are wanted, and the class
    token."""
    if places is None:
        return tokens
    if with_cls:
        places = torch.cat([places.new_zeros(len(places), 1), places + 1], dim=1)
    index = places.view(len(places), *[1] * (dim - 1), -1, *[1] * (tokens.ndim - dim - 1))
    size = [*tokens.shape[:dim], places.shape[1], *tokens.shape[dim + 1 :]]
    return tokens.gather(dim, index.expand(size))


def matching_blocks(
    blocks: Sequence[int], theirs: Sequence[int] | None, student: Backbone, teacher: Backbone
) -> tuple[int, ...]:
    """The teacher's blocks that the student's learn from. Raises UserError for blocks that are not there."""
    if theirs is None:
        theirs = [max(1, round(block * teacher.num_blocks / student.num_blocks)) for block in blocks]
    for setting, numbers, network in (
        ("relation_blocks", blocks, student),
        ("teacher_relation_blocks", theirs, teacher),
    ):
        if not numbers or not all(1 <= number <= network.num_blocks for number in numbers):
            raise UserError(
                f"{setting}: {list(numbers)} are no blocks of '{network.name}'. Use numbers from 1 to {network.num_blocks}."
            )
    if len(blocks) != len(theirs):
        raise UserError(
            f"relation_blocks: {list(blocks)} and teacher_relation_blocks: {list(theirs)} are matched one by one. Give as many "
            "of each."
        )
    return tuple(theirs)


def common_heads(asked: int | None, student: Backbone, teacher: Backbone) -> int:
    """Heads in which both compare tokens. Raises UserError where these do not divide both networks' widths."""
    attentions: list[Any] = [network.blocks[0].attn for network in (student, teacher)]
    heads = attentions[1].num_heads if asked is None else asked
    widths = [attention.num_heads * attention.head_dim for attention in attentions]
    if heads < 1 or any(width % heads for width in widths):
        raise UserError(
            f"relation_heads: {heads} heads do not divide the widths of both networks, {widths[0]} and {widths[1]}. Use a "
            f"divisor of {math.gcd(*widths)}."
        )
    return heads


def check_teachers(relating: Backbone | None, describing: Backbone | None) -> None:
    if relating is None and describing is None:
        raise UserError(
            "there is no teacher with a weight above 0. Give relation_teacher, feature_teacher or both, and leave the weight "
            "of one at least above 0."
        )
    for network in (relating, describing):
        if network is not None:
            network.require("taps", "until", "keep", by="hybrid distillation as a teacher")


def check_dropping(ratio: float, behind: Sequence[int], backbone: Backbone) -> None:
    if not 0 <= ratio <= 0.5:
        raise UserError(
            f"drop_ratio: {ratio} is no share from 0 to .5. At most every second patch can be dropped at once."
        )
    if list(behind) != sorted(set(behind)) or not all(0 <= number < backbone.num_blocks for number in behind):
        raise UserError(
            f"drop_behind: {list(behind)} are no places in '{backbone.name}'. Use growing numbers from 0, for what enters the "
            f"first block, to {backbone.num_blocks - 1}."
        )


def freeze_behind(backbone: Backbone, last: int) -> None:
    """What no relation asks for stands still: all behind the queries, keys and values of block `last`."""
    of_block = {id(parameter): name for name, parameter in backbone.blocks[last - 1].named_parameters()}
    depths = backbone.depths()
    for name, parameter in backbone.named_parameters():
        inside = of_block.get(id(parameter))
        asked = inside is not None and inside.startswith(("norm1.", "attn.qkv", "attn.q_", "attn.k_", "attn.v_"))
        if depths[name] > last or (inside is not None and not asked):
            parameter.requires_grad_(False)
