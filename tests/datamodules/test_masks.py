"""Masks come with the batches: drawn for the step, whoever draws them, and whole for ranks and slices."""

import numpy as np
import pytest
import torch

from datamodules.images import Images
from lightning_modules.dino import DINO
from ssd.backbones.vit import ViT
from ssd.batch import Masks
from ssd.errors import UserError
from ssd.masking.batch import MaskPlan
from ssd.masking.recipes import BlockMasks, RandomMasks
from ssd.views.recipes import DINOViews
from tests.data.files import encoded, scene, write

VIEWS = DINOViews(global_size=32, local_count=2, local_size=16)
BLOCKS, RANDOM = BlockMasks(even=True, smallest=2), RandomMasks(0.5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("pictures")
    for number in range(32):
        write(place / f"{number:02}.png", encoded(scene(20, 24, number)))
    return place


def data(folder, masks: dict[str, MaskPlan], rank: int = 0, world: int = 1, step: int = 0, **settings) -> Images:
    settings = {"batch_size": 8, "num_workers": 0} | settings
    images = Images(folder, **settings)
    images._place = lambda: (rank, world)
    images._steps_done = lambda: step
    images.prepare(VIEWS, masks)
    return images


def drawn(images: Images) -> list[dict[str, Masks]]:
    return [batch.masks for batch in images.train_dataloader()]


def equal(first: Masks, second: Masks) -> bool:
    return all(
        (a is None and b is None) or torch.equal(a, b)
        for a, b in zip(vars(first).values(), vars(second).values(), strict=True)
    )


PLANS = {"global": MaskPlan(BLOCKS, 2, (8, 8)), "local": MaskPlan(RANDOM, 2, (4, 4))}


def test_a_batch_has_the_masks_of_its_step(folder):
    batches = drawn(data(folder, PLANS, seed=3))
    assert len(batches) == 4
    for step, masks in enumerate(batches):
        assert equal(masks["global"], PLANS["global"].draw(8, 3, step, 0))
        assert equal(masks["local"], PLANS["local"].draw(8, 3, step, 1))
    assert len({masks["global"].boolean.numpy().tobytes() for masks in batches}) == 4
    # the second epoch goes on counting steps
    later = drawn(data(folder, PLANS, seed=3, step=5))
    assert len(later) == 3 and equal(later[0]["global"], PLANS["global"].draw(8, 3, 5, 0))


def test_a_resumed_run_and_workers_see_the_same_masks(folder):
    straight = drawn(data(folder, PLANS))
    resumed = drawn(data(folder, PLANS, step=2))
    with_workers = drawn(data(folder, PLANS, num_workers=2))
    for name in PLANS:
        assert all(equal(a[name], b[name]) for a, b in zip(straight[2:], resumed, strict=True))
        assert all(equal(a[name], b[name]) for a, b in zip(straight, with_workers, strict=True))


def test_ranks_divide_what_one_process_masks(folder):
    whole = drawn(data(folder, PLANS, batch_size=16))
    halves = [drawn(data(folder, PLANS, rank=rank, world=2)) for rank in range(2)]
    for step, masks in enumerate(whole):
        for name in PLANS:
            both = torch.cat([half[step][name].boolean for half in halves], dim=1)
            assert torch.equal(both, masks[name].boolean)


def test_slices_of_a_batch_keep_the_masked_places(folder):
    plans = {"global": MaskPlan(BLOCKS, 2, (8, 8), slices=4)}
    batch = next(iter(data(folder, plans, batch_size=8).train_dataloader()))
    for number in range(4):
        part = batch.part(number, 4).masks["global"]
        real = part.flat[0][part.weight[0] > 0]
        assert torch.equal(real, part.boolean.flatten().nonzero()[:, 0])
    assert batch.masks["global"].boolean.any()


def test_a_method_plans_masks_on_its_backbones_grid(folder):
    module = DINO(
        ViT("vit_tiny_patch16_224", arguments={"embed_dim": 32, "depth": 1, "num_heads": 2}),
        views=VIEWS,
        num_prototypes=16,
        micro_batches=2,
    )
    assert module.mask_plans() == {}
    module.masking = {"global": BLOCKS, "local": RANDOM}
    assert module.mask_plans() == {
        "global": MaskPlan(BLOCKS, 2, (2, 2), slices=2),
        "local": MaskPlan(RANDOM, 2, (1, 1), slices=2),
    }
    module.masking = {"other": RANDOM}
    with pytest.raises(UserError, match=r"'other'.*global, local"):
        module.mask_plans()


def test_masks_are_spread_over_the_whole_step(folder):
    """Half of the crops of the step are masked, exactly, and each slice has its share."""
    masks = data(folder, PLANS, batch_size=16)
    boolean = next(iter(masks.train_dataloader())).masks["global"].boolean
    assert boolean.any(2).sum() == 16
    assert np.ptp([half.any(2).sum().item() for half in boolean.chunk(2, dim=1)]) <= 1
