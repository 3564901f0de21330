"""Drawn crops and colours follow the published distributions and depend on nothing but their place."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis.strategies import integers
from scipy import stats
from torchvision.transforms import RandomResizedCrop

from ssd.views.parameters import NEUTRAL, ORDER, WARP, Box, Colour, draw, draw_many
from ssd.views.recipes import DINOViews, PlainViews, views_named
from ssd.views.view import PictureViews, View

PLACES = 2000
CHANCE = 1e-3  # a fair draw fails one such test in a thousand; the seeds are fixed
JITTER = {
    Colour.BRIGHTNESS: (0.6, 1.4),
    Colour.CONTRAST: (0.6, 1.4),
    Colour.SATURATION: (0.8, 1.2),
    Colour.HUE: (-0.1, 0.1),
}


@pytest.fixture(scope="module")
def drawn():
    """Boxes and photometry of the published recipe on a 375x500 picture: kind -> (PLACES, V, columns)"""
    samples = [draw(DINOViews(), 375, 500, 7, 0, index) for index in range(PLACES)]
    return tuple(
        {kind: np.stack([sample[part][kind] for sample in samples]) for kind in samples[0][part]} for part in (0, 1)
    )


def agrees_with_uniform(values: np.ndarray, low: float, high: float) -> bool:
    assert low <= values.min() and values.max() <= high
    return stats.kstest(values, stats.uniform(low, high - low).cdf).pvalue > CHANCE


def agrees_with_probability(happened: np.ndarray, probability: float) -> bool:
    return stats.binomtest(int(happened.sum()), happened.size, probability).pvalue > CHANCE


def test_the_same_place_gives_the_same_views():
    for first, second in zip(draw(DINOViews(), 375, 500, 1, 2, 3), draw(DINOViews(), 375, 500, 1, 2, 3), strict=True):
        for kind in first:
            np.testing.assert_array_equal(first[kind], second[kind])


@pytest.mark.parametrize("place", [(0, 2, 3), (1, 0, 3), (1, 2, 0)], ids=["seed", "epoch", "index"])
def test_another_place_gives_other_views(place):
    boxes, photometry = draw(DINOViews(), 375, 500, 1, 2, 3)
    other_boxes, other_photometry = draw(DINOViews(), 375, 500, *place)
    assert (boxes["local"][:, :4] != other_boxes["local"][:, :4]).any(axis=1).all()
    assert not np.array_equal(photometry["local"], other_photometry["local"])


def test_more_local_views_change_none_of_the_others():
    few, many = draw(DINOViews(local_count=2), 375, 500, 0, 0, 5), draw(DINOViews(local_count=9), 375, 500, 0, 0, 5)
    for a, b in zip(few, many, strict=True):
        np.testing.assert_array_equal(a["global"], b["global"])
        np.testing.assert_array_equal(a["local"], b["local"][:2])


def test_views_of_one_picture_differ_from_each_other(drawn):
    for table in drawn[0].values():
        for one, two in itertools.combinations(range(table.shape[1]), 2):
            assert np.mean((table[:, one, :4] == table[:, two, :4]).all(axis=1)) < 0.01


# 60x200 exceeds the widest ratio, so its large crops often fall back to the centre
@pytest.mark.parametrize("height, width", [(375, 500), (32, 32), (60, 200), (8, 8)])
@pytest.mark.parametrize("scale", [(0.4, 1.0), (0.05, 0.4)])
def test_crops_are_distributed_like_torchvisions(height, width, scale):
    torch.manual_seed(0)
    picture = torch.empty(1, height, width)
    theirs = np.array([RandomResizedCrop.get_params(picture, list(scale), [3 / 4, 4 / 3]) for _ in range(PLACES)])
    views = DINOViews(global_scale=scale, local_count=0)
    ours = np.concatenate([draw(views, height, width, 0, 1, index)[0]["global"] for index in range(PLACES // 2)])
    columns = {Box.TOP: 0, Box.LEFT: 1, Box.HEIGHT: 2, Box.WIDTH: 3}  # torchvision returns top, left, height, width
    for box, column in columns.items():
        assert stats.ks_2samp(ours[:, box], theirs[:, column], method="asymp").pvalue > CHANCE, box.name
    shares = ours[:, Box.WIDTH] * ours[:, Box.HEIGHT], theirs[:, 2] * theirs[:, 3]
    assert stats.ks_2samp(*shares, method="asymp").pvalue > CHANCE


def test_local_crops_cover_a_uniform_share_of_the_area(drawn):
    share = drawn[0]["local"][..., Box.WIDTH] * drawn[0]["local"][..., Box.HEIGHT] / (375 * 500)
    # sides are rounded to whole pixels, half a pixel in about 80
    assert agrees_with_uniform(share.ravel(), 0.05 - 0.002, 0.4 + 0.002)


@settings(max_examples=200, deadline=None)
@given(height=integers(1, 600), width=integers(1, 600), index=integers(0, 2**31))
def test_every_crop_is_a_whole_number_of_pixels_inside_the_picture(height, width, index):
    for table in draw(DINOViews(), height, width, 0, 0, index)[0].values():
        left, top, wide, high, flip = table.T
        assert (table == np.rint(table)).all()
        assert (left >= 0).all() and (top >= 0).all() and (wide >= 1).all() and (high >= 1).all()
        assert (left + wide <= width).all() and (top + high <= height).all()
        assert np.isin(flip, (0, 1)).all()


@pytest.mark.parametrize(
    "height, width, box",
    [
        (375, 500, (62, 0, 375, 375)),
        (500, 375, (0, 62, 375, 375)),
        (32, 32, (0, 0, 32, 32)),
        (1, 9, (4, 0, 1, 1)),
    ],
)
def test_plain_is_the_largest_centred_square(height, width, box):
    boxes, photometry = draw(PlainViews(size=32), height, width, 0, 0, 0)
    np.testing.assert_array_equal(boxes["global"], [[*box, 0]])
    np.testing.assert_array_equal(photometry["global"], [NEUTRAL])


def test_a_picture_that_no_crop_fits_gives_the_centre_like_torchvision():
    for height, width in ((10, 100), (100, 10)):
        top, left, high, wide = RandomResizedCrop.get_params(torch.empty(1, height, width), [0.9, 1.0], [3 / 4, 4 / 3])
        boxes, _ = draw(DINOViews(global_scale=(0.9, 1.0), local_count=0), height, width, 0, 0, 0)
        np.testing.assert_array_equal(boxes["global"][:, :4], [[left, top, wide, high]] * 2)


def test_probabilities_are_the_published_ones(drawn):
    boxes, photometry = drawn
    first, second, local = (
        photometry["global"][:, 0],
        photometry["global"][:, 1],
        photometry["local"].reshape(-1, len(Colour)),
    )
    for table, blurred, solarized in ((first, 1.0, 0.0), (second, 0.1, 0.2), (local, 0.5, 0.0)):
        assert agrees_with_probability(table[:, Colour.BRIGHTNESS] != 1, 0.8)
        assert agrees_with_probability(table[:, Colour.GREY] == 1, 0.2)
        assert agrees_with_probability(table[:, Colour.BLUR] > 0, blurred)
        assert agrees_with_probability(table[:, Colour.SOLARIZE] == 128, solarized)
    for table in boxes.values():
        assert agrees_with_probability(table[..., Box.FLIP] == 1, 0.5)


def test_amounts_are_uniform_over_the_published_ranges(drawn):
    table = drawn[1]["local"].reshape(-1, len(Colour)).astype(float)
    jittered = table[table[:, Colour.BRIGHTNESS] != 1]
    for column, (low, high) in JITTER.items():
        assert agrees_with_uniform(jittered[:, column], low - 1e-6, high + 1e-6), column.name
    blurred = table[table[:, Colour.BLUR] > 0]
    assert agrees_with_uniform(blurred[:, Colour.BLUR], 0.1 - 1e-6, 2.0 + 1e-6)


def test_all_24_orders_of_the_jitter_come_equally_often(drawn):
    table = drawn[1]["local"].reshape(-1, len(Colour))
    orders = table[table[:, Colour.BRIGHTNESS] != 1][:, ORDER]
    np.testing.assert_array_equal(np.sort(orders, axis=1), np.tile(np.arange(4), (len(orders), 1)))
    _, counts = np.unique(orders, axis=0, return_counts=True)
    assert len(counts) == 24
    assert stats.chisquare(counts).pvalue > CHANCE


def test_what_is_drawn_for_one_setting_says_nothing_of_another(drawn):
    boxes, photometry = (part["local"][:, 0].astype(float) for part in drawn)
    amounts = np.concatenate([boxes, photometry[:, [0, 1, 2, 3, 8, 9]]], axis=1)
    # width and height both follow the area; left and top follow what room they leave
    related = {(i, j) for i in range(4) for j in range(4)}
    correlation = np.corrcoef(amounts.T)
    # a jittered view is jittered in all four, but up as often as down, so even these are uncorrelated
    for i, j in itertools.combinations(range(amounts.shape[1]), 2):
        assert (i, j) in related or abs(correlation[i, j]) < 4 / np.sqrt(PLACES), (i, j)


def test_views_that_are_left_alone_hold_the_neutral_values(drawn):
    table = drawn[1]["local"].reshape(-1, len(Colour))
    alone = table[table[:, Colour.BRIGHTNESS] == 1]
    jitter = slice(Colour.BRIGHTNESS, Colour.FOURTH + 1)
    np.testing.assert_array_equal(alone[:, jitter], np.tile(NEUTRAL[jitter], (len(alone), 1)))


def test_strong_jitter_never_gives_a_negative_factor():
    class Strong(PictureViews):
        def kinds(self):
            return {"global": (View(size=8, jitter=(2.0, 2.0, 2.0, 0.5), jitter_prob=1.0),)}

    table = np.concatenate([draw(Strong(), 8, 8, 0, 0, index)[1]["global"] for index in range(PLACES)]).astype(float)
    for column in (Colour.BRIGHTNESS, Colour.CONTRAST, Colour.SATURATION):
        assert agrees_with_uniform(table[:, column], 0.0, 3.0)  # as torchvision: from max(0, 1 - 2) to 1 + 2


def test_small_recipe_leaves_small_pictures_sharp():
    tables = [draw(views_named("dino_small"), 32, 32, 0, 0, index)[1] for index in range(100)]
    assert all((table[kind][:, Colour.BLUR] == 0).all() for table in tables for kind in ("global", "local"))


def test_warps_are_uniform_either_way_and_change_no_other_draw():
    still, turned = DINOViews(), DINOViews(rotate=15.0, shear=0.2)
    tables = [[draw(views, 500, 375, 0, 0, index) for index in range(500)] for views in (still, turned)]
    warps = np.concatenate([colours["local"][:, WARP] for _, colours in tables[1]]).astype(float)
    for values, most in zip(warps.T, (np.deg2rad(15), 0.2), strict=True):
        assert agrees_with_uniform(values, -most - 1e-6, most + 1e-6)
    for (boxes, colours), (turned_boxes, turned_colours) in zip(*tables, strict=True):
        for kind in boxes:
            np.testing.assert_array_equal(boxes[kind], turned_boxes[kind])
            np.testing.assert_array_equal(colours[kind][:, : Colour.ROTATE], turned_colours[kind][:, : Colour.ROTATE])
            assert (colours[kind][:, WARP] == 0).all()


def test_a_hundred_thousand_draws_fill_the_published_ranges():
    """Caron et al. 2021: what each setting's distribution is said to be, over 100,000 pictures of 375 x 500 px."""
    count, height, width = 100_000, 375, 500
    places = [(3, 0, index) for index in range(count)]
    views, part = DINOViews(local_count=1), 10_000
    tables = [draw_many(views, [(height, width)] * part, places[at : at + part]) for at in range(0, count, part)]
    boxes = {kind: np.concatenate([table[0][kind] for table in tables]) for kind in ("global", "local")}
    colours = {kind: np.concatenate([table[1][kind] for table in tables]) for kind in ("global", "local")}

    def share_is(found: np.ndarray, probability: float) -> None:
        assert abs(found.mean() - probability) < 4.5 * np.sqrt(max(probability * (1 - probability), 1e-12) / count)

    def uniform_over(found: np.ndarray, low: float, high: float) -> None:
        assert low - 1e-6 <= found.min() and found.max() <= high + 1e-6
        quantiles = np.quantile(found, np.linspace(0, 1, 11))
        # of a uniform law's quantile the deviation is at most half the range over the root of the count
        np.testing.assert_allclose(
            quantiles, np.linspace(low, high, 11), atol=4.5 * 0.5 * (high - low) / np.sqrt(len(found))
        )

    # a small crop always fits, so nothing distorts the law; whole pixels do by a hundredth
    local = boxes["local"][:, 0].astype(float)
    area = local[:, Box.WIDTH] * local[:, Box.HEIGHT] / (height * width)
    ratio = np.log(local[:, Box.WIDTH] / local[:, Box.HEIGHT])
    assert area.min() > 0.05 * 0.97 and area.max() < 0.4 * 1.03
    np.testing.assert_allclose(
        np.quantile(area, [0.25, 0.5, 0.75]), 0.05 + 0.35 * np.array([0.25, 0.5, 0.75]), atol=0.003
    )
    np.testing.assert_allclose(
        np.quantile(ratio, [0.25, 0.5, 0.75]), np.log(4 / 3) * np.array([-0.5, 0, 0.5]), atol=0.006
    )
    blur_prob, solarize_prob = {"global": (1.0, 0.1), "local": (0.5,)}, {"global": (0.0, 0.2), "local": (0.0,)}
    for kind in boxes:
        assert boxes[kind][..., [Box.LEFT, Box.TOP]].min() >= 0
        assert (boxes[kind][..., Box.LEFT] + boxes[kind][..., Box.WIDTH]).max() <= width
        assert (boxes[kind][..., Box.TOP] + boxes[kind][..., Box.HEIGHT]).max() <= height
        for view in range(boxes[kind].shape[1]):
            drawn = colours[kind][:, view].astype(float)
            share_is(boxes[kind][:, view, Box.FLIP], 0.5)
            share_is(drawn[:, Colour.GREY], 0.2)
            share_is(drawn[:, Colour.BLUR] > 0, blur_prob[kind][view])
            share_is(drawn[:, Colour.SOLARIZE] < 256, solarize_prob[kind][view])
            assert set(np.unique(drawn[:, Colour.SOLARIZE])) <= {128.0, 256.0}
            uniform_over(drawn[drawn[:, Colour.BLUR] > 0, Colour.BLUR], 0.1, 2.0)
            jittered = drawn[drawn[:, Colour.BRIGHTNESS] != 1]
            share_is(drawn[:, Colour.BRIGHTNESS] != 1, 0.8)
            for column, low, high in (
                (Colour.BRIGHTNESS, 0.6, 1.4),
                (Colour.CONTRAST, 0.6, 1.4),
                (Colour.SATURATION, 0.8, 1.2),
                (Colour.HUE, -0.1, 0.1),
            ):
                uniform_over(jittered[:, column], low, high)
            _, orders = np.unique(jittered[:, ORDER], axis=0, return_counts=True)
            assert len(orders) == 24 and abs(orders / len(jittered) - 1 / 24).max() < 0.004
