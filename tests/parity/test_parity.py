"""The record is what restatements of the equations give, ours agree with it, and what is broken is seen."""

import math
import zlib
from collections import defaultdict
from pathlib import Path

import pytest
import torch

import lightning_modules
import lightning_modules.dbot
import lightning_modules.dino
import lightning_modules.dmae
import lightning_modules.further_pretraining as further
import lightning_modules.mae
import ssd.backbones.positions
import ssd.backbones.vit
import ssd.decoders
import ssd.losses.prototype
import ssd.normalisers
import ssd.parity
import ssd.parity.masked_parts
from lightning_modules.dinov3 import DINOv3
from ssd.masking.recipes import BlockMasks, RandomMasks
from ssd.optim import LARS, AdamW, Clip
from ssd.parity.cases import CASES
from ssd.parity.compare import Case, check, furthest, recorded
from ssd.parity.inputs import SHORT, digest, fill, masks, numbers, without_key_bias
from ssd.step import Step
from ssd.targets import Centering, Sinkhorn
from ssd.teachers import EMA
from tests.parity.record import digests
from tests.parity.restated import RESTATED
from tests.parity.restated_parts import finalised

CPU = torch.device("cpu")
BY_NAME = {case.name: case for case in CASES}


def row(name):
    return check(BY_NAME[name], recorded()[name], CPU)


def test_every_case_is_recorded_and_restated():
    assert [case.name for case in CASES] == list(RESTATED) == list(recorded())


def test_every_method_is_among_the_cases():
    """By what the modules of cases import."""
    sources = "".join(path.read_text() for path in Path(ssd.parity.__file__).parent.glob("*.py"))
    methods = {path.stem for path in Path(lightning_modules.__file__).parent.glob("*.py")} - {"__init__", "base"}
    assert {method for method in methods if f"from lightning_modules.{method} import" not in sources} == set()


