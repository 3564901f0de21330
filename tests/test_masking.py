"""Mask samplers: counts, shapes, published statistics, and that a rank or a slice sees its part of the whole."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from ssd.errors import UserError
from ssd.frames import Frames
from ssd.masking.batch import MaskPlan, masks_for
from ssd.masking.counts import SPREAD
from ssd.masking.recipes import (
    BlockMasks,
    DisjointMasks,
    InverseBlockMasks,
    InverseSquareMasks,
    RandomMasks,
    SpanMasks,
)
from ssd.masking.scattered import ScatteredMasks
from ssd.masking.shapes import draw_blocks, lowest_of_each, visible_blocks
from ssd.native import masks as native

IBOT = BlockMasks()
DINOV2 = BlockMasks(smallest=4, largest=0.5, even=True)
CYCLIC = InverseBlockMasks(ratio=(0.1, 0.65), share=0.5, aspect=(0.3, 1 / 0.3))
PICTURES = {
    "random": RandomMasks(0.75),
    "cells": RandomMasks(0.5, cell=2),
    "disjoint": DisjointMasks(0.6),
    "ibot": IBOT,
    "scattered": ScatteredMasks(),
    "dinov2": DINOV2,
    "capi": InverseBlockMasks(),
    "cyclic": CYCLIC,
    "data2vec": InverseSquareMasks(),
}


@pytest.mark.parametrize("name", PICTURES)
def test_masks_are_a_function_of_their_place(name):
    recipe = PICTURES[name]
    first = recipe.draw(2, 16, (14, 14), 0, 5)
    assert first.shape == (2, 16, 196) and first.dtype == bool
    assert (first == recipe.draw(2, 16, (14, 14), 0, 5)).all()
    for place in ((1, 5), (0, 6)):
        assert (first != recipe.draw(2, 16, (14, 14), *place)).any()
    rows = first.reshape(32, -1)
    assert len({row.tobytes() for row in rows if row.any()}) == rows.any(1).sum(), "every crop has its own"


@pytest.mark.parametrize("name", PICTURES)
def test_ranks_and_slices_see_their_part_of_the_step(name):
    recipe = PICTURES[name]
    whole = masks_for(recipe, 2, 32, (14, 14), 0, 3)
    for world, slices in ((2, 1), (1, 4), (2, 2)):
        batch = 32 // world
        parts = [masks_for(recipe, 2, batch, (14, 14), 0, 3, rank=r, world=world, slices=slices) for r in range(world)]
        cut = [part.part(number, slices) for part in parts for number in range(slices)]
        assert torch.equal(torch.cat([part.boolean for part in cut], 1), whole.boolean)
        if recipe.exact:
            assert torch.equal(torch.cat([part.masked for part in cut], 1), whole.masked)
            assert torch.equal(torch.cat([part.visible for part in cut], 1), whole.visible)
        else:
            assert len({part.flat.shape for part in cut}) == 1, "a slice's shape says nothing of its content"


@pytest.mark.parametrize("name", [name for name in PICTURES if PICTURES[name].exact])
def test_indices_are_the_sorted_places(name):
    masks = masks_for(PICTURES[name], 2, 4, (14, 14), 0, 1)
    tokens = torch.arange(196).expand(2, 4, 196)
    assert torch.equal(tokens[masks.boolean].view(2, 4, -1), masks.masked)
    assert torch.equal(tokens[~masks.boolean].view(2, 4, -1), masks.visible)


@pytest.mark.parametrize("recipe", [IBOT, DINOV2, CYCLIC])
@pytest.mark.parametrize("batch, slices", [(32, 1), (32, 4), (12, 3), (5, 1), (9, 3)])
def test_flat_places_are_the_masked_ones_and_each_masked_crop_weighs_one(recipe, batch, slices):
    for step in range(3):
        masks = masks_for(recipe, 2, batch, (14, 14), 0, step, slices=slices)
        for number in range(slices):
            part = masks.part(number, slices)
            flat, weight = part.flat[0][part.weight[0] > 0], part.weight[0][part.weight[0] > 0]
            assert torch.equal(part.boolean.flatten().nonzero()[:, 0], flat)
            crops = part.boolean.flatten(0, 1).any(1).sum()
            assert float(weight.sum()) == pytest.approx(float(crops), abs=1e-4)


def test_what_pads_flat_places_is_masked_too():
    masks = masks_for(IBOT, 2, 12, (14, 14), 0, 0, slices=3)
    assert (masks.weight == 0).any(), "there is padding"
    for number in range(3):
        part = masks.part(number, 3)
        assert part.boolean.flatten()[part.flat[0]].all()


@pytest.mark.parametrize("recipe", [DINOV2, CYCLIC])
@pytest.mark.parametrize("world, slices", [(1, 1), (2, 2), (1, 8)])
def test_an_even_recipe_has_one_shape_for_all_steps_and_little_padding(recipe, world, slices):
    drawn = [masks_for(recipe, 2, 64, (14, 14), 0, step, world=world, slices=slices) for step in range(20)]
    assert len({masks.flat.shape for masks in drawn}) == 1
    used = np.mean([float((masks.weight > 0).float().mean()) for masks in drawn])
    assert used > 0.85


def test_half_of_the_crops_are_masked_by_shares_that_fill_the_range():
    counts = DINOV2.draw(2, 64, (14, 14), 0, 0).sum(2)
    assert (counts > 0).sum() == 64
    masked = np.sort(counts[counts > 0]) / 196
    assert np.abs(masked - np.linspace(0.1, 0.5, 64)).max() < 0.03
    # the same work in every eighth of the batch
    by_group = counts.sum(0).reshape(-1, SPREAD)
    assert ((counts > 0).sum(0).reshape(-1, SPREAD).sum(1) == SPREAD).all()
    assert by_group.sum(1).std() / by_group.sum(1).mean() < 0.1


def test_statistics_of_dinov2_masks():
    """DINOv2: equal to the request in 93 % of draws, never more than 3 short; .298 of the patches on average."""
    rng = np.random.default_rng(0)
    wanted = np.floor(rng.uniform(0.1, 0.5, 4000) * 196)
    counts = draw_blocks(wanted, (14, 14), 4, 98, 0.3, 10, keys_of(wanted)).sum((1, 2))
    short = wanted - counts
    assert short.min() >= 0 and short.max() <= 4
    assert (short == 0).mean() == pytest.approx(0.93, abs=0.02)
    assert (counts / 196).mean() == pytest.approx(0.298, abs=0.005)


def test_scattered_masks_have_the_whole_part_of_their_share():
    """Of 196 tokens a share of .3 is 58; half of the crops are whole, the others .1 to .5, .3 on average."""
    exact = ScatteredMasks(ratio=(0.3, 0.3), share=1.0).draw(2, 8, (14, 14), 0, 0)
    assert (exact.sum(2) == 58).all()
    counts = ScatteredMasks().draw(2, 2000, (14, 14), 0, 0).sum(2).reshape(-1)
    masked = counts[counts > 0]
    # three deviations of 4000 crops: .5 / sqrt(4000) and .4 / sqrt(12 * 2000)
    assert len(masked) / 4000 == pytest.approx(0.5, abs=0.024)
    assert masked.mean() / 196 == pytest.approx(0.3 - 0.5 / 196, abs=0.008)
    assert masked.min() >= 19 and masked.max() <= 98
    even = ScatteredMasks(even=True).draw(2, 32, (14, 14), 0, 0).sum(2)
    assert (even > 0).sum() == 32


def test_scattered_tokens_lie_anywhere():
    share = ScatteredMasks(ratio=(0.5, 0.5), share=1.0).draw(1, 2000, (4, 4), 0, 0).mean((0, 1))
    assert share == pytest.approx(np.full(16, 0.5), abs=4 * 0.5 / math.sqrt(2000))


def test_none_of_a_row_is_none():
    noise = np.random.default_rng(0).random((3, 5))
    assert (lowest_of_each(noise, np.array([0, 2, 5])).sum(1) == [0, 2, 5]).all()


def test_statistics_of_ibot_masks():
    """iBOT: 1.2 patches short on average, more than one in 42 % of the masked crops, mean ratio .296, half whole."""
    counts, wanted = [], []
    rng = np.random.default_rng(1)
    wanted = rng.uniform(0.1, 0.5, 4000) * 196
    counts = draw_blocks(wanted, (14, 14), 16, 196, 0.3, 10, keys_of(wanted)).sum((1, 2))
    short = wanted - counts
    assert short.min() >= 0
    assert short.mean() == pytest.approx(1.2, abs=0.15)
    assert (short > 1).mean() == pytest.approx(0.42, abs=0.04)
    assert (counts / 196).mean() == pytest.approx(0.296, abs=0.005)
    drawn = IBOT.draw(2, 1000, (14, 14), 0, 0)
    assert drawn.any(2).mean() == pytest.approx(0.5, abs=0.04)


def keys_of(wanted):
    return np.random.default_rng(7).integers(0, 2**64, len(wanted), dtype=np.uint64)


def one_by_one(wanted, grid, smallest, largest, aspect, tries, rng):
    """The algorithm as its paper states it, a crop and a rectangle at a time."""
    height, width = grid
    masks = np.zeros((len(wanted), height, width), dtype=bool)
    for mask, most in zip(masks, wanted, strict=True):
        while mask.sum() < most:
            left = min(most - mask.sum(), largest)
            for _ in range(tries):
                area = smallest + rng.random() * (left - smallest)  # also where less is left than the smallest
                ratio = math.exp(rng.uniform(math.log(aspect), math.log(1 / aspect)))
                high, wide = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
                if high >= height or wide >= width:
                    continue
                top, start = rng.integers(0, height - high + 1), rng.integers(0, width - wide + 1)
                fresh = high * wide - mask[top : top + high, start : start + wide].sum()
                if 0 < fresh <= left:
                    mask[top : top + high, start : start + wide] = True
                    break
            else:
                break
    return masks


@pytest.mark.parametrize("smallest, largest", [(16, 196), (4, 98)])
def test_blocks_are_distributed_as_those_drawn_one_by_one(smallest, largest):
    def edges(masks):
        return (masks[:, 1:] != masks[:, :-1]).sum((1, 2)) + (masks[:, :, 1:] != masks[:, :, :-1]).sum((1, 2))

    rng = np.random.default_rng(2)
    wanted = rng.uniform(0.1, 0.5, 1500) * 196
    ours = draw_blocks(wanted, (14, 14), smallest, largest, 0.3, 10, keys_of(wanted))
    theirs = one_by_one(wanted, (14, 14), smallest, largest, 0.3, 10, rng)
    for statistic in (lambda m: m.sum((1, 2)), edges, lambda m: m.any(1).sum(1), lambda m: m.any(2).sum(1)):
        a, b = statistic(ours), statistic(theirs)
        assert abs(a.mean() - b.mean()) < 4 * math.sqrt((a.var() + b.var()) / len(a))
    # where a mask lies: every place as often
    assert np.abs(ours.mean(0) - theirs.mean(0)).max() < 0.08


@pytest.mark.parametrize("grid", [(14, 14), (8, 12), (7, 3)])
@pytest.mark.parametrize("roll", [False, True])
def test_an_inverse_block_shows_exactly_as_many_tokens_as_asked(grid, roll):
    height, width = grid
    visible = np.repeat(np.arange(height * width + 1), 5)
    shown = visible_blocks(visible, grid, (0.3, 1 / 0.3), roll, np.random.default_rng(0))
    assert (shown.sum((1, 2)) == visible).all()


def test_the_visible_tokens_are_a_rectangle_but_for_its_last_row():
    shown = visible_blocks(np.full(300, 90), (16, 16), (0.5, 2.0), False, np.random.default_rng(0))
    for block in shown:
        rows, columns = np.flatnonzero(block.any(1)), np.flatnonzero(block.any(0))
        inside = block[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        assert inside[:-1].all()
        assert (inside[-1][:-1] >= inside[-1][1:]).all()
        assert 0.4 < inside.shape[0] / inside.shape[1] < 2.5


def test_only_rolled_blocks_show_every_place_alike():
    rolled = InverseBlockMasks().draw(1, 4000, (16, 16), 0, 0)[0]
    assert (rolled.sum(1) == 166).all(), "published: int(.65 256)"
    share = rolled.mean(0)
    assert np.abs(share - 166 / 256).max() < 5 * math.sqrt(0.65 * 0.35 / 4000)
    still = InverseBlockMasks(roll=False).draw(1, 2000, (16, 16), 0, 0)[0].mean(0).reshape(16, 16)
    assert still[8, 8] < 0.3 < 0.9 < still[0, 0]


def test_cyclic_masks_have_exact_counts():
    counts = CYCLIC.draw(2, 64, (16, 16), 0, 0).sum(2)
    masked = np.sort(counts[counts > 0])
    assert len(masked) == 64
    edges = np.floor(np.linspace(0.1, 0.65, 65) * 256)
    assert (masked >= edges[:-1] - 1).all() and (masked <= edges[1:]).all()


@pytest.mark.parametrize(
    "ratio, cell, visible, union, both",
    [
        (0.60, 1, 78, 196, 40),
        (0.75, 1, 49, 196, 98),
        (0.90, 1, 19, 196, 158),
        (0.40, 1, 117, 157, 1),
        (0.60, 2, 76, 196, 44),
        (0.75, 2, 48, 196, 100),
    ],
)
def test_disjoint_masks_have_the_counts_of_the_released_functions(ratio, cell, visible, union, both):
    masks = DisjointMasks(ratio, 1.0, cell).draw(2, 6, (14, 14), 0, 0)
    assert ((~masks).sum(2) == visible).all()
    assert ((masks[0] | masks[1]).sum(1) == union).all()
    assert ((masks[0] & masks[1]).sum(1) == both).all()


def test_disjoint_masks_follow_the_card_for_part_of_the_tokens():
    masks = DisjointMasks(0.6, 0.8).draw(2, 6, (14, 14), 0, 0)
    fresh = int(0.2 * 196)
    assert ((masks[0] | masks[1]).sum(1) == 118 + fresh).all()
    assert ((masks[0] & masks[1]).sum(1) == 118 - fresh).all()


@pytest.mark.parametrize(
    "keep, adjust, grid, kept", [(0.2, 0.07, 14, 39), (0.25, 0.1, 14, 49), (0.25, 0.1, 16, 64), (0.2, 0.07, 8, 12)]
)
def test_inverse_squares_keep_what_the_card_says(keep, adjust, grid, kept):
    masks = InverseSquareMasks(keep, adjust=adjust).draw(3, 20, (grid, grid), 0, 0)
    assert ((~masks).sum(2) == kept).all()


def test_masks_of_one_view_are_as_many_as_asked_for_all_views_under_their_first_then_under_their_second():
    recipe = InverseSquareMasks()
    one = MaskPlan(recipe, 1, (8, 8), masks_per_view=16).draw(4, 0, 3)
    assert one.boolean.shape == (16, 4, 64) and one.visible.shape == (16, 4, 12) and one.masked.shape == (16, 4, 52)
    two = MaskPlan(recipe, 2, (8, 8), masks_per_view=3).draw(4, 0, 3)
    assert two.boolean.shape == (6, 4, 64)
    assert len({row.tobytes() for row in one.boolean.numpy().reshape(64, -1)}) > 60, "each is drawn for itself"
    part = one.part(1, 2)
    assert torch.equal(part.visible, one.visible[:, 2:]) and torch.equal(part.boolean, one.boolean[:, 2:])


def test_a_single_square_is_there_whole():
    """8 x 8 grid: one centre, 9 tokens of the square at most, the rest single ones."""
    masks = InverseSquareMasks().draw(1, 200, (8, 8), 0, 0)[0].reshape(-1, 8, 8)
    sums = (~masks).cumsum(1).cumsum(2)
    sums = np.pad(sums, ((0, 0), (1, 0), (1, 0)))
    squares = sums[:, 3:, 3:] - sums[:, :-3, 3:] - sums[:, 3:, :-3] + sums[:, :-3, :-3]
    whole = (squares == 9).any((1, 2))
    assert whole.mean() > 0.5, "at the border a square is cut"


def test_tubes_hide_the_same_places_in_every_slot():
    """DISCOVR: 44 of 49 hidden, the same in all 32 slots, 160 of 1568 tokens seen."""
    masks = RandomMasks(0.9, tube=True).draw(4, 3, (32, 7, 7), 0, 0).reshape(4, 3, 32, 49)
    assert (masks == masks[:, :, :1]).all()
    assert ((~masks).sum((2, 3)) == 160).all()


@pytest.mark.parametrize("ratio, share", [(0.8, 0.568), (0.65, 0.490)])
def test_spans_hide_what_their_overlap_leaves(ratio, share):
    """DinoSR: T 999, span 10; before rows are made equal."""
    drawn = np.stack([SpanMasks(ratio).draw(1, 1, (999,), 0, step)[0, 0] for step in range(600)])
    assert drawn.mean() == pytest.approx(share, abs=0.01)
    # runs are whole spans
    for row in drawn[:50]:
        steps = np.flatnonzero(np.diff(np.pad(row, 1).astype(int)))
        assert (steps[1::2] - steps[::2]).min() >= 10


def test_spans_of_a_batch_hide_equally_many_and_reach_the_end():
    masks = SpanMasks().draw(1, 500, (100,), 0, 0)[0]
    assert len(set(masks.sum(1))) == 1
    assert masks[:, -2].any(), "the last start is T - 11, so the last frame but one is the last that can be hidden"
    assert not masks[:, -1].any()


@pytest.mark.parametrize(
    "make, said",
    [
        (lambda: RandomMasks(1.2), "share"),
        (lambda: RandomMasks(0.5, cell=3).draw(1, 1, (14, 14), 0), "do not divide"),
        (lambda: DisjointMasks(0.6, 0.5), "predicted"),
        (lambda: DisjointMasks().draw(1, 1, (14, 14), 0), "pairs"),
        (lambda: BlockMasks(ratio=(0.5, 0.1)), "lowest and the highest"),
        (lambda: BlockMasks().draw(1, 1, (4, 14, 14), 0), "for pictures"),
        (lambda: InverseBlockMasks(0.6, share=0.5), "range of ratios"),
        (lambda: SpanMasks().draw(1, 1, (10,), 0), "do not fit"),
        (lambda: SpanMasks().draw(1, 1, (4, 4), 0), "sequences"),
        (lambda: masks_for(IBOT, 2, 10, (14, 14), 0, slices=3), "micro_batches"),
    ],
)
def test_mistakes_are_said(make, said):
    with pytest.raises(UserError, match=said):
        make()


@pytest.mark.parametrize("grid", [(14, 14), (64, 33), (7, 3), (2, 2)])
@pytest.mark.parametrize("smallest, largest", [(16, 196), (4, 98), (1, 1)])
def test_compiled_blocks_are_the_same_blocks(grid, smallest, largest, monkeypatch):
    if not native.available():
        pytest.skip("no C compiler is at hand, so that NumPy draws the masks")
    rng = np.random.default_rng(1)
    wanted = rng.uniform(0.0, 1.0, 500) * math.prod(grid) * (rng.random(500) > 0.2)
    arguments = (wanted, grid, smallest, largest, 0.3, 10, keys_of(wanted))
    compiled = draw_blocks(*arguments)
    monkeypatch.setattr(native, "available", lambda: False)
    assert (compiled == draw_blocks(*arguments)).all()
    assert compiled.any() or max(grid) == 2


def test_filled_blocks_mask_the_same_number_in_every_step():
    """DINOv3: 16 of 32 crops of 16 x 16 patches are asked for int(256 p) of evenly spread shares, and get them."""
    recipe = BlockMasks(smallest=4, largest=0.5, even=True, filled=True)
    expected = [32, 38, 44, 51, 57, 64, 70, 76, 83, 89, 96, 102, 108, 115, 121, 128]
    blocks = BlockMasks(smallest=4, largest=0.5, even=True)
    for seed in range(20):
        counts = recipe.draw(2, 16, (16, 16), 0, seed).sum(2).ravel()
        assert sorted(counts[counts > 0]) == expected
        assert blocks.draw(2, 16, (16, 16), 0, seed).sum() < 1274
    masks = masks_for(recipe, 2, 16, (16, 16), 0, 0)
    assert (masks.weight > 0).all(), "nothing is padded"
    with pytest.raises(UserError, match="filled: true is for masks whose shares are spread evenly"):
        BlockMasks(filled=True)


@pytest.mark.parametrize(("keep", "tube"), [(4, False), (10, False), (3, True)])
def test_a_number_of_tokens_to_keep_is_kept_exactly(keep, tube):
    """DMAE's 4 and 10 of 196, where a share of 98 or 95 % would leave 3 or 9."""
    grid = (2, 7, 7) if tube else (14, 14)
    visible = (~RandomMasks(keep=keep, tube=tube).draw(1, 16, grid, 0, 0)).sum(-1)
    assert (visible == keep * (2 if tube else 1)).all()
    with pytest.raises(UserError, match="hides none"):
        RandomMasks(keep=196).draw(1, 1, (14, 14), 0, 0)
    with pytest.raises(UserError, match="Keep 1 token"):
        RandomMasks(keep=0)


