"""Our values of what regresses the average of a student's inner layers: data2vec and data2vec 2.0."""

from typing import Any

import torch

from ssd.backbones.vit import ViT
from ssd.batch import Masks
from ssd.decoders import ConvDecoder
from ssd.masking.batch import ordered, packed
from ssd.masking.recipes import InverseSquareMasks
from ssd.normalisers import average, instance_normed, layer_normed
from ssd.optim import Clip
from ssd.parity.inputs import equal_masks, fill, masks, numbers
from ssd.parity.mask_statistics import all_crops
from ssd.parity.masked_trajectories import RATE, run_masked
from ssd.parity.parts import Outputs, leaf, with_gradients
from ssd.parity.trajectories import SIZE, run
from ssd.schedules import Linear
from ssd.step import Step
from ssd.views.recipes import CropViews

# ---------------------------------------------------------------------- parts


def normalised(device: torch.device) -> Outputs:
    """Layers of which one is ten times as large, and one channel that is the same in all tokens; sounds of which the end is
    padding."""
    layers = [size * numbers(f"layer {size}", 2, 5, 7).to(device) + 1 for size in (1, 10)]
    layers[0][..., 0] = 3.0
    valid = torch.tensor([[True, True, True, False, False], [True] * 5], device=device)
    padded = instance_normed(layers[0], valid=valid)
    return {
        "layer normed": average([layer_normed(layer) for layer in layers]),
        "instance normed": average([instance_normed(layer) for layer in layers]),
        "of sound alone": padded[valid],
    }


def conv_decoder(device: torch.device) -> Outputs:
    """Two layers of a width that is not the encoder's, without noise, whose numbers are a generator's."""
    network = ConvDecoder(6, 5, dim=8, depth=2, kernel=3, groups=2, noise=0.0)
    fill(network)
    network.to(device)
    shown = leaf("visible patches", 2, 3, 6, device=device)
    visible = torch.tensor([[0, 2, 5], [1, 3, 4]], device=device)
    answer = network(shown, visible, (2, 3))
    return with_gradients("predictions", answer, shown=shown, **dict(network.named_parameters()))


def squares(device: torch.device) -> Outputs:
    return all_crops(InverseSquareMasks(), 14)


SHOWN = {
    "B": (InverseSquareMasks(), 14),
    "L": (InverseSquareMasks(keep=0.25, adjust=0.1), 14),
    "H": (InverseSquareMasks(keep=0.25, adjust=0.1), 16),
    "small": (InverseSquareMasks(), 8),
}


def visible_counts(device: torch.device) -> Outputs:
    """The fewest and the most that any of 256 crops shows."""
    values = {}
    for name, (recipe, side) in SHOWN.items():
        counts = (~recipe.draw(1, 256, (side, side), 0, 0)).sum(2)
        values[name] = torch.tensor([counts.min(), counts.max()])
    return values


# ---------------------------------------------------------------------- twenty steps


def data2vec(device: torch.device) -> Outputs:
    """Three blocks with scales, of which the last two are the target; crops with nothing hidden among the others."""
    from lightning_modules.data2vec import Data2Vec

    size = SIZE | {"depth": 3, "init_values": 0.1}
    module = Data2Vec(
        ViT("vit_tiny_patch16_224", img_size=32, arguments=size),
        views=CropViews(size=32),
        top_blocks=2,
        momentum=0.9,
        clip=Clip(0.7, over="all"),
        **RATE,
    )
    return run(module, device, lambda step: packed(masks(step).numpy()[:1], 1, 64))


def data2vec2(device: torch.device) -> Outputs:
    return of_many_masks(device, cls_weight=0.5)


def data2vec2_published_sum(device: torch.device) -> Outputs:
    return of_many_masks(device, cls_weight=0.02, cls_rule="sum", teacher_shares=["patches"])


def of_many_masks(device: torch.device, **settings: Any) -> Outputs:
    """Three masks of each picture, before blocks that normalise behind."""
    from lightning_modules.data2vec2 import Data2Vec2

    backbone = ViT(
        "vit_tiny_patch16_224", img_size=32, fixed_positions=True, post_norm=True, arguments=SIZE | {"depth": 3}
    )
    module: Step = Data2Vec2(
        backbone,
        views=CropViews(size=32),
        num_masks=3,
        top_blocks=2,
        decoder_dim=16,
        decoder_depth=3,
        decoder_groups=4,
        decoder_noise=0.0,
        momentum=Linear(0.9, 0.99, until="10 steps", reaches_end=False),
        clip=Clip(9.0, over="all"),
        **settings,
        **RATE,
    )
    return run_masked(module, device, three_masks)


def three_masks(step: int) -> Masks:
    hidden = torch.cat([equal_masks(step + 7 * number) for number in range(3)])
    return Masks(hidden, ordered(hidden.numpy()), ordered(~hidden.numpy()))
