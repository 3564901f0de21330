"""The ranges in which settings are known to work: published runs lie inside, and each rule finds what it is for."""

import dataclasses

import pytest

from ssd.planning.facts import Curve, Facts, MaskFacts, ViewFacts
from ssd.planning.rules import RULES, warned


def steady(value: float) -> Curve:
    return moving(value, value, 0)


def moving(start: float, end: float, rise: int, lowest: float | None = None, highest: float | None = None) -> Curve:
    low = min(start, end) if lowest is None else lowest
    high = max(start, end) if highest is None else highest
    return Curve(start, end, high, low, rise, (0,), (start,))


# DINO's ViT-S/16 of 100 epochs on ImageNet, batch 512, 8 processes (Caron et al. 2021)
DINO = Facts(
    method="DINO",
    data="Images",
    samples=1_281_167,
    draws=1_281_167,
    batch=64,
    processes=8,
    micro_batches=1,
    steps=250_200,
    steps_per_epoch=2502,
    precision="bf16-mixed",
    curves={
        "lr": moving(0.0, 1e-6, 25_020, lowest=0.0, highest=1e-3),
        "weight_decay": moving(0.04, 0.4, 0),
        "teacher_temperature": moving(0.04, 0.07, 75_060),
        "momentum": moving(0.996, 1.0, 0),
    },
    lr_rule="linear",
    adam=True,
    lr_scales={"backbone.model.cls_token": 1.0},
    frozen_steps=2502,
    prototypes={"head.last_layer": 65_536},
    sinkhorn=False,
    teacher_follows=True,
    views={
        "global": ViewFacts(2, 224, (0.4, 1.0), 237.0, (14, 14), 1),
        "local": ViewFacts(8, 96, (0.05, 0.4), 84.0, (6, 6), 1),
    },
    masked={},
    koleo_group=None,
    patch_loss=False,
    patches_px=16,
    picture_px=375.0,
    parameters={"student": 1},
    trainable=1,
    stage=False,
    normalised_by_batch=False,
)
MASKS = {"global": MaskFacts(196, 29.0, 17, 97, 0.5)}
# the long recipe on one batch of 3072 (Oquab et al. 2024)
DINOV2 = dataclasses.replace(
    DINO,
    batch=32,
    processes=96,
    steps=625_000,
    steps_per_epoch=1250,
    curves={
        "lr": moving(0.0, 1e-6, 100_000, lowest=0.0, highest=3.46e-4),
        "teacher_temperature": moving(0.04, 0.07, 37_500),
        "momentum": moving(0.994, 1.0, 0),
    },
    prototypes={"head": 131_072, "patch_head": 131_072},
    samples=142_000_000,
    sinkhorn=True,
    frozen_steps=1250,
    masked=MASKS,
    koleo_group=32,
    patch_loss=True,
)


def curves(**changes: Curve) -> dict:
    return {"curves": {**DINO.curves, **changes}}


def quick(warmup: int, momentum: float = 0.95) -> dict:
    """The curves of a short run."""
    return {"lr": moving(0, 0, warmup, 0, 1e-3), "teacher_temperature": steady(0.04), "momentum": steady(momentum)}


