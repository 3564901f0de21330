import pytest
import torch
from torch.testing import assert_close

from ssd.batch import Tokens
from ssd.errors import UserError
from ssd.heads import Branch, PrototypeHead, Prototypes, UnitPrototypes, WeightNorm, restore_lengths


def test_prototypes_are_torch_weight_norm_and_so_are_their_gradients():
    torch.manual_seed(0)
    ours = Prototypes(8, 32, train_gain=True)
    ours.weight_g.data.uniform_(0.5, 2)
    reference = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(8, 32, bias=False), dim=0)
    reference.parametrizations.weight.original0.data.copy_(ours.weight_g)
    reference.parametrizations.weight.original1.data.copy_(ours.weight_v)
    x, upstream = torch.randn(5, 8), torch.randn(5, 32)
    assert_close(x @ ours().T, reference(x))
    (x @ ours().T * upstream).sum().backward()
    (reference(x) * upstream).sum().backward()
    assert_close(ours.weight_g.grad, reference.parametrizations.weight.original0.grad)
    assert_close(ours.weight_v.grad, reference.parametrizations.weight.original1.grad)


def test_weight_norm_gradients_equal_finite_differences():
    ours = Prototypes(3, 4, train_gain=True).double()
    assert torch.autograd.gradcheck(WeightNorm.apply, (ours.weight_v, ours.weight_g, torch.float64))


def test_with_gains_held_at_one_logits_are_cosines():
    head = PrototypeHead(12, 64, hidden_dim=32, bottleneck_dim=8)
    logits = head(torch.randn(3, 5, 12) * 100).logits()
    assert logits.abs().max() <= 1 + 1e-5
    assert not head.last_layer.weight_g.requires_grad
    assert_close(head.last_layer().norm(dim=1), torch.ones(64))


def test_initial_weights_of_the_mlp_have_the_published_deviation():
    head = PrototypeHead(512, 16, hidden_dim=512, bottleneck_dim=64)
    for name, parameter in head.mlp.named_parameters():
        if name.endswith("weight"):
            assert parameter.std().item() == pytest.approx(0.02, rel=0.02)
        else:
            assert not parameter.any()


class Mean(torch.nn.Module):
    """A backbone whose features are channel means, and which counts its calls."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return Tokens(patches=x.flatten(2).mean(2)[:, None], grid=(1, 1))


class Keep(torch.nn.Module):
    def forward(self, features):
        return features


def test_a_branch_answers_views_in_their_order_with_one_pass_a_size():
    branch = Branch(Mean(), Keep())
    views = {
        "global": torch.randn(2, 3, 4, 8, 8),
        "local": torch.randn(5, 3, 4, 4, 4),
        "more": torch.randn(1, 3, 4, 4, 4),
    }
    features = branch(views)
    expected = torch.cat([v.mean((3, 4)) for v in views.values()])
    assert_close(features, expected)
    assert branch.backbone.calls == 2


def test_no_prototypes_is_refused():
    with pytest.raises(UserError, match="num_prototypes: 0"):
        PrototypeHead(8, 0)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 2**-8)])
def test_prototypes_are_made_block_by_block_and_come_in_the_dtype_of_products(monkeypatch, dtype, tolerance):
    ours = Prototypes(8, 32, train_gain=True)
    whole = ours().detach()
    (ours() * torch.arange(8)).sum().backward()
    gradients = [parameter.grad.clone() for parameter in ours.parameters()]
    ours.zero_grad()
    monkeypatch.setattr("ssd.heads.ROWS_AT_A_TIME", 5)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        prototypes = ours()
    assert prototypes.dtype == dtype
    assert_close(prototypes.float(), whole, atol=tolerance, rtol=0)
    (prototypes * torch.arange(8)).sum().backward()
    for parameter, gradient in zip(ours.parameters(), gradients):
        assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-4)


def test_under_float16_prototypes_keep_their_digits():
    with torch.autocast("cpu", torch.float16):
        assert Prototypes(8, 32)().dtype == torch.float32


def test_unit_prototypes_come_back_to_unit_length_in_their_own_direction(monkeypatch):
    monkeypatch.setattr("ssd.heads.ROWS_AT_A_TIME", 5)
    head = PrototypeHead(12, 32, hidden_dim=16, bottleneck_dim=8, renormalize=True)
    assert isinstance(head.last_layer, UnitPrototypes)
    assert_close(head.last_layer().norm(dim=1), torch.ones(32))
    moved = head.last_layer.weight.data.mul_(torch.linspace(0.5, 3, 32)[:, None]).add_(0.1).clone()
    restore_lengths(head)
    assert_close(head.last_layer(), torch.nn.functional.normalize(moved, dim=1))
    moved[3] = head.last_layer.weight.data[3] = 0.0
    restore_lengths(head)
    assert not head.last_layer.weight[3].any(), "a direction of no length stays as it is"


def test_unit_prototypes_have_no_gains():
    with pytest.raises(UserError, match="Set norm_last_layer: true"):
        PrototypeHead(8, 16, train_gain=True, renormalize=True)
