"""DinoSR: a student names, at every masked frame of an utterance, the codes into which the average of its past selves falls
there. The codes are running averages themselves.

Liu et al., "Self-Distillation and Online Clustering for Self-supervised Speech Representation Learning", 2023, arXiv 2305.10005.
With `heads` "blocks" its successor: Poli et al., "SpidR", TMLR 2025, arXiv 2512.20308.
Departs from the published code: the front end does stay still with the teacher (there it goes on), processes share their codes
from the first step, the mean is over the masked frames of the whole step, and padding is told from sound.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_modules.base import SelfDistillation
from ssd.backbones.base import Backbone
from ssd.backbones.speech import Sounds
from ssd.batch import Batch, Padded, Rows, Targets, Whole
from ssd.codebooks import Codebooks, perplexity
from ssd.distributed import sum_over_ranks
from ssd.errors import UserError
from ssd.masking.recipes import Masking, SpanMasks
from ssd.normalisers import instance_normed
from ssd.optim import AdamW, Clip, OptimizerRule
from ssd.schedules import Length, Linear, Schedule, TriStage, in_steps
from ssd.step_report import StepReport, Terms
from ssd.teachers import EMA
from ssd.views.sound import SoundViews
from ssd.views.view import Views


class CodeStudent(nn.Module):
    """Backbone and one linear head for each codebook.

    Args:
        taps: of the backbone, one for each head; none: all heads read the last block.
    """

    def __init__(self, backbone: Sounds, number: int, codes: int, taps: Sequence[str] = ()):
        super().__init__()
        self.backbone = backbone
        self.taps = tuple(taps)
        self.mask_token = nn.Parameter(torch.rand(1, backbone.embed_dim))
        self.heads = nn.ModuleList(nn.Linear(backbone.embed_dim, codes) for _ in range(number))

    def forward(self, sounds: Padded, masked: Tensor | None = None, places: Tensor | None = None) -> Any:
        """Logits of the codes (R, K, V) at `places` (R,) of the B * T frames, `masked` (B, T) of which are hidden.

        Without them what enters the transformer, (B, T, D), and which frames are sound, (B, T): what the teacher reads.
        """
        backbone = self.backbone
        frames, valid = backbone.embed(sounds)
        grid = backbone.grid_of(sounds)
        if masked is None or places is None:
            return backbone.placed(frames, grid), valid
        tokens = backbone.encode(frames, valid, grid, masked, self.mask_token, self.taps)
        seen = [tokens.taps[tap] for tap in self.taps] or [tokens.patches] * len(self.heads)
        logits = [head(each.flatten(0, 1)[places]) for head, each in zip(self.heads, seen, strict=True)]
        return torch.stack(logits, dim=1)


class DinoSR(SelfDistillation):
    """DinoSR (Liu et al. 2023) and SpidR (Poli et al. 2025).

    Args:
        backbone: SpeechEncoder, or LogMelEncoder with patches of all bands.
        views: one "global" view, whole or cut; its rate_hz is the backbone's.
        masks: how frames are hidden.
        num_codebooks: one for each of so many last blocks, whose MLP outputs are what is to be named.
        num_codes: in each codebook. Fewer for small data: five times as many masked frames should be in a step.
        codebook_momentum: what a code keeps of itself where it is hit.
        revive_after: steps without a hit after which a code begins anew at a random frame; null = never, as published.
        heads: "last": all read the last block (DinoSR); "blocks": each reads the MLP of the block that it names (SpidR, with
            SpeechEncoder.layer_drop 0).
        momentum: of the teacher. From where it is 1 the teacher is frozen, and with it the front end that both share.
        freeze_after: when teacher and front end are frozen in any case, a share of the run or "200000 steps"; 1 = never.
    """

    student: CodeStudent
    teacher: EMA

    def __init__(
        self,
        backbone: Backbone,
        *,
        views: str | Views = "utterance",
        masks: Masking = SpanMasks(0.8, 10),  # noqa: B008 (frozen)
        num_codebooks: int = 8,
        num_codes: int = 256,
        codebook_momentum: float = 0.9,
        revive_after: int | None = None,
        heads: str = "last",
        momentum: float | Schedule = Linear(0.999, 0.9999, until="30000 steps", reaches_end=False),  # noqa: B008
        freeze_after: Length = 0.5,
        lr: float | Schedule = TriStage(5e-4, 5e-6, warmup_start=5e-6),  # noqa: B008
        lr_rule: str = "none",
        optimizer: OptimizerRule = AdamW(betas=(0.9, 0.98), eps=1e-6),  # noqa: B008
        weight_decay: float | Schedule = 0.01,
        decay_rule: str = "none",
        clip: Clip | None = None,
        freeze_last_layer: float | str = 0.0,
        **engine,
    ):
        super().__init__(
            views=views,
            lr=lr,
            lr_rule=lr_rule,
            optimizer=optimizer,
            weight_decay=weight_decay,
            decay_rule=decay_rule,
            clip=clip,
            freeze_last_layer=freeze_last_layer,
            **engine,
        )
        backbone = over_time(backbone, self.views)
        if not 1 <= num_codebooks <= backbone.num_blocks:
            raise UserError(
                f"num_codebooks: {num_codebooks} of {backbone.num_blocks} blocks cannot be. Use 1 to {backbone.num_blocks}."
            )
        if heads not in ("last", "blocks"):
            raise UserError(f"heads: '{heads}' is unknown. Choose 'last' or 'blocks'.")
        in_steps(freeze_after, 1, 1)
        self.masking = {"global": masks}
        self.momentum = momentum
        self.freeze_after = freeze_after
        numbers = range(backbone.num_blocks - num_codebooks + 1, backbone.num_blocks + 1)
        self.taps = tuple(f"block{number}.mlp" for number in numbers)

        self.codebooks = Codebooks(num_codebooks, num_codes, backbone.embed_dim, codebook_momentum, revive_after)
        if heads == "blocks":
            # it would wait for a gradient that never comes
            backbone.model.transformer.behind_taps.requires_grad_(False)
        self.student = CodeStudent(backbone, num_codebooks, num_codes, self.taps if heads == "blocks" else ())
        # positions by convolution are the student's own; a spectrogram's are fixed
        shared = () if backbone.model.transformer.positions is None else ("positions.",)
        self.teacher = EMA(backbone.model.transformer, buffers="average", shared=shared)

    @property
    def evaluated_backbone(self) -> Backbone:
        """The student's: the teacher is a transformer without a front end of its own."""
        return self.student.backbone

    def begin_fresh(self) -> None:
        self.codebooks.same_on_all_ranks()

    @property
    def frozen(self) -> bool:
        """Whether teacher and front end stay still in this step."""
        over = self.step >= in_steps(self.freeze_after, self.total_steps, self.steps_per_epoch)
        return over or self.value_of(self.momentum, self.step + 1) >= 1

    def resting(self) -> Iterable[nn.Parameter]:
        return self.student.backbone.model.front.parameters() if self.frozen else ()

    def targets(self, batch: Batch) -> Targets:
        frames, valid = self.student(batch.seen("global"))
        _, taps = self.teacher(frames, valid, self.taps)
        places, real = batch.masks["global"].places()
        features = torch.stack(
            [instance_normed(taps[tap], valid=valid).flatten(0, 1)[places] for tap in self.taps]
        )  # (K, R, D)
        codes = self.codebooks(features)
        sums, counts = self.codebooks.hits(features, codes, real)
        fresh = self.codebooks.candidates(features, real)
        return Targets(
            codes=Rows(codes.mT),  # (R, K)
            sums=Whole(sums),
            counts=Whole(counts),
            masked=Whole(sum_over_ranks(real.sum())),
            **({} if fresh is None else {"fresh": Whole(fresh)}),
        )

    def losses(self, batch: Batch, targets: Targets) -> dict[str, Tensor]:
        masks = batch.masks["global"]
        places, real = masks.places()
        logits = self.student(batch.seen("global"), masks.boolean[0], places)  # (R, K, V)
        error = F.cross_entropy(logits.float().flatten(0, 1), targets.codes.flatten(), reduction="none")
        error = error.unflatten(0, logits.shape[:2]).mean(1)  # (R,)
        terms = {"codes": torch.where(real, error, 0).sum() / targets.masked.clamp_min(1)}
        return Terms(terms, predicted=mass_of_codes(logits, real))

    def update(self, targets: Targets) -> None:
        self.codebooks.update(targets.sums, targets.counts, getattr(targets, "fresh", None))
        if not self.frozen:
            # published schedules count the steps that are done
            self.teacher.update(self.student.backbone.model.transformer, self.value_of(self.momentum, self.step + 1))

    def measures(self, targets: Targets) -> dict[str, Tensor]:
        return self._by_block(perplexity=perplexity(targets.counts), used=(targets.counts > 0).float().mean(1))

    def of_answers(self, answers: dict[str, Tensor]) -> dict[str, Tensor]:
        return self._by_block(predicted_perplexity=perplexity(answers["predicted"]))

    def _by_block(self, **found: Tensor) -> dict[str, Tensor]:
        """Numbers of each codebook (K,) by its block, and their means."""
        return {
            f"{tap.removesuffix('.mlp')}_{name}": value
            for name, values in found.items()
            for tap, value in zip(self.taps, values.unbind(), strict=True)
        } | {name: values.mean() for name, values in found.items()}

    def diagnostics(self, report: StepReport) -> dict[str, float]:
        return {f"train/codebooks/{name}": value for name, value in report.measures.items()}


