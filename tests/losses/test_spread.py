import math

import pytest
import torch
from torch.testing import assert_close

from ssd.errors import UserError
from ssd.losses.spread import koleo


def at(*degrees):
    angles = torch.deg2rad(torch.tensor(degrees, dtype=torch.float64))
    return torch.stack([angles.cos(), angles.sin()], dim=1).float()


@pytest.mark.parametrize(
    "features, mean",
    [
        (at(0, 90), -math.log(math.sqrt(2))),
        (at(0, 60, 180), -math.log(3) / 6),
        (torch.ones(5, 384), 15.3956),
        (torch.ones(5, 1024), 14.9242),
        (at(0, 180), -math.log(2)),  # as far apart as can be: still not its own neighbour
    ],
)
def test_closed_forms(features, mean):
    scaled = features * torch.arange(1, len(features) + 1)[:, None]
    for same in (features, scaled):
        found = koleo(same[None], group_size=len(features))
        assert found.shape == (1, len(features)) and found.mean() == pytest.approx(mean, abs=1e-4)


def plain(features, group_size):
    """One sample after the other."""
    views, batch, _ = features.shape
    unit = features / features.norm(dim=-1, keepdim=True)
    rows = []
    for v in range(views):
        for i in range(batch):
            first = i // group_size * group_size
            others = [j for j in range(first, first + group_size) if j != i]
            nearest = max(others, key=lambda j: float((unit[v, i] @ unit[v, j]).detach()))
            distance = (unit[v, i] - unit[v, nearest] + 1e-8).norm()
            rows.append(-torch.log(distance + 1e-8))
    return torch.stack(rows).view(views, batch)


@pytest.mark.parametrize("group_size", [2, 4, 12])
def test_it_is_the_loop_over_samples_of_one_view_and_group_and_so_is_its_gradient(group_size):
    torch.manual_seed(0)
    ours = torch.randn(2, 12, 5, requires_grad=True)
    theirs = ours.detach().clone().requires_grad_()
    found, expected = koleo(ours, group_size), plain(theirs, group_size)
    assert_close(found, expected)
    weights = torch.rand(2, 12)
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    assert_close(ours.grad, theirs.grad)


def test_half_precision_is_worked_out_in_single():
    features = torch.randn(1, 8, 16).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(koleo(features, 8), plain(features.float(), 8), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("group_size", [2, 4, 8])
def test_two_processes_give_the_losses_and_gradients_of_one(pair, group_size):
    features = torch.randn(2, 8, 5, generator=torch.Generator().manual_seed(0), requires_grad=True)
    whole = koleo(features, group_size)
    (whole * torch.arange(16.0).view(2, 8)).sum().backward()
    for rank, (loss, gradient) in enumerate(pair.run(of_rank, group_size)):
        mine = slice(rank * 4, rank * 4 + 4)
        assert_close(loss, whole[:, mine].detach())
        assert_close(gradient, features.grad[:, mine])


def of_rank(rank, world, group_size):
    features = torch.randn(2, 8, 5, generator=torch.Generator().manual_seed(0))
    mine = features[:, rank * 4 : rank * 4 + 4].clone().requires_grad_()
    loss = koleo(mine, group_size)
    (loss * torch.arange(16.0).view(2, 8)[:, rank * 4 : rank * 4 + 4]).sum().backward()
    return loss.detach(), mine.grad


@pytest.mark.parametrize("group_size, message", [(1, "no neighbours"), (3, "does not fit 8"), (16, "does not fit 8")])
def test_groups_that_do_not_fit_are_refused(group_size, message):
    with pytest.raises(UserError, match=f"koleo_group: {group_size}.*{message}"):
        koleo(torch.randn(1, 8, 4), group_size)
