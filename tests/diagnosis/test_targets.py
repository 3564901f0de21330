"""The numbers that tell collapse from sharpness, by hand, and over processes."""

import math

import pytest
import torch

from ssd.batch import Rows, Targets, Whole
from ssd.diagnosis.targets import measured_use, target_use


def used(targets, centers=None):
    return {
        kind: target_use(size, *state.tolist()) for kind, (size, state) in measured_use(targets, centers or {}).items()
    }


def test_sharp_targets_that_differ_are_no_collapse_and_those_that_agree_are():
    apart = used(Targets(probs=torch.eye(8)[None]))["picture"]
    assert (apart.num_prototypes, apart.rows, apart.entropy) == (8, 8, 0)
    assert apart.perplexity == pytest.approx(8) and apart.uniformity == 0
    alike = used(Targets(probs=torch.eye(8)[[3] * 6][None]))["picture"]
    assert alike.entropy == 0 and alike.perplexity == pytest.approx(1) and alike.most == 6
    uniform = used(Targets(probs=torch.full((2, 3, 8), 1 / 8)))["picture"]
    assert uniform.uniformity == pytest.approx(1) and uniform.entropy == pytest.approx(math.log(8))


def test_half_precision_around_it_costs_no_digit():
    probs = torch.softmax(torch.randn(2, 64, 1024, generator=torch.Generator().manual_seed(0)), -1)
    exact = used(Targets(probs=probs))["picture"]
    with torch.autocast("cpu", torch.bfloat16):
        assert used(Targets(probs=probs))["picture"] == exact


def test_padded_patches_do_not_count():
    rows = torch.cat([torch.eye(4)[:2], torch.full((3, 4), 0.25)])
    targets = Targets(
        probs=torch.eye(4)[None], patch_probs=Rows(rows), patch_weight=Rows(torch.tensor([0.5, 1.0, 0, 0, 0]))
    )
    patch = used(targets)["patch"]
    assert patch.rows == 2 and patch.entropy == 0 and patch.perplexity == pytest.approx(2)


def test_a_centre_is_compared_with_the_logits_it_averages():
    logits = torch.tensor([[[3.0, 0.0], [3.0, 8.0]]])  # mean (3, 4)
    targets = Targets(probs=logits.softmax(-1), logits=logits)
    assert used(targets, {"picture": torch.tensor([3.0, 4.0])})["picture"].center_share == pytest.approx(1)
    assert used(targets, {"picture": torch.tensor([0.0, 10.0])})["picture"].center_share == pytest.approx(2)
    assert used(targets)["picture"].center_share is None


def test_the_centre_of_patches_too():
    probs = torch.full((3, 2), 0.5)
    targets = Targets(
        probs=probs[None],
        patch_probs=Rows(probs),
        patch_weight=Rows(torch.ones(3)),
        patch_features=Whole(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]])),
        patch_prototypes=Whole(6 * torch.eye(2)),
    )  # mean logits (3, 3)
    assert used(targets, {"patch": torch.tensor([6.0, 6.0])})["patch"].center_share == pytest.approx(2)


def use_of_rank(rank, world):
    probs = torch.eye(8).view(2, 4, 8)[rank]
    return used(Targets(probs=probs[None], logits=probs[None]), {"picture": torch.ones(8)})["picture"]


def test_prototypes_in_use_are_those_of_all_processes(pair):
    for found in pair.run(use_of_rank):
        assert found.rows == 8 and found.perplexity == pytest.approx(8)
        assert found.center_share == pytest.approx(8)  # of a mean of 1/8 in each