@torch.no_grad()
def mass_of_codes(logits: Tensor, real: Tensor) -> Tensor:
    """What is predicted of each code, summed over the frames that are `real` (R,): logits (R, K, V) -> (K, V)."""
    return torch.where(real[:, None, None], logits.detach().float().softmax(-1), 0).sum(0)


def over_time(backbone: Backbone, views: Views) -> Sounds:
    """The backbone. Raises UserError for one, or for views, that the method has no use for."""
    if not isinstance(backbone, Sounds) or backbone.rows != 1:
        raise UserError(
            f"DinoSR masks sound over time, and '{backbone.name}' does not answer one token for each moment. Use SpeechEncoder, "
            "or LogMelEncoder with patches of all its bands."
        )
    if not isinstance(views, SoundViews):
        raise UserError(
            f"DinoSR learns from sounds, and its views are {type(views).__name__}. Use the recipe 'utterance'."
        )
    kinds = {kind: len(found) for kind, found in views.kinds().items()}
    if kinds != {"global": 1}:
        raise UserError(f"views: this recipe gives {kinds}, and DinoSR reads one view of each sound. Use 'utterance'.")
    if views.rate_hz != backbone.rate_hz:
        raise UserError(
            f"views of {views.rate_hz} samples a second and a backbone for {backbone.rate_hz} do not fit. Set both rate_hz alike."
        )
    return backbone
