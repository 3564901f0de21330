"""What is broken in a part or a method is seen by every case that holds it, and by no other of its family."""

import pytest

import lightning_modules.data2vec
import lightning_modules.data2vec2
import lightning_modules.hybrid
import lightning_modules.leap
import ssd.backbones.vit
import ssd.parity.frozen_teachers
from ssd.curriculum import Curriculum
from ssd.losses.regression import absolute_error
from ssd.masking.recipes import InverseSquareMasks
from ssd.parity.cases import CASES
from ssd.step import Step
from tests.parity.test_parity import clip_too_late, momentum_off, no_trust, row


def family(module):
    """Names of the cases that a module of `ssd.parity` computes."""
    return {case.name for case in CASES if case.compute.__module__ == f"ssd.parity.{module}"}


def seen(module, named):
    """Those of a family that see what is broken; of masks, which take their time, the named ones alone are looked at."""
    looked_at = {name for name in family(module) if name in named or not name.startswith("masks")}
    return {name for name in looked_at if not row(name)["ok"]}


# ---------------------------------------------------------------- averages of inner layers

DATA2VEC, MEAN, SUM = (
    f"{name}, 20 steps" for name in ("data2vec", "data2vec 2.0", "data2vec 2.0 with the published sum")
)


def layers_as_they_are(monkeypatch):
    monkeypatch.setattr(lightning_modules.data2vec2, "instance_normed", lambda layer: layer)


def last_layer_alone(monkeypatch):
    monkeypatch.setattr(lightning_modules.data2vec, "average", lambda layers: layers[-1])


def absolute(monkeypatch):
    monkeypatch.setattr(lightning_modules.data2vec2, "squared_error", absolute_error)


def sum_of_two_processes(monkeypatch):
    monkeypatch.setattr(lightning_modules.data2vec2, "world_size", lambda: 2)


def nothing_is_shared(monkeypatch):
    monkeypatch.setattr(lightning_modules.data2vec2, "shared_names", lambda shared: [])


def quadratic_below_one(monkeypatch):
    error = lightning_modules.data2vec.smooth_error
    monkeypatch.setattr(
        lightning_modules.data2vec, "smooth_error", lambda said, told, beta: error(said, told, beta / 2)
    )


def fewer_squares(monkeypatch):
    monkeypatch.setattr(InverseSquareMasks.__init__, "__defaults__", (0.2, 3, -0.1))


LAYER_FAULTS = [
    (momentum_off, {DATA2VEC, MEAN, SUM}),
    (clip_too_late, {DATA2VEC, MEAN, SUM}),
    (layers_as_they_are, {MEAN, SUM}),
    (last_layer_alone, {DATA2VEC}),
    (quadratic_below_one, {DATA2VEC}),
    (absolute, {MEAN, SUM}),
    (sum_of_two_processes, {SUM}),
    (nothing_is_shared, {SUM}),
    (fewer_squares, {"masks, inverse squares (data2vec 2.0)"}),
]


@pytest.mark.parametrize("fault, named", LAYER_FAULTS, ids=[fault.__name__ for fault, _ in LAYER_FAULTS])
def test_a_fault_in_averages_of_layers(fault, named, monkeypatch):
    fault(monkeypatch)
    assert seen("layer_targets", named) == named


# ---------------------------------------------------------------- frozen teachers

LEAP, LEAP_PUBLISHED, LEAP_ALL = (
    f"{name}, 20 steps" for name in ("LEAP", "LEAP with the published likeness", "LEAP's match of all blocks")
)
HYBRID, HYBRID_VALUES = "hybrid distillation, 20 steps", "hybrid distillation of values, 20 steps"


def biased(monkeypatch):
    cka = lightning_modules.leap.linear_cka
    plain = lambda x, y, unbiased=True: cka(x, y, unbiased=False)
    for place in (lightning_modules.leap, ssd.parity.frozen_teachers):
        monkeypatch.setattr(place, "linear_cka", plain)


def never_late(monkeypatch):
    update = Curriculum.update
    monkeypatch.setattr(Curriculum, "update", lambda self, likeness, done, limit: update(self, likeness, done, None))


def mixed_with_the_next(monkeypatch):
    def mixed(pictures, share, group):
        groups = pictures.unflatten(1, (-1, group))
        return (share * groups + (1 - share) * groups.roll(-1, 2)).flatten(1, 2)

    for place in (lightning_modules.leap, ssd.parity.frozen_teachers):
        monkeypatch.setattr(place, "mixed", mixed)


def class_tokens_weigh_one(monkeypatch):
    at = Step.at
    monkeypatch.setattr(Step, "at", lambda self, name: 1.0 if name == "cls_weight" else at(self, name))


def first_ones_stay(monkeypatch):
    first = lambda patches, keep: ssd.backbones.vit.torch.arange(keep).expand(len(patches), -1)
    monkeypatch.setattr(ssd.backbones.vit, "least_redundant", first)


def student_first(monkeypatch):
    divergence = lightning_modules.hybrid.relation_divergence
    monkeypatch.setattr(lightning_modules.hybrid, "relation_divergence", lambda mine, theirs: divergence(theirs, mine))


def smooth_for_both(monkeypatch):
    smooth = lightning_modules.hybrid.DISTANCES["smooth_l1"]
    monkeypatch.setitem(lightning_modules.hybrid.DISTANCES, "l2", smooth)


FROZEN_FAULTS = [
    (biased, {"likeness (CKA)", LEAP}),
    (never_late, {"course of a target block", LEAP, LEAP_PUBLISHED}),
    (mixed_with_the_next, {"mixed pictures", LEAP, LEAP_PUBLISHED}),
    (class_tokens_weigh_one, {LEAP, LEAP_PUBLISHED, LEAP_ALL}),
    (no_trust, {LEAP, LEAP_PUBLISHED, LEAP_ALL}),
    (clip_too_late, {LEAP, LEAP_PUBLISHED, LEAP_ALL, HYBRID, HYBRID_VALUES}),
    (first_ones_stay, {HYBRID, HYBRID_VALUES}),
    (student_first, {HYBRID, HYBRID_VALUES}),
    (smooth_for_both, {HYBRID_VALUES}),
]


@pytest.mark.parametrize("fault, named", FROZEN_FAULTS, ids=[fault.__name__ for fault, _ in FROZEN_FAULTS])
def test_a_fault_in_learning_from_frozen_networks(fault, named, monkeypatch):
    fault(monkeypatch)
    assert seen("frozen_teachers", named) == named
