"""data2vec 2.0: many masks of one picture share what the average of the student's past selves made of the whole one; visible
patches alone are encoded, and a few convolutions predict the rest.

Baevski et al., "Efficient Self-supervised Learning with Contextualized Target Representations", ICML 2023, arXiv 2212.07525.
Departs from the published code: the class token's term is a mean over pictures and masks, at the weight that the published sum
came to (`cls_rule`), where the published one follows the batch of a process.
"""

from torch import Tensor

from lightning_modules.base import SelfDistillation, StepReport
from ssd.backbones.base import Backbone
from ssd.batch import Batch, Targets
from ssd.decoders import ConvDecoder
from ssd.diagnosis.features import deviation, deviation_logs
from ssd.distributed import world_size
from ssd.errors import UserError
from ssd.layer_targets import Encoder, last_blocks, patch_layers, shared_names
from ssd.losses.regression import squared_error
from ssd.masked_branch import MaskedBranch, has_cls, mean_over_hidden, require_exact, visible_places
from ssd.masking.recipes import InverseSquareMasks, Masking
from ssd.normalisers import average, instance_normed, layer_normed
from ssd.optim import AdamW, Clip, OptimizerRule
from ssd.schedules import Cosine, Linear, Schedule
from ssd.step_report import Terms
from ssd.teachers import EMA
from ssd.views.view import Views

CLS_RULES = ("mean", "sum")


class Data2Vec2(SelfDistillation):
    """data2vec 2.0 (Baevski et al. 2023), of pictures.

    Args:
        backbone: a ViT; published are blocks that normalise behind (ViT.post_norm) and fixed positions (ViT.fixed_positions).
        views: recipe with one "global" view or more, each predicted by itself.
        masks: which patches stay visible, the same number in each sample.
        num_masks: M, masks of each view, which share the teacher's one pass; few pictures with many masks stand for a large
            batch.
        top_blocks: of how many of the teacher's last blocks the MLPs' outputs are averaged into the targets; published are 10
            of 12, 18 of 24 and 24 of 32.
        cls_weight: of the class token's distance from the mean target; 0 leaves it out. Published is .01 with the rule
            "sum", which comes to 2.56 for 16 pictures of 16 masks on each process and to 1.28 for 8.
        cls_rule: "mean" over pictures and masks; "sum", published: the sum over those of a process, so that the term weighs
            twice as much where a process has twice as many.
        momentum: share of the old teacher that is kept.
        teacher_shares: "patches" (the embedding), "positions" or both: what the teacher has from the student as it is, and
            not as an average.
        decoder_dim, decoder_depth, decoder_kernel, decoder_groups: of the decoder's convolutions.
        decoder_noise: deviation of the noise that stands at hidden places.
    """

    student: MaskedBranch
    teacher: EMA

    def __init__(
        self,
        backbone: Backbone,
        *,
        views: str | Views = "crop",
        masks: Masking = InverseSquareMasks(),  # noqa: B008 (frozen)
        num_masks: int = 16,
        top_blocks: int = 10,
        cls_weight: float | Schedule = 2.56,
        cls_rule: str = "mean",
        momentum: float | Schedule = Linear(0.9998, 0.99999, until="100000 steps", reaches_end=False),  # noqa: B008
        teacher_shares: list[str] | None = None,
        decoder_dim: int = 768,
        decoder_depth: int = 6,
        decoder_kernel: int = 3,
        decoder_groups: int = 16,
        decoder_noise: float = 0.01,
        lr: float | Schedule = Cosine(1e-3, 0.0, warmup=0.1333),  # noqa: B008
        optimizer: OptimizerRule = AdamW(betas=(0.9, 0.95)),  # noqa: B008
        weight_decay: float | Schedule = 0.05,
        clip: Clip | None = Clip(4.0, over="all"),  # noqa: B008
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
        backbone.require("visible", "taps", by="data2vec 2.0")
        self._check(backbone, masks, num_masks, cls_weight, cls_rule)
        self.masking = {"global": masks}
        self.masks_per_view = num_masks
        self.layers = [f"block{number}.mlp" for number in last_blocks(backbone, top_blocks)]
        self.cls_weight = cls_weight
        self.cls_rule = cls_rule
        self.momentum = momentum

        decoder = ConvDecoder(
            backbone.embed_dim,
            backbone.embed_dim,
            dim=decoder_dim,
            depth=decoder_depth,
            kernel=decoder_kernel,
            groups=decoder_groups,
            noise=decoder_noise,
        )
        self.student = MaskedBranch(backbone, decoder)
        self.teacher = EMA(Encoder(backbone), buffers="average", shared=shared_names(teacher_shares))

    def targets(self, batch: Batch) -> Targets:
        pictures = batch.views["global"]
        layers = patch_layers(self.teacher, pictures.flatten(0, 1), self.layers)  # (V B, N, D) each
        features = layer_normed(average([instance_normed(layer) for layer in layers]))
        return Targets(features=features.unflatten(0, pictures.shape[:2]))  # (V, B, N, D)

    def losses(self, batch: Batch, targets: Targets) -> dict[str, Tensor]:
        masks, pictures = batch.masks["global"], batch.views["global"]
        decoded = self.student(pictures, visible_places(masks))
        sizes = (self.masks_per_view, len(pictures))
        scale = targets.features.shape[-1] ** 0.5  # a mean over D times it is a sum over its root
        error = scale * squared_error(decoded.patches.unflatten(0, sizes), targets.features)  # (M, V, B, N)
        terms = {"features": mean_over_hidden(error.flatten(0, 1), masks, batch.total)}
        if self.cls_weight != 0:
            cls = decoded.tokens.cls.unflatten(0, (*sizes, -1))  # (M, V, B, D)
            apart = scale * squared_error(cls, targets.features.mean(2))  # (M, V, B)
            samples = len(masks.boolean) * batch.total if self.cls_rule == "mean" else world_size()
            terms["cls"] = apart.sum() / samples
        # of one mask: all others tell the same
        return Terms(terms, prediction_std=deviation(decoded.patches[0]))

    def update(self, targets: Targets) -> None:
        self.teacher.update(self.student, self.at("momentum"))

    def measures(self, targets: Targets) -> dict[str, Tensor]:
        return {"target_std": deviation(targets.features)}

    def diagnostics(self, report: StepReport) -> dict[str, float]:
        return deviation_logs(report.measures)

    def _check(
        self, backbone: Backbone, masks: Masking, num_masks: int, cls_weight: float | Schedule, cls_rule: str
    ) -> None:
        if "global" not in self.views.kinds():
            raise UserError("views: this recipe has no 'global' view to hide a part of. Use the recipe 'crop'.")
        require_exact(masks)
        if num_masks < 1:
            raise UserError(f"num_masks: {num_masks} leaves nothing to predict. Use 1 or more; published are 16.")
        if cls_rule not in CLS_RULES:
            raise UserError(f"cls_rule: '{cls_rule}' is unknown. Choose one of {', '.join(CLS_RULES)}.")
        if cls_weight != 0 and not has_cls(backbone):
            raise UserError(f"cls_weight: '{backbone.name}' has no class token. Use cls_weight: 0, or one that has.")