# rule by rule: what of DINO's run is changed, and words of what is found
BEYOND = [
    ({"samples": 140_000, "prototypes": {"head": 65_536}}, "num_prototypes", "K is 4 times what suits"),
    ({"prototypes": {"head": 64}}, "num_prototypes", "K is 64"),
    ({"sinkhorn": True, "processes": 1}, "target_rule", "512 prototypes for each row"),
    ({"steps": 1600, "frozen_steps": 0, "curves": quick(160, momentum=0.996)}, "momentum", "takes 11% of the run"),
    (curves(momentum=steady(0.5)), "momentum", "keeps only 0.5"),
    (curves(teacher_temperature=steady(0.08)), "teacher_temperature", "reaches 0.08"),
    (curves(teacher_temperature=steady(0.01)), "teacher_temperature", "is 0.01"),
    (curves(teacher_temperature=moving(0.04, 0.06, 200_000)), "teacher_temperature", "rises for 80%"),
    (curves(lr=moving(0, 0, 100_000, 0, 1e-3)), "lr", "rises for 40%"),
    (curves(lr=steady(1e-3)), "lr", "no warm-up"),
    (curves(lr=moving(0, 0, 25_020, 0, 1e-2)), "lr", "peaks at 0.01"),
    (curves(lr=moving(0, 0, 25_020, 0, 3e-5)), "lr", "peaks at 3e-05"),
    ({"frozen_steps": 250_200}, "freeze_last_layer", "for 100% of the run"),
    ({"batch": 16, "processes": 1}, "data.batch_size", "has 16 samples"),
    ({"batch": 1024, "samples": 14_000_000}, "data.batch_size", "has 8192 samples"),
    ({"koleo_group": 4}, "koleo_group", "among 4 samples"),
    (
        {"views": {**DINO.views, "local": ViewFacts(8, 32, (0.05, 0.4), 84.0, (2, 2), 1)}},
        "views.local_size",
        "2 patches",
    ),
    (
        {"masked": MASKS, "views": {"global": ViewFacts(2, 64, (0.4, 1.0), 237.0, (4, 4), 1)}, "picture_px": 60.0},
        "masks",
        "4 patches a side",
    ),
    ({"masked": {"global": MaskFacts(196, 9.0, 1, 20, 0.5)}}, "masks", "hide only 1"),
    (
        {"masked": {"global": MaskFacts(196, 58.0, 17, 97, 0.0)}, "patch_loss": True, "koleo_group": 64},
        "masks",
        "0% of",
    ),
    (
        {"picture_px": 32.0, "views": {"global": ViewFacts(2, 32, (0.05, 1.0), 7.2, (8, 8), 1)}},
        "views",
        "smallest crops show 7 px",
    ),
    (
        {"picture_px": 32.0, "views": {"global": ViewFacts(2, 224, (0.4, 1.0), 20.0, (14, 14), 1)}},
        "views",
        "7 times as",
    ),
    ({"picture_px": 2000.0}, "views", "pictures are 8.93 times as large"),
    ({"steps": 800, "frozen_steps": 0, "curves": quick(80)}, "trainer.max_epochs", "800 steps"),
    ({"samples": 20_000, "prototypes": {"head": 2048}}, "trainer.max_epochs", "seen 6,405 times"),
    ({"precision": "16-mixed"}, "trainer.precision", "half precision"),
    (
        {"samples": 9_469, "prototypes": {"head": 1024}, "patch_loss": True, "masked": MASKS}
        | {"steps": 18_000, "frozen_steps": 0, "curves": quick(1800)},
        "model",
        "masked patches on 9,469 samples",
    ),
]


@pytest.mark.parametrize("facts", [DINO, DINOV2], ids=["DINO", "DINOv2"])
def test_published_runs_leave_no_range(facts):
    assert list(warned(facts)) == []


@pytest.mark.parametrize(("changes", "setting", "words"), BEYOND, ids=[f"{case[1]}: {case[2]}" for case in BEYOND])
def test_a_setting_beyond_its_range_is_found_and_nothing_else(changes, setting, words):
    found = list(warned(dataclasses.replace(DINO, **changes)))
    assert [warning.setting for warning in found] == [setting]
    assert words in found[0].what
    assert found[0].why and found[0].mend and found[0].source
    assert "{" not in found[0].what + found[0].mend


def test_every_rule_has_a_run_that_leaves_it():
    caught = {
        (warning.setting, warning.why)
        for changes, _, _ in BEYOND
        for warning in warned(dataclasses.replace(DINO, **changes))
    }
    assert caught == {(rule.setting, rule.why) for rule in RULES}


def test_what_is_to_be_set_follows_the_run():
    def mend(**changes) -> str:
        (warning,) = warned(dataclasses.replace(DINO, **changes))
        return warning.mend

    assert mend(samples=140_000) == "num_prototypes 16384"
    # 2 % of 2,000 steps are 40, and half is kept by m^40 = 1/2
    assert "starts at 0.983" in mend(steps=2000, frozen_steps=0, curves=quick(200, momentum=0.998))
    long = mend(steps=800, steps_per_epoch=100, frozen_steps=0, curves=quick(80))
    assert long.startswith("trainer.max_epochs 18,")


@pytest.mark.parametrize(("side", "begin"), [(8, "0.25"), (32, "0.1, or the recipe dino_small"), (100, "0.01")])
def test_crops_are_to_show_ten_pixels_or_half_of_a_small_picture(side, begin):
    views = {"global": ViewFacts(2, side, (0.001, 1.0), side * 0.001**0.5, (8, 8), 1)}
    (warning,) = warned(dataclasses.replace(DINO, picture_px=float(side), views=views))
    assert warning.mend == f"scales of crops that begin at {begin}"


def test_a_teacher_that_does_not_follow_has_no_temperature_to_collapse_by():
    free = {"lr": steady(1e-3), "teacher_temperature": steady(1.0)}
    assert list(warned(dataclasses.replace(DINO, teacher_follows=False, curves=free))) == []


def test_a_stage_may_be_short_and_slow():
    late = {"lr": moving(0, 0, 100, 0, 5e-5), "momentum": steady(0.999)}
    assert list(warned(dataclasses.replace(DINO, stage=True, steps=1000, frozen_steps=0, curves=late))) == []