# ---------------------------------------------------------------- sounds of their own lengths

PLAN = MaskPlan(SpanMasks(0.8, 3), 1, (49,), frames=Frames(((10, 5), (4, 4))), equal_lengths=False)
SAMPLES = np.array([[400, 1000, 150, 700]])


def test_a_sound_is_masked_alike_alone_and_beside_longer_ones():
    together = PLAN.draw_padded(SAMPLES, 1000, 0, 7, 0)
    for row, samples in enumerate(SAMPLES[0]):
        frames = PLAN.frames.count(int(samples))
        longer = PLAN.draw_padded(SAMPLES[:, : row + 1], 5000, 0, 7, 0).boolean[0, row]
        assert torch.equal(together.boolean[0, row, :frames], longer[:frames])
        assert not together.boolean[0, row, frames:].any() and not longer[frames:].any()


def test_each_rank_and_slice_masks_what_one_process_would():
    whole = PLAN.draw_padded(SAMPLES, 1000, 0, 7, 0).boolean
    for rank in range(2):
        mine = slice(2 * rank, 2 * rank + 2)
        part = replace(PLAN, slices=2).draw_padded(SAMPLES[:, mine], 1000, 0, 7, 0, rank=rank, world=2)
        assert torch.equal(part.boolean, whole[:, mine])
        places, real = part.places()
        hidden = torch.zeros(part.boolean.numel(), dtype=torch.bool)
        hidden[places[real]] = True
        assert torch.equal(hidden, part.boolean.flatten()) and real.sum() == hidden.sum()


