"""What is broken in a part or a method is seen by every case that holds it, and by no other of its family."""

import pytest
import torch

import lightning_modules.capi
import lightning_modules.data2vec
import lightning_modules.data2vec2
import lightning_modules.dinosr
import lightning_modules.discovr
import lightning_modules.dmjd
import lightning_modules.hybrid
import lightning_modules.leap
import lightning_modules.pcd
import lightning_modules.unfused
import ssd.backbones.rotary_vit
import ssd.backbones.vit
import ssd.hog
import ssd.parity.frozen_teachers
import ssd.parity.unfused
import ssd.spatial
import ssd.views.overlap
import ssd.views.spectra
from ssd.backbones.transformer import Block
from ssd.codebooks import Codebooks
from ssd.curriculum import Curriculum
from ssd.losses.regression import absolute_error
from ssd.masking.recipes import DisjointMasks, InverseSquareMasks, RandomMasks
from ssd.parity.cases import CASES
from ssd.queue import Queue
from ssd.spectrogram import Levels
from ssd.step import Step
from ssd.targets import Sinkhorn
from ssd.teachers import EMA
from tests.parity.test_parity import (
    centre_first,
    clip_too_late,
    momentum_off,
    no_trust,
    row,
    temperature_off,
    two_iterations,
)


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


# ---------------------------------------------------------------- disjoint masks

DMJD, DMJD_TEACHER = "DMJD, 20 steps", "DMJD with a teacher, 20 steps"


def targets_out_of_order(monkeypatch):
    """What the released code does: visible tokens beside the targets of other places."""
    places = lightning_modules.dmjd.places
    monkeypatch.setattr(lightning_modules.dmjd, "places", lambda tokens, where: places(tokens, where).flip(1))


def rate_as_it_is(monkeypatch):
    monkeypatch.setattr(lightning_modules.dmjd, "predictions_of_a_hidden_patch", lambda masks: 1.0)


def strong_edges_count_more(monkeypatch):
    monkeypatch.setattr(ssd.hog, "layer_normed", lambda found: found / 20)


def as_they_fall(monkeypatch):
    draw = lambda self, views, batch, grid, rng: RandomMasks(self.ratio, cell=self.cell).masks(views, batch, grid, rng)
    monkeypatch.setattr(DisjointMasks, "masks", draw)


DISJOINT_FAULTS = [
    (targets_out_of_order, {DMJD, DMJD_TEACHER}),
    (rate_as_it_is, {DMJD}),
    (strong_edges_count_more, {"gradients of pictures (HOG)", DMJD}),
    (as_they_fall, {"masks, disjoint, counts"}),
]


@pytest.mark.parametrize("fault, named", DISJOINT_FAULTS, ids=[fault.__name__ for fault, _ in DISJOINT_FAULTS])
def test_a_fault_in_disjoint_masks_and_their_targets(fault, named, monkeypatch):
    fault(monkeypatch)
    assert seen("disjoint", named) == named


# ---------------------------------------------------------------- maps

PCD, PCD_BOXES, PCD_INDEX = (f"{name}, 20 steps" for name in ("PCD", "PCD of boxes", "PCD of the published pairing"))


def plain_relu(monkeypatch):
    monkeypatch.setattr(ssd.spatial, "SpatialReLU", torch.nn.ReLU)


def empty_places_count(monkeypatch):
    monkeypatch.setattr(Queue, "valid", property(lambda self: torch.ones(len(self.vectors), dtype=torch.bool)))


def flips_forgotten(monkeypatch):
    in_view = ssd.views.overlap.in_view

    def upright(places, box):
        return in_view(places, box * torch.tensor([1.0, 1, 1, 1, 0]))

    monkeypatch.setattr(ssd.views.overlap, "in_view", upright)


def always_the_same_view(monkeypatch):
    init = lightning_modules.pcd.PCD.__init__
    pairing = lambda self, *networks, **settings: init(self, *networks, **{**settings, "pairing": "same"})
    monkeypatch.setattr(lightning_modules.pcd.PCD, "__init__", pairing)


MAP_FAULTS = [
    (plain_relu, {"heads carried over to maps", PCD}),
    (empty_places_count, {"queue", PCD, PCD_BOXES, PCD_INDEX}),
    (flips_forgotten, {"places that two views share", PCD_BOXES}),
    (always_the_same_view, {PCD_BOXES, PCD_INDEX}),
]


