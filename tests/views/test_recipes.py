"""Recipes hold what was published, and refuse what cannot work when they are built."""

import dataclasses

import pytest

from ssd.errors import UserError
from ssd.record import build, describe
from ssd.views.recipes import RECIPES, DINOViews, PlainViews, views_named
from ssd.views.view import PictureViews, View


def test_dino_is_the_published_table():
    kinds = views_named("dino").kinds()
    colour = {"jitter": (0.4, 0.4, 0.2, 0.1), "jitter_prob": 0.8, "grey_prob": 0.2, "blur_radius": (0.1, 2.0)}
    common = {"flip": 0.5, "ratio": (3 / 4, 4 / 3), "solarize_threshold": 128, **colour}
    assert kinds["global"] == (
        View(size=224, scale=(0.4, 1.0), blur_prob=1.0, solarize_prob=0.0, **common),
        View(size=224, scale=(0.4, 1.0), blur_prob=0.1, solarize_prob=0.2, **common),
    )
    assert kinds["local"] == (View(size=96, scale=(0.05, 0.4), blur_prob=0.5, solarize_prob=0.0, **common),) * 8


def test_a_kind_without_views_is_absent():
    assert list(DINOViews(local_count=0).kinds()) == ["global"]
    assert list(DINOViews(local_count=1).kinds()) == ["global", "local"]


def test_pictures_are_evaluated_at_the_size_of_the_global_views_unless_told_otherwise():
    assert DINOViews(global_size=64, local_size=32).evaluation_size == 64
    assert DINOViews(global_size=64, evaluation_size=80).evaluation_size == 80
    assert DINOViews(global_size=64, evaluation_size=80).image_size == 64
    assert PlainViews(size=28).image_size == PlainViews(size=28).evaluation_size == 28


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_a_recipe_survives_being_described_and_built_again(name):
    views = views_named(name)
    again = build(describe(views))  # tuples have become lists on the way
    assert again == views
    assert hash(again) == hash(views)


def test_spelled_out_views_come_back_as_they_are():
    views = DINOViews(global_size=48)
    assert views_named(views) is views


@pytest.mark.parametrize("unknown", ["dinno", {"global_size": 32}, None])
def test_an_unknown_recipe_is_answered_with_the_choices(unknown):
    with pytest.raises(UserError, match=r"views is .*(dinno|32|None).*dino, dino_small, dinov2, .*plain"):
        views_named(unknown)


@pytest.mark.parametrize(
    "settings, named",
    [
        ({"global_size": 0}, "global_size is 0"),
        ({"global_size": 32.0}, "global_size is 32.0"),
        ({"local_size": -16}, "local_size is -16"),
        ({"local_count": -1}, "local_count is -1"),
        ({"global_scale": (0.0, 1.0)}, "global_scale is .*above 0 and at most 1"),
        ({"global_scale": (0.4, 1.2)}, "global_scale is"),
        ({"local_scale": (0.4, 0.05)}, "local_scale is .*in this order"),
        ({"local_scale": (0.4,)}, "local_scale is"),
        ({"local_scale": 0.4}, "local_scale is 0.4. Give a list"),
        ({"ratio": (0.0, 1.0)}, "ratio is"),
        ({"flip": 1.5}, "flip is 1.5. Give a number from 0 to 1"),
        ({"jitter": (0.4, 0.4, 0.2)}, "jitter is .*four numbers"),
        ({"jitter": (0.4, 0.4, 0.2, 0.6)}, "jitter is .*hue of at most 0.5"),
        ({"jitter": (-0.4, 0.4, 0.2, 0.1)}, "jitter is"),
        ({"jitter_prob": -0.1}, "jitter_prob is -0.1"),
        ({"grey_prob": float("nan")}, "grey_prob is nan"),
        ({"blur_prob": (1.0, 0.5)}, "blur_prob is .*three probabilities"),
        ({"blur_prob": (1.0, 0.1, 2)}, "blur_prob is 2"),
        ({"blur_radius": (0.0, 2.0)}, "blur_radius is .*above 0"),
        ({"solarize_prob": (0.0, 0.2, "x")}, "solarize_prob is 'x'"),
        ({"solarize_threshold": 300}, "solarize_threshold is 300"),
        ({"evaluation_size": 0}, "evaluation_size is 0"),
        ({"evaluation_crop": 0.0}, "evaluation_crop is 0.0"),
        ({"evaluation_crop": 1.1}, "evaluation_crop is 1.1"),
    ],
)
def test_what_cannot_work_is_refused_by_the_name_the_user_wrote(settings, named):
    with pytest.raises(UserError, match=named):
        DINOViews(**settings)


def test_views_of_one_kind_must_have_one_size():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Mixed(PictureViews):
        def kinds(self):
            return {"global": (View(size=32), View(size=16))}

    with pytest.raises(UserError, match=r"'global' have sizes \[32, 16\]"):
        Mixed()