def test_each_step_and_each_sound_draws_anew():
    lengths = np.full((1, 4), 1000)
    first, second = (PLAN.draw_padded(lengths, 1000, 0, step, 0).boolean[0] for step in range(2))
    assert not torch.equal(first, second)
    assert len({tuple(row.tolist()) for row in first}) == 4


@pytest.mark.parametrize(("ratio", "share"), [(0.8, 0.568), (0.65, 0.490)])
def test_spans_of_their_own_hide_the_published_share(ratio, share):
    keys = np.arange(600, dtype=np.uint64)
    masks = SpanMasks(ratio).draw_each(np.full(600, 999), 1200, keys)
    assert masks[:, :999].mean() == pytest.approx(share, abs=0.02) and not masks[:, 999:].any()


def test_some_frames_of_a_short_sound_are_hidden_and_never_all():
    lengths = np.tile(np.arange(1, 13), 50)
    hidden = SpanMasks(0.8, 10).draw_each(lengths, 20, np.arange(600, dtype=np.uint64)).sum(1)
    assert (hidden < lengths).all() and (hidden[lengths > 1] > 0).all() and not hidden[lengths == 1].any()


def test_masks_of_pictures_are_none_of_sounds():
    with pytest.raises(UserError, match="Use SpanMasks"):
        replace(PLAN, recipe=RandomMasks(0.5)).draw_padded(SAMPLES, 1000, 0, 0, 0)
    with pytest.raises(UserError, match="crop_to_shortest"):
        replace(PLAN, grid=(49, 4)).draw_padded(SAMPLES, 1000, 0, 0, 0)
    with pytest.raises(UserError, match="shorter than a token"):
        PLAN.draw_padded(np.array([[400, 20]]), 400, 0, 0, 0)


def test_places_of_equal_counts_are_those_of_the_boolean_form():
    masks = masks_for(RandomMasks(0.5), 2, 3, (8,), 0, 0)
    places, real = masks.places()
    assert real.all() and torch.equal(places, masks.boolean.flatten().nonzero()[:, 0])
