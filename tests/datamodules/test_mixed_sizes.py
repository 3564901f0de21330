"""Views whose size changes from step to step: one size a step for all, drawn for the step and nothing else."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from datamodules.images import Images
from lightning_modules.dinov3 import DINOv3
from ssd.backbones.vit import ViT
from ssd.errors import UserError
from ssd.masking.recipes import BlockMasks
from ssd.record import build, describe
from ssd.views.recipes import MixedDINOViews
from tests.contract import start
from tests.data.files import encoded, scene, write

SIZES = ((32, 16, 0.75), (48, 32, 0.25))
VIEWS = MixedDINOViews(sizes=SIZES, global_size=32, local_size=16, local_count=2, gram_size=64, blur_prob=(0, 0, 0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("pictures")
    for number in range(48):
        write(place / f"{number:02}.png", encoded(scene(40, 44, number)))
    return place


def network() -> DINOv3:
    torch.manual_seed(0)
    arguments = {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
    return DINOv3(
        ViT("vit_tiny_patch16_224", img_size=32, arguments=arguments),
        views=VIEWS,
        masks=BlockMasks(smallest=2, largest=0.5, even=True, filled=True),
        num_prototypes=16,
        num_patch_prototypes=16,
        head_hidden_dim=16,
        head_bottleneck_dim=8,
        patch_head_bottleneck_dim=8,
        koleo_group=2,
        lr=1e-3,
        lr_rule="none",
        steps=12,
    )


def batches(folder, module, step: int = 0, workers: int = 0, rank: int = 0, world: int = 1, size: int = 4) -> list:
    images = Images(folder, batch_size=size, num_workers=workers)
    images._place = lambda: (rank, world)
    images._steps_done = lambda: step
    images.prepare(module.views, module.mask_plans())
    return list(images.train_dataloader())


def sides(batch) -> tuple[int, ...]:
    return tuple(batch.views[kind].shape[-1] for kind in ("global", "local", "gram"))


def test_sizes_come_as_often_as_they_are_asked_for():
    drawn = [VIEWS.at(3, step).global_size for step in range(4000)]
    assert np.mean(np.array(drawn) == 48) == pytest.approx(0.25, abs=0.02)
    assert drawn != [VIEWS.at(4, step).global_size for step in range(4000)]
    published = MixedDINOViews()
    of = [(views.global_size, views.local_size) for views in map(lambda step: published.at(0, step), range(4000))]
    assert set(of) == {(512, 112), (768, 112), (768, 168), (768, 224), (768, 336)}
    assert np.mean([local == 336 for _, local in of]) == pytest.approx(0.05, abs=0.012)


def test_all_but_sizes_is_as_it_was_and_gram_views_keep_their_proportion():
    views = VIEWS.at(0, 0)
    assert {views.at(0, step) for step in range(5)} == {views}, "of one step it is one size"
    for of_a_step, (large, small, _) in zip(VIEWS.all_of_a_run(), SIZES, strict=True):
        assert (of_a_step.global_size, of_a_step.local_size, of_a_step.gram_size) == (large, small, 2 * large)
        assert of_a_step.blur_prob == (0, 0, 0) and of_a_step.local_count == 2
    assert VIEWS.evaluation_size == 32
    assert build(describe(VIEWS)) == VIEWS


def test_every_sample_of_a_step_has_its_size_with_workers_ranks_and_after_a_resume(folder):
    module = network()
    straight = batches(folder, module)
    expected = [VIEWS.at(0, step) for step in range(12)]
    assert [sides(batch) for batch in straight] == [(v.global_size, v.local_size, v.gram_size) for v in expected]
    assert len({sides(batch) for batch in straight}) == 2
    for others, from_step in ((batches(folder, module, workers=2), 0), (batches(folder, module, step=7), 7)):
        for one, other in zip(straight[from_step:], others, strict=True):
            assert all(torch.equal(one.views[kind], other.views[kind]) for kind in one.views)
            assert torch.equal(one.masks["global"].boolean, other.masks["global"].boolean)
    whole = batches(folder, module, size=8)
    halves = [batches(folder, module, rank=rank, world=2) for rank in range(2)]
    for step, batch in enumerate(whole):
        both = torch.cat([half[step].views["global"] for half in halves], dim=1)
        assert torch.equal(both, batch.views["global"])


def test_masks_lie_on_the_grid_of_the_step_and_the_method_trains(folder):
    module = network()
    optimizers = start(module)
    weights = [parameter.clone() for parameter in module.student.parameters()]
    for batch in batches(folder, module):
        tokens = (sides(batch)[0] // 8) ** 2
        boolean = batch.masks["global"].boolean
        assert boolean.shape == (2, 4, tokens) and boolean.any(2).sum() == 4
        assert not module.take_step(batch, optimizers).not_finite
    assert all((old != new).any() for old, new in zip(weights, module.student.parameters(), strict=True))


@pytest.mark.parametrize(
    ("sizes", "said"),
    [([], "Give one row"), ([[32, 16]], "Give one row"), ([[32, 16, 0]], "above 0"), ([[32.5, 16, 1]], "32.5")],
)
def test_sizes_that_cannot_be_are_refused(sizes, said):
    with pytest.raises(UserError, match=said):
        replace(VIEWS, sizes=sizes)
