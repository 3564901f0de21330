"""UnFuSeD: a fresh network learns the clusters that a pretrained one sees in the data, and its last layer teaches its earlier
blocks.

Seth et al., "UNFUSED: UNsupervised Finetuning Using SElf supervised Distillation", ICASSP 2023 workshops, arXiv 2303.05668.
Departs from the published code: clips are embedded by the vector of the whole network (there the first block's average), as many
outputs as clusters (there 32 and 99), the last layer is no student of its blocks (detach_teacher: false is published), sounds are
mixed within their step (there with a memory of 2,048 earlier ones), and short sounds are padded at their end.
"""

import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_modules.base import SelfDistillation
from ssd.backbones.base import Backbone
from ssd.backbones.sound import SoundNetwork, Spectral
from ssd.batch import Batch, Padded, Rows, Targets
from ssd.data.manifest import write_manifest
from ssd.distributed import rank
from ssd.errors import UserError
from ssd.evaluation.features import Features, extract
from ssd.evaluation.outputs import output_of
from ssd.losses.divergence import divergence
from ssd.losses.regression import cosine_distance
from ssd.optim import SGD, Clip, OptimizerRule
from ssd.pseudo_labels import PseudoLabels, same_on_all_ranks
from ssd.schedules import Schedule
from ssd.step_report import StepReport, Terms
from ssd.summary import console, print_facts
from ssd.teachers import NoTeacher
from ssd.views.sound import SoundViews
from ssd.views.spectra import altered
from ssd.views.view import Views

LABEL_FILE = "pseudo_labels.csv"


class TaughtBlocks(nn.Module):
    """A backbone with a classifier on its own vector and a head on each of some blocks.

    Args:
        blocks: numbers of the blocks with a head.
        classes: K.
        batch_norm: in the heads.
    """

    def __init__(self, backbone: Backbone, blocks: Sequence[int], classes: int, *, batch_norm: bool):
        super().__init__()
        self.backbone = backbone
        self.blocks = tuple(blocks)
        self.classifier = nn.Linear(backbone.embed_dim, classes)
        self.heads = nn.ModuleList(block_head(backbone.block_dim(block), classes, batch_norm) for block in blocks)

    def forward(self, samples: Any) -> Tensor:
        """Pictures or clips (B, C, ...), sounds or their levels -> logits (B, 1 + J, K): the classifier's, then each block's."""
        tokens = self.backbone(samples, taps=self.blocks)
        logits = [self.classifier(tokens.pooled())]
        for block, head in zip(self.blocks, self.heads, strict=True):
            tapped = self.backbone.tokens_at(tokens.taps[f"block{block}"], tokens.grid)
            logits.append(head(replace(tapped, valid=tokens.valid).pooled()))
        return torch.stack(logits, dim=1)


def block_head(dim: int, classes: int, batch_norm: bool) -> nn.Sequential:
    """Three linear layers, the first two normalised and with ReLU; hidden layers are as wide as there are classes."""
    layers: list[nn.Module] = []
    for width_in, width_out in pairwise([dim, classes, classes]):
        layers.append(nn.Linear(width_in, width_out))
        layers += [nn.BatchNorm1d(width_out)] if batch_norm else []
        layers.append(nn.ReLU())
    return nn.Sequential(*layers, nn.Linear(classes, classes))