@pytest.mark.parametrize("fault, named", MAP_FAULTS, ids=[fault.__name__ for fault, _ in MAP_FAULTS])
def test_a_fault_in_drawing_maps_together(fault, named, monkeypatch):
    fault(monkeypatch)
    assert seen("maps", named) == named


# ---------------------------------------------------------------- clusters of patches

CAPI, CAPI_JOINT = "CAPI, 20 steps", "CAPI balanced over all places, 20 steps"


def all_places_together(monkeypatch):
    forward = Sinkhorn.forward
    monkeypatch.setattr(Sinkhorn, "forward", lambda self, *arguments: forward(Sinkhorn(), *arguments))


def mixed_axes(monkeypatch):
    monkeypatch.setattr(ssd.backbones.rotary_vit.RotaryViT.__init__, "__kwdefaults__", MIXED)


def registers_at_the_corner(monkeypatch):
    corner = lambda count, device=None: torch.zeros(count, 2)
    monkeypatch.setattr(ssd.backbones.rotary_vit, "border_places", corner)


def clusters_do_not_decay(monkeypatch):
    value_of = Step.value_of
    none = lambda self, setting, step: 0.0 if setting == 0.01 else value_of(self, setting, step)
    monkeypatch.setattr(Step, "value_of", none)


MIXED = {**(ssd.backbones.rotary_vit.RotaryViT.__init__.__kwdefaults__ or {}), "mixed_axes": True}
CAPI_FAULTS = [
    (momentum_off, {CAPI, CAPI_JOINT}),
    (temperature_off, {CAPI, CAPI_JOINT}),
    (two_iterations, {"Sinkhorn-Knopp of places", CAPI, CAPI_JOINT}),
    (all_places_together, {"Sinkhorn-Knopp of places", CAPI}),
    (mixed_axes, {CAPI, CAPI_JOINT}),
    (registers_at_the_corner, {CAPI, CAPI_JOINT}),
    (clusters_do_not_decay, {CAPI, CAPI_JOINT}),
]


@pytest.mark.parametrize("fault, named", CAPI_FAULTS, ids=[fault.__name__ for fault, _ in CAPI_FAULTS])
def test_a_fault_in_clusters_of_patches(fault, named, monkeypatch):
    fault(monkeypatch)
    assert seen("capi", named) == named


# ---------------------------------------------------------------- codes of sounds

DINOSR, SPIDR = "DinoSR, 20 steps", "SpidR, 20 steps"


def padding_counts(monkeypatch):
    normed = lightning_modules.dinosr.instance_normed
    monkeypatch.setattr(lightning_modules.dinosr, "instance_normed", lambda layer, valid: normed(layer))


def codes_without_hits_fade(monkeypatch):
    update = Codebooks.update
    hit = lambda self, sums, counts, fresh=None: update(self, sums, counts.clamp_min(1e-9))
    monkeypatch.setattr(Codebooks, "update", hit)


def front_end_goes_on(monkeypatch):
    monkeypatch.setattr(lightning_modules.dinosr.DinoSR, "resting", lambda self: ())


def positions_are_averaged(monkeypatch):
    init = EMA.__init__
    monkeypatch.setattr(EMA, "__init__", lambda self, network, **settings: init(self, network, buffers="average"))


def behind_the_sum(monkeypatch):
    """What the block answers in place of what its MLP adds."""
    forward = Block.forward
    monkeypatch.setattr(Block, "forward", lambda self, *place: (forward(self, *place)[0],) * 2)


CODE_FAULTS = [
    (padding_counts, {DINOSR, SPIDR}),
    (codes_without_hits_fade, {"codebooks", DINOSR, SPIDR}),
    (front_end_goes_on, {DINOSR, SPIDR}),
    (positions_are_averaged, {DINOSR, SPIDR}),
    (behind_the_sum, {DINOSR, SPIDR}),
    (clip_too_late, {SPIDR}),
]


@pytest.mark.parametrize("fault, named", CODE_FAULTS, ids=[fault.__name__ for fault, _ in CODE_FAULTS])
def test_a_fault_in_codes_of_sounds(fault, named, monkeypatch):
    fault(monkeypatch)
    assert seen("codes", named) == named


# ---------------------------------------------------------------- clips and frames

DISCOVR, RELEASED = "DISCOVR, 20 steps", "DISCOVR with released assignments, 20 steps"


