"""Our values of DinoSR and SpidR: codebooks, schedules and spans, and twenty steps over sounds of unequal lengths."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ssd.backbones.speech import SpeechEncoder
from ssd.batch import Batch
from ssd.codebooks import Codebooks, perplexity
from ssd.masking.batch import packed
from ssd.masking.recipes import SpanMasks
from ssd.optim import AdamW, Clip
from ssd.parity.inputs import SOUND_LENGTHS, distribution, hidden_frames, numbers
from ssd.parity.mask_statistics import BATCH, DRAWS, span_statistics
from ssd.parity.parts import Outputs, curve
from ssd.parity.trajectories import run
from ssd.schedules import Exponential, Linear, TriStage
from ssd.views.sound import SoundViews

# ---------------------------------------------------------------------- parts


def codebooks(device: torch.device) -> Outputs:
    """Two of five codes, which three steps of frames hit, some of them padding; and one of two codes by hand."""
    books = Codebooks(2, 5, 3, 0.9).to(device)
    books.sums.copy_(numbers("codes", 2, 5, 3))
    values: Outputs = {}
    for step in range(3):
        features = numbers(f"frames {step}", 2, 11, 3).to(device)
        real = torch.tensor([True] * 8 + [False] * 3, device=device)
        assigned = books(features)
        books.update(*books.hits(features, assigned, real))
        values |= {f"codes {step}": assigned[:, :8], f"sums {step}": books.sums.clone()}
        values[f"counts {step}"] = books.counts.clone()
    values["perplexity"] = perplexity(distribution("shares", 3, 6).to(device))
    return values | by_hand(device)


def by_hand(device: torch.device) -> Outputs:
    """Codes at 2 and 10, hit by 1 and 2: once, and a hundred times."""
    books = Codebooks(1, 2, 1, 0.9).to(device)
    books.sums.copy_(torch.tensor([[[2.0], [10.0]]]))
    features, real = torch.tensor([[[1.0], [2.0]]], device=device), torch.tensor([True, True], device=device)
    values: Outputs = {}
    for step in range(100):
        books.update(*books.hits(features, books(features), real))
        if step == 0:
            values["once"] = torch.cat([books.sums.flatten(), books.counts.flatten(), books.centroids.flatten()])
    return values | {"a hundred times": torch.cat([books.counts.flatten(), books.centroids.flatten()])}


def schedules(device: torch.device) -> Outputs:
    """Rates of three stages; momenta at published steps, in thousandths of their distance from 1."""
    rate = TriStage(5e-4, 5e-6, warmup_start=5e-6)
    line = Linear(0.999, 0.9999, until="30000 steps", reaches_end=False)
    nearer = Exponential(0.999, 1.0, scale="20000 steps")
    steps = (0, 6_000, 12_000, 100_000, 200_000, 300_000, 399_999)
    return {
        "stages": curve(TriStage(1.0, 0.01, warmup=0.2, warmup_start=0.01, hold=0.3)),
        "rate": 1000 * values_at(rate, *steps),
        "to .9999": values_at(line, 0, 15_000, 29_999, 30_000, 200_000),
        "to 1": values_at(nearer, 0, 20_000, 100_000, 184_000, 185_000),
    }


def values_at(schedule: Any, *steps: int) -> Tensor:
    return torch.tensor([schedule.value(step, 400_000, 1000) for step in steps], dtype=torch.float64)


def spans(device: torch.device) -> Outputs:
    return span_statistics(
        np.concatenate([SpanMasks(0.8, 10).draw(1, BATCH, (200,), 0, step)[0] for step in range(DRAWS)])
    )


# ---------------------------------------------------------------------- twenty steps


def dinosr(device: torch.device) -> Outputs:
    """Teacher and front end stay still from step 15 on."""
    return of_codes(device, momentum=Linear(0.9, 0.99, until="8 steps", reaches_end=False), freeze_after=0.75)


def spidr(device: torch.device) -> Outputs:
    """A head for each block; the teacher stands still once its momentum is as good as 1, behind step 16."""
    momentum = Exponential(0.9, 1.0, scale="4 steps", reached=0.0015)
    betas = AdamW(betas=(0.9, 0.95), eps=1e-6)
    clip = Clip(1.4, over="all")
    return of_codes(device, heads="blocks", momentum=momentum, freeze_after=1.0, optimizer=betas, clip=clip)


def of_codes(device: torch.device, **settings: Any) -> Outputs:
    from lightning_modules.dinosr import DinoSR

    still: dict[str, Any] = {"dropout": 0.0, "attention_dropout": 0.0, "layer_drop": 0.0}
    network: dict[str, Any] = {"layers": ((10, 5), (3, 2)), "conv_dim": 6, "embed_dim": 32, "depth": 3, "num_heads": 2}
    module = DinoSR(
        SpeechEncoder(rate_hz=8000, **network, **still),
        views=SoundViews(rate_hz=8000, global_count=1, global_length_s=None, local_count=0),
        num_codebooks=2,
        num_codes=20,
        lr=TriStage(2e-3, 2e-5, warmup=0.2, warmup_start=2e-5, hold=0.3),
        **settings,
    )

    def known_codes() -> None:
        module.codebooks.sums.copy_(numbers("codes", 2, 20, 32))

    memory = {"codebooks.sums": "sums", "codebooks.counts": "counts"}
    return run(module, device, after_filling=known_codes, batches=of_unequal_lengths, memory=memory)


def of_unequal_lengths(step: int) -> Batch:
    """What follows a sound is 0, as padding is."""
    count = len(SOUND_LENGTHS)
    valid = torch.arange(max(SOUND_LENGTHS)) < torch.tensor(SOUND_LENGTHS)[:, None]
    sounds = numbers(f"sounds {step}", count, max(SOUND_LENGTHS)) * 3**0.5
    sounds = torch.where(valid, sounds, 0.0)
    masks = {"global": packed(hidden_frames(step)[None], 1, 64)}
    return Batch({"global": sounds[None]}, torch.arange(count), count, masks=masks, valid={"global": valid[None]})