class UnFuSeD(SelfDistillation):
    """UnFuSeD (Seth et al. 2023).

    Args:
        backbone: the network that is trained, from a fresh draw.
        labeller: the pretrained network whose features are clustered, with `weights`: an exported folder, a file, a checkpoint
            or timm:TAG. It looks at samples as an evaluation does, and is no part of the checkpoints.
        random_labeller: allow a labeller without weights, as a control.
        labeller_output: which of its outputs: "pooled" or a name from the table of ssd probe, such as last4_mean_patch.
        views: recipe with one "global" view or more, each learned from by itself.
        num_clusters: K, of k-means; the heads have as many outputs.
        whitened_dim: main components that features are whitened to.
        cluster_iterations: of k-means.
        cluster_seed: of k-means.
        taught_blocks: numbers of the blocks with a head of their own.
        head_batch_norm: batch normalisation in the heads of blocks.
        block_label_weight: of the blocks' cross-entropies with the labels, summed.
        kl_weight: of the divergences of blocks from the classifier, summed.
        cosine_weight: of the distances of their logits' directions, 2 - 2 cos, summed.
        detach_teacher: the classifier is not drawn towards its blocks by those two; false as published.
    """

    student: TaughtBlocks
    alters_spectra = True

    def __init__(
        self,
        backbone: Backbone,
        labeller: Backbone,
        *,
        random_labeller: bool = False,
        labeller_output: str = "pooled",
        views: str | Views = "unfused",
        num_clusters: int = 32,
        whitened_dim: int = 128,
        cluster_iterations: int = 20,
        cluster_seed: int = 0,
        taught_blocks: Sequence[int] = (1, 2, 3),
        head_batch_norm: bool = True,
        block_label_weight: float | Schedule = 0.7,
        kl_weight: float | Schedule = 0.3,
        cosine_weight: float | Schedule = 0.003,
        detach_teacher: bool = True,
        lr: float | Schedule = 0.03,
        lr_rule: str = "none",
        optimizer: OptimizerRule = SGD(momentum=0.9),  # noqa: B008 (frozen)
        weight_decay: float | Schedule = 1e-4,
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
        backbone.require("taps", by="UnFuSeD")
        check_networks(backbone, labeller, self.views)
        wrong = [block for block in taught_blocks if not 1 <= block <= backbone.num_blocks]
        if wrong or not taught_blocks:
            raise UserError(
                f"taught_blocks: {list(taught_blocks)} of {backbone.num_blocks} blocks cannot be. Give numbers from 1 to "
                f"{backbone.num_blocks}."
            )
        self.random_labeller = random_labeller
        self.labeller_output = labeller_output
        self.block_label_weight = block_label_weight
        self.kl_weight = kl_weight
        self.cosine_weight = cosine_weight
        self.detach_teacher = detach_teacher

        self.student = TaughtBlocks(backbone, taught_blocks, num_clusters, batch_norm=head_batch_norm)
        self.teacher = NoTeacher()
        self.pseudo_labels = PseudoLabels(num_clusters, whitened_dim, cluster_iterations, cluster_seed)
        # no module of this one: of no use once there are labels, it is neither saved nor kept on the device
        self._labeller = (labeller.requires_grad_(False).eval(),)

    def survey(self, data: Any, folder: Path | None = None) -> None:
        """Labels the training samples, unless they have labels already. With a folder writes who has which to `LABEL_FILE`."""
        if not hasattr(data, "look_at"):
            raise UserError(
                f"UnFuSeD labels all training samples before it begins, and {type(data).__name__} does not give them. Use a "
                "datamodule: Sound, Clips, Images or Digits."
            )
        source = data.source
        of, now = self.pseudo_labels.fingerprint, source.fingerprint()
        if of == now:
            return
        if of and self.step > 0:
            raise UserError(
                "the run goes on with other training samples than its pseudo-labels are of. Give it the data it began with, or "
                "start a new run."
            )
        found = self._embedded_by_labeller(data)
        self.pseudo_labels.settle(found.features, found.index, len(source), now)
        if rank() == 0:
            if folder is not None:
                write_label_file(folder / LABEL_FILE, source, self.pseudo_labels)
            print_facts(console(), {"labels": told(source, self.pseudo_labels, data.sample_word)})

    def targets(self, batch: Batch) -> Targets:
        return Targets(labels=Rows(self.pseudo_labels(batch.index)))  # (B,)

    def losses(self, batch: Batch, targets: Targets) -> dict[str, Tensor]:
        views = len(batch.views["global"])
        logits = self.student(self._samples(batch)).float()  # (V B, 1 + J, K)
        labels, samples = targets.labels.repeat(views), views * batch.total
        deep, blocks = logits[:, 0], logits[:, 1:].transpose(0, 1)  # (V B, K), (J, V B, K)
        guide = deep.detach() if self.detach_teacher else deep
        guides = guide.expand_as(blocks)
        # the label of a sample that could not be read then is -1, and costs nothing
        named = [F.cross_entropy(each, labels, ignore_index=-1, reduction="sum") for each in (deep, *blocks)]
        terms = {
            "label": named[0] / samples,
            "block_label": torch.stack(named[1:]).sum() / samples,
            "kl": divergence(blocks, F.log_softmax(guides, dim=-1), 1.0).sum() / samples,
            "cosine": 2 * cosine_distance(blocks, guides).sum() / samples,
        }
        right = (logits.detach().argmax(2) == labels[:, None]).float().mean(0)  # (1 + J,)
        names = ("classifier", *(f"block{block}" for block in self.student.blocks))
        return Terms(terms, **dict(zip(names, right.unbind(), strict=True)))

    def update(self, targets: Targets) -> None:
        """Nothing: labels stay as they were found."""

    def diagnostics(self, report: StepReport) -> dict[str, float]:
        return {f"train/pseudo_labels/{name}_top1": value for name, value in report.measures.items()}

    def _samples(self, batch: Batch) -> Any:
        """What the student sees of the global views, V B of them."""
        views = batch.views["global"].flatten(0, 1)
        if "global" not in batch.valid:
            return views
        sounds = Padded(views, batch.valid["global"].flatten(0, 1))
        if "global" not in batch.spectra:
            return sounds
        backbone: Any = self.student.backbone
        return altered(backbone.hear(sounds), batch.spectra["global"], self.views)  # type: ignore[arg-type]

    def _embedded_by_labeller(self, data: Any) -> Features:
        """Features of every training sample that can be read, each as an evaluation sees it, on every process."""
        (labeller,) = self._labeller
        if labeller.started_from is None and not self.random_labeller:
            raise UserError(
                f"labeller: '{labeller.name}' has no weights, and clusters of a network as it was drawn say little. Give "
                "model.labeller.weights: an exported folder, a file, a checkpoint or timm:TAG, or model.random_labeller: true "
                "for a control."
            )
        device = next(self.student.parameters()).device
        labeller.to(device).eval()
        same_on_all_ranks(labeller)
        bar = f"labels of {len(data.source):,} {data.sample_word}s" if rank() == 0 and sys.stdout.isatty() else None
        try:
            return extract(
                lambda samples: output_of(labeller, samples, self.labeller_output),
                data.look_at(data.source),
                device=device,
                progress=bar,
            )
        finally:
            labeller.cpu()


def write_label_file(path: Path, source: Any, labels: PseudoLabels) -> None:
    """A manifest of the samples that have a label, a line each, which `--data` reads with these labels."""
    rows = enumerate(labels.labels.tolist())
    write_manifest(path, ({"path": source.describe(index), "label": label} for index, label in rows if label >= 0))


def told(source: Any, labels: PseudoLabels, word: str) -> str:
    """What came of the clustering, in words; beside labels of the data's own, how much they have in common."""
    own, sizes = labels.labels.cpu().numpy(), labels.sizes()
    text = f"{(own >= 0).sum():,} {word}s in {labels.num_present} of {labels.num_clusters} clusters, {sizes.min()} to "
    text += f"{sizes.max()} in each"
    if (own < 0).any():
        text += f", {(own < 0).sum():,} that cannot be read without"
    if source.labels is None:
        return text
    from sklearn.metrics import normalized_mutual_info_score

    both = (own >= 0) & (source.labels >= 0)
    shared = normalized_mutual_info_score(source.labels[both], own[both])
    return f"{text}; mutual information with the data's own labels {shared:.2f} of 1 (not used)"


def check_networks(backbone: Backbone, labeller: Backbone, views: Views) -> None:
    """Raises UserError for networks and views that do not go together."""
    if "global" not in views.kinds():
        raise UserError("views: this recipe has no 'global' view, which is learned from. Use 'unfused' or 'crop'.")
    if labeller.axes != backbone.axes:
        raise UserError(
            f"labeller: '{labeller.name}' and backbone '{backbone.name}' are networks over different kinds of data. Use two for "
            "one kind."
        )
    for name, network in (("backbone", backbone), ("labeller", labeller)):
        of_sound = isinstance(network, SoundNetwork)
        if of_sound and (not isinstance(views, SoundViews) or views.rate_hz != network.rate_hz):
            raise UserError(
                f"{name}: '{network.name}' hears {network.rate_hz} samples a second, and views are "
                f"{f'of {views.rate_hz}' if isinstance(views, SoundViews) else type(views).__name__}. Set both rate_hz alike."
            )
    if views.alters_spectra and not isinstance(backbone, Spectral):
        raise UserError(
            f"views: mix_share and resize change spectrograms, and '{backbone.name}' makes none. Use MelConvNet or "
            "LogMelEncoder, or mix_share: 0 and resize: null."
        )
