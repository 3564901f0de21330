"""The record is what restatements of the equations give, ours agree with it, and what is broken is seen."""

import math
import zlib

import pytest
import torch

import lightning_modules.dino
import ssd.losses.prototype
from lightning_modules.dinov3 import DINOv3
from ssd.masking.recipes import BlockMasks
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


@pytest.mark.parametrize("name", RESTATED)
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


METHODS = [name for name in BY_NAME if name.endswith("20 steps")]
FAULTS = [
    (momentum_off, {"teacher average"} | set(METHODS) - {"RandomTeacher, 20 steps"}),
    (temperature_off, set(METHODS) - {"RandomTeacher, 20 steps"}),  # whose temperatures are plain numbers
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
    (clip_too_late, {"clipping"} | set(METHODS) - {"RandomTeacher, 20 steps"}),
    (anchored_once, {"DINOv3 with Gram, 20 steps"}),
    (no_trust, {"optimisers"}),
    (other_epsilon, {"optimisers"}),
]


@pytest.mark.parametrize("fault, named", FAULTS, ids=[fault.__name__ for fault, _ in FAULTS])
def test_a_fault_is_seen_by_every_case_that_holds_it_and_by_no_other(fault, named, monkeypatch):
    fault(monkeypatch)
    looked_at = [name for name in BY_NAME if name in named or not name.startswith("masks")]
    assert {name for name in looked_at if not row(name)["ok"]} == named


def test_blocks_of_another_size_are_another_law(monkeypatch):
    smaller_blocks(monkeypatch)
    found = row("masks, blocks (iBOT)")
    assert not found["ok"] and found["worst"] == "neighbours"


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
