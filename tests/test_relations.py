import math

import pytest
import torch
from torch.testing import assert_close

from ssd.errors import UserError
from ssd.relations import KINDS, compared, relation_divergence, relation_logits


def qkv(batch: int = 2, heads: int = 3, tokens: int = 5, dims: int = 4, seed: int = 0) -> torch.Tensor:
    return torch.randn(3, batch, heads, tokens, dims, generator=torch.Generator().manual_seed(seed))


def relations(tapped: torch.Tensor, kind: str = "qk") -> torch.Tensor:
    return relation_logits(compared(tapped, kind, tapped.shape[2])).softmax(-1)


def test_worked_divergence_of_two_rows():
    """KL((.5, .5) | (.25, .75)) = .5 ln 2 + .5 ln(2 / 3) = .14384."""
    teacher, student = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.25, 0.75]).log()
    assert_close(relation_divergence(student, teacher), torch.tensor(0.14384), atol=1e-5, rtol=0)
    assert_close(relation_divergence(student + 3, teacher - 7), torch.tensor(0.14384), atol=1e-5, rtol=0)
    assert relation_divergence(teacher, student) != relation_divergence(student, teacher)


def test_a_student_that_relates_as_its_teacher_pays_nothing_and_is_not_moved():
    logits = relation_logits(compared(qkv(), "qk", 3)).requires_grad_()
    apart = relation_divergence(logits, logits.detach())
    assert apart.shape == (2, 3, 5) and not apart.any()
    apart.sum().backward()
    assert logits.grad.abs().max() < 1e-7


@pytest.mark.parametrize(("kind", "places"), KINDS.items())
def test_relations_are_those_of_a_loop_over_heads_and_tokens(kind, places):
    tapped = qkv()
    found = relations(tapped, kind)
    for sample in range(2):
        for head in range(3):
            first, second = (tapped[place, sample, head].double() for place in places)
            for row in range(5):
                exponents = [math.exp(float(first[row] @ second[column]) / 2) for column in range(5)]  # sqrt(4)
                expected = torch.tensor([value / sum(exponents) for value in exponents])
                assert_close(found[sample, head, row], expected, atol=1e-5, rtol=1e-4)


def test_turning_queries_and_keys_alike_turns_nothing_of_the_relation():
    turn = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(3)))[0]
    assert_close(relations(qkv() @ turn), relations(qkv()), atol=1e-5, rtol=1e-4)
    stretched = qkv() @ torch.diag(torch.tensor([2.0, 1.0, 1.0, 1.0]))
    assert (relations(stretched) - relations(qkv())).abs().max() > 0.01


def test_heads_are_put_side_by_side_and_cut_anew_where_their_number_differs():
    tapped = qkv(heads=2, dims=6)
    pair = compared(tapped, "kk", 3)
    assert pair.shape == (2, 2, 3, 5, 4)
    side_by_side = torch.cat([tapped[1, :, 0], tapped[1, :, 1]], dim=-1)  # (B, n, 12)
    for head in range(3):
        assert torch.equal(pair[0, :, head], side_by_side[..., 4 * head : 4 * head + 4])
    assert torch.equal(compared(tapped, "vv", 2)[0], tapped[2])
    with pytest.raises(UserError, match="5 do not divide a width of 12"):
        compared(tapped, "qk", 5)
    with pytest.raises(UserError, match="Choose one of qk, kk, vv"):
        compared(tapped, "qv", 2)
