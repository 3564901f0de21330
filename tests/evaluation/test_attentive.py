import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from ssd.errors import UserError
from ssd.evaluation.attentive import (
    AttentiveHeads,
    attentive_numbers,
    attentive_predict,
    first_weights,
    heads_for,
    together,
    train_attentive,
)
from ssd.evaluation.linear import linear_predict

QUICK = dict(min_steps=80)


def one_patch_knows(samples, patches=6, width=8, classes=4, seed=0):
    """One patch, somewhere, is marked and says the class; the rest are noise. Tokens (N, P, D) float16, labels (N,)."""
    random = torch.Generator().manual_seed(seed)
    tokens = torch.randn(samples, patches, width, generator=random)
    labels = torch.randint(classes, (samples,), generator=random)
    place = torch.randint(patches, (samples,), generator=random)
    rows = torch.arange(samples)
    tokens[:, :, -1] = -1.0
    tokens[rows, place, :classes] = 3.0 * F.one_hot(labels, classes)
    tokens[rows, place, -1] = 4.0
    return tokens.half(), labels


def test_the_answer_is_that_of_torchs_attention():
    """With the same projections `scaled_dot_product_attention` of the query over projected tokens gives the logits."""
    random = torch.Generator().manual_seed(0)
    tokens = torch.randn(3, 5, 8, generator=random)
    shapes = dict(query=(2, 4, 2), key=(2, 4, 8, 2), value=(2, 4, 8, 2), weight=(2, 8, 3), bias=(2, 3))
    probe = AttentiveHeads(**{name: torch.randn(*shape, generator=random) for name, shape in shapes.items()})
    logits = probe.logits(tokens)
    for group in range(2):
        keys = torch.einsum("bpd,hde->bhpe", tokens, probe.key[group])
        values = torch.einsum("bpd,hde->bhpe", tokens, probe.value[group])
        queries = probe.query[group][None, :, None].expand(3, -1, -1, -1)
        seen = F.scaled_dot_product_attention(queries, keys, values)  # (B, H, 1, E)
        expected = seen.flatten(1) @ probe.weight[group] + probe.bias[group]
        assert_close(logits[group], expected, atol=1e-5, rtol=1e-5)


def test_it_finds_the_patch_that_knows_where_the_mean_does_not():
    (train, labels), (test, truth) = one_patch_knows(400), one_patch_knows(300, seed=1)
    (number,) = attentive_numbers(train, labels, test, truth, **QUICK)
    mean = linear_predict(train.float().mean(1), labels, test.float().mean(1))
    assert number.value > 0.97 > 0.9 > (mean.predictions == truth).float().mean()
    assert number.name == "attentive/top1" and number.chance < 0.32
    assert number.protocol.startswith("attentive-v1 one query, 8 heads, 6 patches, best of 5 rates on 10% of train: ")


def test_noise_gives_chance():
    _, labels = one_patch_knows(300)
    noise = torch.randn(1300, 6, 8, generator=torch.Generator().manual_seed(0)).half()
    truth = torch.arange(1000) % 4
    predictions = attentive_predict(noise[:300], labels, noise[300:], **QUICK).predictions
    assert (predictions == truth).float().mean().item() == pytest.approx(0.25, abs=4 * 0.014)


def test_the_order_of_patches_does_not_matter():
    (train, labels), (test, _) = one_patch_knows(100), one_patch_knows(50, seed=1)
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    first, second = (
        attentive_predict(train, labels, asked, rates=(1e-2,), min_steps=30) for asked in (test, test[:, order])
    )
    assert torch.equal(first.predictions, second.predictions)


def test_probes_trained_at_once_are_those_trained_alone():
    train, labels = one_patch_knows(100)
    rest = (4, torch.zeros(8), torch.ones(8))
    rates = (1e-3, 1e-2)
    both = train_attentive(train, labels, torch.arange(100), rates, *rest, epochs=2, min_steps=1, batch_size=20)
    alone = [
        train_attentive(train, labels, torch.arange(100), [rate], *rest, epochs=2, min_steps=1, batch_size=20)
        for rate in rates
    ]
    for one, other in zip(both.tensors(), together(alone).tensors(), strict=True):
        # Adam divides by gradients that are nearly zero at first, where rounding counts
        assert_close(one, other, atol=2e-4, rtol=1e-3)
    assert not torch.allclose(both.weight[0], both.weight[1])


def test_the_rate_is_chosen_without_the_test_set_and_the_seed_repeats():
    (train, labels), (test, _) = one_patch_knows(100), one_patch_knows(40, seed=1)
    first = attentive_predict(train, labels, test, min_steps=30)
    torch.manual_seed(99)
    again = attentive_predict(train, labels, torch.cat([test, 50 * test]), min_steps=30)
    assert first.setting == again.setting and torch.equal(first.predictions, again.predictions[:40])


def test_it_starts_with_all_patches_nearly_alike():
    probe = first_weights(16, 3, 4, seed=0)
    tokens = nn.init.normal_(torch.empty(2, 9, 16), generator=torch.Generator().manual_seed(0))
    assert torch.equal(probe.logits(tokens), torch.zeros(1, 2, 3))
    attention = (torch.einsum("ghe,ghde,bpd->bghp", probe.query, probe.key, tokens) / 2).softmax(-1)
    assert (attention - 1 / 9).abs().max() < 0.02


def test_heads_divide_the_width():
    assert [heads_for(width) for width in (384, 192, 512, 8, 13, 7)] == [12, 12, 8, 8, 1, 7]
    with pytest.raises(UserError, match="5 heads of the attentive probe do not divide features of 16"):
        first_weights(16, 3, 5, seed=0)


def test_what_cannot_be_learnt_is_said():
    train, labels = one_patch_knows(20)
    with pytest.raises(UserError, match="above 0"):
        attentive_predict(train, labels, train, rates=(0.0,))
    with pytest.raises(UserError, match="1 of the 20 train samples have none"):
        attentive_predict(train, torch.where(torch.arange(20) == 3, -1, labels), train)
    train[3, 2, 1] = float("inf")
    with pytest.raises(UserError, match="train samples are NaN or infinite"):
        attentive_predict(train, labels, train)
