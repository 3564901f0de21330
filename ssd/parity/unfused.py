"""Our values of UnFuSeD: losses, clusters, what views do to spectrograms, and twenty steps over sounds of unequal lengths."""

from typing import Any

import torch
from torch import Tensor, nn

from ssd.backbones.mel_convnet import MelConvNet
from ssd.batch import Batch, Rows, Targets
from ssd.optim import SGD
from ssd.parity.inputs import LABELS, SOUND_LENGTHS, blobs, fill, numbers, shares
from ssd.parity.parts import Outputs, with_gradients
from ssd.parity.trajectories import run
from ssd.pseudo_labels import PseudoLabels, whitening
from ssd.spectrogram import Levels
from ssd.views.sound import SoundViews
from ssd.views.spectra import mixed_levels, resized_crop

RATE_HZ = 1000
VIEWS = SoundViews(
    rate_hz=RATE_HZ,
    global_count=1,
    global_length_s=None,
    local_count=0,
    mix_share=0.4,
    mix_group=4,
    resize=(0.6, 1.5),
)

# ---------------------------------------------------------------------- parts


class Says(nn.Module):
    """A student that answers what it was given."""

    def __init__(self, logits: Tensor):
        super().__init__()
        self.logits = logits
        self.blocks = tuple(range(1, logits.shape[1]))

    def forward(self, samples: Tensor) -> Tensor:
        return self.logits


def losses(device: torch.device) -> Outputs:
    """Two classes by hand; seven with a sample that has no label, and where gradients go with and without detaching."""
    by_hand = torch.zeros(1, 4, 2, device=device)
    by_hand[0, 0, 0] = 2
    values = {f"by hand, {name}": term for name, term in terms_of(by_hand, torch.tensor([0]), True).items()}
    labels = torch.tensor([3, 0, -1, 6, 3])
    for detached, name in ((True, "detached"), (False, "not detached")):
        logits = (2 * numbers("logits of blocks", 5, 4, 7)).to(device).requires_grad_()
        terms = terms_of(logits, labels, detached)
        (gradient,) = torch.autograd.grad(terms["total"], logits)
        values |= {f"{name}, {term}": value for term, value in terms.items()} | {f"gradient, {name}": gradient}
    return values


def terms_of(logits: Tensor, labels: Tensor, detached: bool) -> dict[str, Tensor]:
    """The terms by the logits (B, 1 + J, K) of a classifier and of blocks, and what is minimised."""
    module = of_small_networks(detach_teacher=detached)
    module.student = Says(logits)
    count = len(labels)
    batch = Batch({"global": logits.new_zeros(1, count, 1)}, torch.arange(count), count)
    terms = module.losses(batch, Targets(labels=Rows(labels.to(logits.device))))
    weights = {"label": 1.0, "block_label": 0.7, "kl": 0.3, "cosine": 0.003}
    assert weights == {name: module._weight(name) for name in terms}
    return {**terms, "total": sum((weights[name] * term for name, term in terms.items()), logits.new_zeros(()))}


def heads(device: torch.device) -> Outputs:
    from lightning_modules.unfused import block_head

    values: Outputs = {}
    for norm, name in ((True, "normalised, "), (False, "")):
        head = block_head(6, 4, norm).to(device)
        fill(head)
        blocks = numbers("pooled blocks", 9, 6).to(device).requires_grad_()
        leaves = dict(head.named_parameters())
        values |= with_gradients(f"{name}logits", head(blocks), blocks=blocks, **leaves)
    return values


def clusters(device: torch.device) -> Outputs:
    """Thirty samples in three heaps, whitened to two of six directions, and nine new ones; up to the signs of directions and
    the numbers of clusters."""
    features, others = blobs("features", 30), blobs("other features", 9)
    mean, components = whitening(features.double(), 2)
    labels = PseudoLabels(num_clusters=3, whitened_dim=2).to(device)
    labels.settle(features, torch.arange(30), 30, "heaps")
    centres = labels.centres[labels.labels]
    return {
        "mean": mean,
        "whitening": components @ components.T,
        "sizes": labels.sizes().sort().values,
        "centres": centres @ centres.T,
        "together": labels.labels[:, None] == labels.labels,
        "others with them": labels.nearest(others.to(device))[:, None] == labels.labels,
    }


def spectra(device: torch.device) -> Outputs:
    """Levels of four sounds, each mixed with the one before it, and of the same cropped, each up to its own end."""
    values = (3 * numbers("levels of sounds", 4, 13, 8)).to(device)
    counts = torch.tensor([13, 6, 9, 1], device=device)
    drawn = shares(4).to(device)
    mixed = mixed_levels(Levels(values, counts), 0.4 * drawn[:, 0], 4)
    cropped = resized_crop(Levels(values, counts), 0.6 + 0.9 * drawn[:, 1:3], drawn[:, 3:5])
    found = {"mixed": mixed, "cropped": cropped}
    return {name: torch.where(each.there, each.values, 0) for name, each in found.items()}


# ---------------------------------------------------------------------- twenty steps


def unfused(device: torch.device) -> Outputs:
    return of_labels(device)


def unfused_published(device: torch.device) -> Outputs:
    """The classifier is drawn towards its blocks, and two of the three have a head."""
    return of_labels(device, detach_teacher=False, taught_blocks=(1, 3))


def of_small_networks(**settings: Any) -> Any:
    from lightning_modules.unfused import UnFuSeD

    sizes: dict[str, Any] = {"rate_hz": RATE_HZ, "mels": 8, "channels": 4, "embed_dim": 12, "dropout": 0.0}
    return UnFuSeD(MelConvNet(**sizes), MelConvNet(**sizes), random_labeller=True, views=VIEWS, **settings)


def of_labels(device: torch.device, **settings: Any) -> Outputs:
    module = of_small_networks(
        num_clusters=5,
        kl_weight=1.5,
        cosine_weight=0.5,
        head_batch_norm=False,  # over eight samples it enlarges rounding, and is among the parts
        lr=0.05,
        optimizer=SGD(momentum=0.9),
        weight_decay=0.01,
        **settings,
    )

    def label() -> None:
        module.pseudo_labels.labels = torch.tensor(LABELS, device=device)

    return run(module, device, after_filling=label, batches=of_changed_spectra)


def of_changed_spectra(step: int) -> Batch:
    """What follows a sound is 0, as padding is."""
    count = len(SOUND_LENGTHS)
    valid = torch.arange(max(SOUND_LENGTHS)) < torch.tensor(SOUND_LENGTHS)[:, None]
    sounds = torch.where(valid, numbers(f"sounds {step}", count, max(SOUND_LENGTHS)) * 3**0.5, 0.0)
    drawn = shares(count, step)
    rows = torch.cat([0.4 * drawn[:, :1], 0.6 + 0.9 * drawn[:, 1:3], drawn[:, 3:]], dim=1)
    index, spectra = torch.arange(count), {"global": rows[None]}
    return Batch({"global": sounds[None]}, index, count, valid={"global": valid[None]}, spectra=spectra)