VARIANTS = {
    "data2vec 2.0 with the published sum, 20 steps",
    "LEAP with the published likeness, 20 steps",
    "hybrid distillation of values, 20 steps",
    "DMJD with a teacher, 20 steps",
    "PCD of boxes, 20 steps",
    "PCD of the published pairing, 20 steps",
    "CAPI balanced over all places, 20 steps",
    "SpidR, 20 steps",
    "DISCOVR with released assignments, 20 steps",
    "UnFuSeD with a classifier that follows, 20 steps",
}
"""Other settings of methods that are restated beside them, which takes seconds for each."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in VARIANTS else ()) for name in RESTATED]
)
def test_the_record_is_what_the_restatement_gives(name):
    """In float64, so another machine or version moves the tenth digit at most."""
    difference, worst = furthest(digests(name), recorded()[name])
    assert difference < 5e-9, f"{worst} differs: if the equations are meant to change, python -m tests.parity.record"


@pytest.mark.parametrize("name", BY_NAME)
def test_ours_agrees_with_the_record(name):
    found = row(name)
    assert found["ok"], found


# ---------------------------------------------------------------- what is broken is seen


def momentum_off(monkeypatch):
    update = EMA.update
    monkeypatch.setattr(EMA, "update", lambda self, student, momentum: update(self, student, momentum - 1e-3))


def temperature_off(monkeypatch):
    at = Step.at
    off = lambda self, setting: at(self, setting) + (1e-3 if setting.endswith("temperature") else 0)
    monkeypatch.setattr(Step, "at", off)


def two_iterations(monkeypatch):
    monkeypatch.setattr(Sinkhorn.__init__, "__defaults__", (2,))


def same_view_counts(monkeypatch):
    loss = ssd.losses.prototype.cross_view_cross_entropy
    every = lambda *arguments, skip_same_view: loss(*arguments, skip_same_view=False)
    monkeypatch.setattr(lightning_modules.dino, "cross_view_cross_entropy", every)


def centre_first(monkeypatch):
    forward = Centering.forward

    def late(self, logits, *arguments):
        self.update(logits)
        return forward(self, logits, *arguments)

    monkeypatch.setattr(Centering, "forward", late)


def clip_too_late(monkeypatch):
    apply = Clip.apply
    monkeypatch.setattr(
        Clip, "apply", lambda self, *arguments: apply(Clip(1.01 * self.max_norm, self.over), *arguments)
    )


def anchored_once(monkeypatch):
    monkeypatch.setattr(DINOv3, "_refreshes_after", lambda self, done: done == 9)


def smaller_blocks(monkeypatch):
    monkeypatch.setattr(BlockMasks.__init__, "__defaults__", ((0.1, 0.5), 0.5, 4, 1.0, 0.3, False, 10, False))


def no_trust(monkeypatch):
    build = LARS.build
    monkeypatch.setattr(LARS, "build", lambda self, groups: build(LARS(trust_coefficient=0.101), groups))


def other_epsilon(monkeypatch):
    monkeypatch.setattr(AdamW.__init__, "__defaults__", ((0.9, 0.999), 2e-8))


def biased_variance(monkeypatch):
    var_mean = torch.var_mean
    biased = lambda values, dim, keepdim: var_mean(values, dim=dim, keepdim=keepdim, correction=0)
    monkeypatch.setattr(ssd.normalisers.torch, "var_mean", biased)


def corner_at_one(monkeypatch):
    monkeypatch.setattr(lightning_modules.dbot.smooth_error, "__defaults__", (1.0,))


def visible_count_too(monkeypatch):
    mean = lambda error, masks, total: error.sum() / (error.shape[2] * total)
    for place in (ssd.parity.masked_parts, lightning_modules.mae, lightning_modules.dmae, further):
        monkeypatch.setattr(place, "mean_over_hidden", mean)


def columns_for_rows(monkeypatch):
    positions = ssd.backbones.positions.sincos_positions
    swapped = lambda grid, dim: positions(tuple(grid), dim).roll(dim // 2, 1)
    for place in (ssd.parity.masked_parts, ssd.decoders, ssd.backbones.vit):
        monkeypatch.setattr(place, "sincos_positions", swapped)


def hidden_twice(monkeypatch):
    masks = RandomMasks.masks
    monkeypatch.setattr(RandomMasks, "masks", lambda self, *place: masks(self, *place) | masks(self, *place))


def moments_survive(monkeypatch):
    class Kept(defaultdict):
        clear = lambda self: None

    build = Step.build_optimizers

    def remembering(self):
        optimizers = build(self)
        for optimizer in optimizers:
            optimizer.state = Kept(dict)
        return optimizers

    monkeypatch.setattr(Step, "build_optimizers", remembering)


def student_goes_on(monkeypatch):
    monkeypatch.setattr(further, "load_whole", lambda *_: None)


def distance_is_a_mean(monkeypatch):
    at = Step.at
    off = lambda self, setting: at(self, setting) / (24 if setting == "distillation_weight" else 1)
    monkeypatch.setattr(Step, "at", off)


def matched_one_block_later(monkeypatch):
    monkeypatch.setattr(lightning_modules.dmae, "three_quarters", lambda network: network.num_blocks)


LATER = {"layer_targets", "frozen_teachers", "disjoint", "maps", "capi", "codes", "clips", "unfused"}
"""Modules of cases whose faults are in `test_faults`."""
OTHERS = [case.name for case in CASES if case.compute.__module__.removeprefix("ssd.parity.") not in LATER]
METHODS = [name for name in OTHERS if name.endswith("20 steps")]
MASKED = {
    "MAE, 20 steps",
    "dBOT of two stages, 20 steps",
    "DMAE, 20 steps",
    "further pretraining of two stages, 20 steps",
}
STAGED = {name for name in MASKED if "stages" in name}
UNCLIPPED = {"RandomTeacher, 20 steps"} | MASKED - {"dBOT of two stages, 20 steps"}
AVERAGED = set(METHODS) - {"RandomTeacher, 20 steps"} - MASKED
FAULTS = [
    (momentum_off, {"teacher average"} | AVERAGED),
    (temperature_off, AVERAGED),  # RandomTeacher's temperatures are plain numbers
    (
        two_iterations,
        {
            "Sinkhorn-Knopp",
            "Sinkhorn-Knopp with padding",
            "DINOv2, Sinkhorn, own heads, 20 steps",
            "DINOv3 with Gram, 20 steps",
            "Franca, 20 steps",
        },
    ),
    (same_view_counts, {"DINO, 20 steps"}),
    (centre_first, {"centring", "DINO, 20 steps", "iBOT, 20 steps", "DINOv2, centring, one head, 20 steps"}),
    (clip_too_late, {"clipping"} | set(METHODS) - UNCLIPPED),
    (anchored_once, {"DINOv3 with Gram, 20 steps"}),
    (no_trust, {"optimisers"}),
    (other_epsilon, {"optimisers"}),
]


@pytest.mark.parametrize("fault, named", FAULTS, ids=[fault.__name__ for fault, _ in FAULTS])
def test_a_fault_is_seen_by_every_case_that_holds_it_and_by_no_other(fault, named, monkeypatch):
    fault(monkeypatch)
    looked_at = [name for name in OTHERS if name in named or not name.startswith("masks")]
    assert {name for name in looked_at if not row(name)["ok"]} == named


OF_MASKED = [case.name for case in CASES if case.compute.__module__.startswith("ssd.parity.masked")]
MASKED_FAULTS = [
    (biased_variance, {"features of a target", "pixels of a target"} | MASKED - {"DMAE, 20 steps"}),
    (corner_at_one, {"distances of features", "dBOT of two stages, 20 steps"}),
    (visible_count_too, {"mean over hidden patches"} | MASKED - {"dBOT of two stages, 20 steps"}),
    (columns_for_rows, {"fixed positions", "masked decoder"} | MASKED),
    (moments_survive, STAGED),
    (student_goes_on, {"further pretraining of two stages, 20 steps"}),
    (distance_is_a_mean, {"further pretraining of two stages, 20 steps"}),
    (matched_one_block_later, {"DMAE, 20 steps"}),
]


@pytest.mark.parametrize("fault, named", MASKED_FAULTS, ids=[fault.__name__ for fault, _ in MASKED_FAULTS])
def test_a_fault_of_masked_regression_is_seen_by_every_case_of_it_that_holds_it_and_by_no_other(
    fault, named, monkeypatch
):
    fault(monkeypatch)
    assert {name for name in OF_MASKED if not row(name)["ok"]} == named


def test_blocks_of_another_size_are_another_law(monkeypatch):
    smaller_blocks(monkeypatch)
    found = row("masks, blocks (iBOT)")
    assert not found["ok"] and found["worst"] == "neighbours"


def test_masks_that_show_fewer_are_another_law(monkeypatch):
    hidden_twice(monkeypatch)
    assert not row("masks, random (MAE)")["ok"] and not row("masks, random, visible counts")["ok"]


# ---------------------------------------------------------------- how it is compared


@pytest.mark.parametrize(
    "found, expected, difference",
    [
        ([0.5, 2.0], [0.5, 2.0], 0.0),
        ([0.5], [0.25], 0.25),
        ([110.0], [100.0], 0.1),
        ([math.nan], [0.0], math.inf),
        ([0.0], [0.0, 0.0], math.inf),
    ],
)
def test_differences_are_absolute_up_to_one_and_relative_above(found, expected, difference):
    assert furthest({"x": found}, {"x": expected}) == (pytest.approx(difference), "x")


def test_an_output_that_one_side_lacks_is_named():
    assert furthest({"a": [0.0]}, {"a": [0.0], "b": [0.0]}) == (math.inf, "b, which only the record has")
    assert furthest({"a": [0.0], "c": [0.0]}, {"a": [0.0]}) == (math.inf, "c, which only ours has")


def test_what_cannot_be_computed_differs_and_says_why():
    def broken(device):
        raise RuntimeError("no such kernel\nand a long story")

    found = check(Case("broken", 1.0, broken), {"x": [0.0]}, CPU)
    assert (found["ok"], found["difference"], found["worst"]) == (False, None, "RuntimeError: no such kernel")


def test_no_element_is_wrong_unseen():
    values = torch.zeros(1000)
    for place in range(0, 1000, 7):
        values[place] = 1.0
        assert max(map(abs, digest(values))) >= 0.5 / math.sqrt(1000) - 1e-9
        values[place] = 0.0
    assert digest(torch.arange(float(SHORT))) == list(range(SHORT))


def test_inputs_are_alike_everywhere_and_differ_by_name():
    """SplitMix64 from the name's checksum."""
    state, drawn = finalised((zlib.crc32(b"a") * 0xBF58476D1CE4E5B9 + 0x9E3779B97F4A7C15) % 2**64), []
    for number in (1, 2):
        word = finalised((state + number * 0x9E3779B97F4A7C15) % 2**64)
        drawn.append((word >> 11) / 2**52 - 1)
    assert numbers("a", 2).tolist() == torch.tensor(drawn, dtype=torch.float32).tolist()
    assert numbers("b", 2).tolist() != numbers("a", 2).tolist()
    one, other = torch.nn.Linear(3, 4), torch.nn.Linear(3, 4)
    fill(one)
    fill(other)
    assert torch.equal(one.weight, other.weight) and one.weight.std() > 0.3


def test_masks_of_trajectories_are_of_many_sizes_and_none():
    counts = torch.stack([masks(step).sum(2) for step in range(20)])
    assert set(counts.flatten().tolist()) == {0, 1, 2, 3, 4, 5, 6, 7, 8}
    assert all(not torch.equal(masks(step), masks(step + 1)) for step in range(19))


def test_only_key_biases_are_left_out():
    change = without_key_bias("blocks.0.attn.qkv.bias", torch.ones(6))
    assert change.tolist() == [1, 1, 0, 0, 1, 1]
    assert without_key_bias("blocks.0.attn.qkv.weight", torch.ones(6)).sum() == 6
