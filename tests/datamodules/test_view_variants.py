"""Fixed looks: every M-th epoch shows what it showed before, each sample by itself."""

import pytest
import torch

from datamodules.images import Images
from ssd.batch import Batch
from ssd.data.sampler import drawn_for
from ssd.errors import UserError
from ssd.masking.batch import MaskPlan
from ssd.masking.recipes import BlockMasks, DisjointMasks, RandomMasks
from ssd.record import build, describe
from ssd.views.recipes import DINOViews, MixedDINOViews
from tests.data.files import encoded, scene, write

VIEWS = DINOViews(global_size=32, local_count=1, local_size=16)
RANDOM = RandomMasks(0.5)
EACH, STEP = MaskPlan(RANDOM, 2, (8, 8), of_looks=True), MaskPlan(RANDOM, 1, (4, 4))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("pictures")
    for number in range(12):
        write(place / f"{number:02}.png", encoded(scene(40, 48, number)))
    return place


def epoch(folder, number: int, *, rank: int = 0, world: int = 1, masks=None, **settings) -> list[Batch]:
    images = Images(folder, **{"batch_size": 4 // world, "num_workers": 0, "seed": 5} | settings)
    images._place = lambda: (rank, world)
    images._steps_done = lambda: 3 * number
    images.prepare(VIEWS, masks or {})
    return list(images.train_dataloader())


def by_sample(batches: list[Batch]) -> dict[int, dict[str, torch.Tensor]]:
    found = {}
    for batch in batches:
        for row, index in enumerate(batch.index.tolist()):
            masks = {f"{kind} mask": masks.boolean[:, row] for kind, masks in batch.masks.items()}
            found[index] = {kind: views[:, row] for kind, views in batch.views.items()} | masks
    return found


def same(first, second, kinds=("global", "local")) -> bool:
    return all(torch.equal(first[index][kind], second[index][kind]) for index in first for kind in kinds)


def test_epochs_begin_again_after_as_many_as_there_are_looks(folder):
    epochs = [by_sample(epoch(folder, number, view_variants=2)) for number in range(4)]
    assert same(epochs[0], epochs[2]) and same(epochs[1], epochs[3])
    assert not same(epochs[0], epochs[1])
    orders = [[batch.index.tolist() for batch in epoch(folder, number, view_variants=2)] for number in (0, 2)]
    assert orders[0] != orders[1], "the order is another in each epoch"


def test_the_looks_are_those_of_the_first_epochs(folder):
    for number in range(2):
        assert same(by_sample(epoch(folder, number)), by_sample(epoch(folder, number, view_variants=2)))


def test_a_batch_says_which_looks_it_shows_and_says_nothing_without_fixed_ones(folder):
    assert [batch.variant.tolist() for batch in epoch(folder, 5, view_variants=3)] == [[2] * 4] * 3
    assert all(batch.variant is None for batch in epoch(folder, 5))


def test_a_sample_that_is_drawn_again_in_an_epoch_shows_its_next_look():
    assert [drawn_for(place, 3) for place in ((4, 7), (4, 7, 1), (4, 7, 2))] == [(1, 7), (2, 7), (0, 7)]
    assert drawn_for((4, 7, 1), None) == (4, 7, 1)


def test_workers_and_processes_change_no_look(folder):
    whole = by_sample(epoch(folder, 1, view_variants=2))
    assert same(whole, by_sample(epoch(folder, 1, view_variants=2, num_workers=2)))
    ranks = [by_sample(epoch(folder, 1, view_variants=2, rank=rank, world=2)) for rank in range(2)]
    assert same(ranks[0] | ranks[1], whole)


def test_masks_of_looks_come_again_with_them_and_others_are_drawn_for_the_step(folder):
    masks = {"global": EACH, "local": STEP}
    epochs = [by_sample(epoch(folder, number, view_variants=2, masks=masks)) for number in range(3)]
    assert same(epochs[0], epochs[2], ["global mask"])
    assert not same(epochs[0], epochs[1], ["global mask"])
    assert not same(epochs[0], epochs[2], ["local mask"])
    ranks = [by_sample(epoch(folder, 0, view_variants=2, masks=masks, rank=rank, world=2)) for rank in range(2)]
    assert same(ranks[0] | ranks[1], epochs[0], ["global mask", "local mask"])


def test_without_fixed_looks_masks_are_those_of_the_step(folder):
    batches = epoch(folder, 0, masks={"global": EACH})
    for step, batch in enumerate(batches):
        assert torch.equal(batch.masks["global"].boolean, EACH.draw(4, 5, step, 0).boolean)


def test_masks_of_a_look_hide_as_many_tokens_and_list_them():
    drawn = EACH.draw_each([(5, 0, index, 0) for index in range(3)])
    assert drawn.boolean.sum(-1).unique().tolist() == [32]
    assert torch.equal(torch.zeros(2, 3, 64).scatter(2, drawn.masked, 1.0).bool(), drawn.boolean)
    assert torch.equal(torch.ones(2, 3, 64).scatter(2, drawn.visible, 0.0).bool(), drawn.boolean)
    alone = EACH.draw_each([(5, 0, 2, 0)])
    assert torch.equal(drawn.boolean[:, 2], alone.boolean[:, 0]), "a function of its own place"
    assert DisjointMasks().exact
    with pytest.raises(UserError, match="Use RandomMasks"):
        MaskPlan(BlockMasks(), 1, (8, 8), of_looks=True).draw_each([(0, 0, 0, 0)])


@pytest.mark.parametrize("workers", [0, 2])
def test_what_stands_in_for_a_broken_picture_is_shown_in_a_look_of_its_own(folder, tmp_path, workers):
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(b"no picture" if file.name == "03.png" else file.read_bytes())
    boxes = {}
    for batch in epoch(folder, 0, view_variants=1):
        boxes |= {index: batch.boxes["global"][:, row] for row, index in enumerate(batch.index.tolist())}
    for number in range(3):
        batches = epoch(tmp_path, number, view_variants=1, max_broken_share=0.2, num_workers=workers)
        seen = [index for batch in batches for index in batch.index.tolist()]
        assert 3 not in seen and len(seen) == 12 and len(set(seen)) == 11
        for batch in batches:
            for row, index in enumerate(batch.index.tolist()):
                assert torch.equal(batch.boxes["global"][:, row], boxes[index])


def test_what_cannot_be_is_refused_and_a_checkpoint_knows_the_number(folder):
    with pytest.raises(UserError, match="view_variants is 0"):
        Images(folder, view_variants=0)
    data = Images(folder, view_variants=2, num_workers=0)
    with pytest.raises(UserError, match="another size from step to step"):
        data.prepare(MixedDINOViews(sizes=((32, 16, 0.5), (48, 16, 0.5)), global_size=32, local_size=16))
    data.prepare(VIEWS)
    assert data.describe_state()["view_variants"] == 2
    assert build(describe(data)).view_variants == 2
    plain = Images(folder, num_workers=0)
    plain.prepare(VIEWS)
    assert "view_variants" not in plain.describe_state()