def another_place(monkeypatch):
    """What the released code does: every second token where every second frame was meant."""
    standardised = lightning_modules.discovr.standardised_over_patches
    monkeypatch.setattr(
        lightning_modules.discovr, "standardised_over_patches", lambda patches: standardised(patches).roll(1, 1)
    )


def half_the_rounds(monkeypatch):
    knopp = lightning_modules.discovr.sinkhorn_knopp
    fewer = lambda scores, temperature, rounds: knopp(scores, temperature, rounds // 2)
    monkeypatch.setattr(lightning_modules.discovr, "sinkhorn_knopp", fewer)


def soft_for_both(monkeypatch):
    init = lightning_modules.discovr.DISCOVR.__init__
    soft = lambda self, *networks, **settings: init(self, *networks, **{**settings, "hard_assignments": False})
    monkeypatch.setattr(lightning_modules.discovr.DISCOVR, "__init__", soft)


CLIP_FAULTS = [
    (momentum_off, {DISCOVR, RELEASED}),
    (temperature_off, {DISCOVR, RELEASED}),
    (centre_first, {DISCOVR, RELEASED}),
    (another_place, {DISCOVR, RELEASED}),
    (half_the_rounds, {DISCOVR, RELEASED}),
    (soft_for_both, {RELEASED}),
]


@pytest.mark.parametrize("fault, named", CLIP_FAULTS, ids=[fault.__name__ for fault, _ in CLIP_FAULTS])
def test_a_fault_in_clips_and_frames(fault, named, monkeypatch):
    fault(monkeypatch)
    assert seen("clips", named) == named


# ---------------------------------------------------------------- labels from clusters

UNFUSED, FOLLOWS = "UnFuSeD, 20 steps", "UnFuSeD with a classifier that follows, 20 steps"
LABEL_LOSSES = "losses of labels and blocks (UnFuSeD)"
SPECTRA = "spectrograms, mixed and cropped"


def classifier_follows(monkeypatch):
    """What the released code does: the classifier is drawn towards its blocks."""
    init = lightning_modules.unfused.UnFuSeD.__init__
    attached = lambda self, *networks, **settings: init(self, *networks, **{**settings, "detach_teacher": False})
    monkeypatch.setattr(lightning_modules.unfused.UnFuSeD, "__init__", attached)


def half_the_distance(monkeypatch):
    distance = lightning_modules.unfused.cosine_distance
    monkeypatch.setattr(lightning_modules.unfused, "cosine_distance", lambda a, b: distance(a, b) / 2)


def variance_by_n(monkeypatch):
    whitening = ssd.parity.unfused.whitening

    def biased(features, dim):
        mean, components = whitening(features, dim)
        return mean, components * (len(features) / (len(features) - 1)) ** 0.5

    monkeypatch.setattr(ssd.parity.unfused, "whitening", biased)


def mixed_with_the_sound_behind(monkeypatch):
    mixed = ssd.views.spectra.mixed_levels

    def behind(levels, shares, group):
        counts = None if levels.counts is None else levels.counts.flip(0)
        found = mixed(Levels(levels.values.flip(0), counts, levels.per_neper), shares.flip(0), group)
        return Levels(found.values.flip(0), levels.counts, levels.per_neper)

    for place in (ssd.views.spectra, ssd.parity.unfused):
        monkeypatch.setattr(place, "mixed_levels", behind)


def nothing_around(monkeypatch):
    """Crops of the sound alone, none of which reaches beyond it."""
    monkeypatch.setattr(ssd.views.spectra, "CANVAS", 1.0)


LABEL_FAULTS = [
    (classifier_follows, {LABEL_LOSSES, UNFUSED}),
    (half_the_distance, {LABEL_LOSSES, UNFUSED, FOLLOWS}),
    (variance_by_n, {"clusters of features (UnFuSeD)"}),
    (mixed_with_the_sound_behind, {SPECTRA, UNFUSED, FOLLOWS}),
    (nothing_around, {SPECTRA, UNFUSED, FOLLOWS}),
]


@pytest.mark.parametrize("fault, named", LABEL_FAULTS, ids=[fault.__name__ for fault, _ in LABEL_FAULTS])
def test_a_fault_in_labels_and_spectra(fault, named, monkeypatch):
    fault(monkeypatch)
    assert seen("unfused", named) == named
