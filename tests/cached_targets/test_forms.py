"""Half precision and samples: how far from the whole they are, and that on average they are not."""

import pytest
import torch
from torch.testing import assert_close

from ssd.cached_targets.forms import Form, Sampled, drawn_classes, picked
from ssd.errors import UserError
from ssd.losses.divergence import divergence, drawn_divergence

TOKENS, LOGITS = Sampled(tokens={"patches": 2}), Sampled(logits=("logits",))
LOOKS = [(0, 1, index) for index in range(3)]


def features() -> dict[str, torch.Tensor]:
    return {
        "patches": torch.randn(2, 3, 16, 5, generator=torch.Generator().manual_seed(0)),
        "cls": torch.randn(2, 3, 5),
    }


def test_half_precision_rounds_each_number_by_one_part_in_2048_at_most():
    answers = features()
    stored = Form("float16").stored(answers, TOKENS, LOOKS)
    assert stored["patches"].shape == (3, 2, 16, 5) and stored["patches"].dtype == "float16"
    back = torch.from_numpy(stored["patches"]).transpose(0, 1).float()
    apart = (back - answers["patches"]).abs() / answers["patches"].abs()
    assert 0 < apart.max() <= 1 / 2048
    exact = Form("float32").stored(answers, TOKENS, LOOKS)["patches"]
    assert torch.equal(torch.from_numpy(exact).transpose(0, 1), answers["patches"])


def test_numbers_that_the_type_does_not_hold_are_refused():
    with pytest.raises(UserError, match=r"patches reach 7e\+04\. Use float32"):
        Form("float16").stored({"patches": torch.full((1, 3, 4, 2), 7e4)}, TOKENS, LOOKS)
    with pytest.raises(UserError, match="not all finite"):
        Form("float32").stored({"patches": torch.full((1, 3, 4, 2), torch.nan)}, TOKENS, LOOKS)


def test_tokens_are_drawn_evenly_by_the_look_and_stored_with_their_places():
    answers = features()
    stored = Form("float32", tokens=6).stored(answers, TOKENS, LOOKS)
    places = torch.from_numpy(stored["places"]).transpose(0, 1).long()  # (V, B, n)
    assert stored["patches"].shape == (3, 2, 6, 5) and places.shape == (2, 3, 6)
    assert (places.diff(dim=-1) > 0).all() and stored["places"].dtype == "int32"
    assert torch.equal(picked(answers["patches"], places), torch.from_numpy(stored["patches"]).transpose(0, 1))
    assert stored["cls"].shape == (3, 2, 5), "what has no tokens is whole"
    alone = Form("float32", tokens=6).stored({k: v[:, 1:2] for k, v in answers.items()}, TOKENS, LOOKS[1:2])
    assert (alone["places"][0] == stored["places"][1]).all(), "whatever lies beside it"

    many = {"patches": torch.zeros(1, 4000, 16, 1)}
    drawn = Form("float32", tokens=4).stored(many, TOKENS, [(0, 0, index) for index in range(4000)])["places"]
    shares = torch.from_numpy(drawn).long().flatten().bincount(minlength=16) / 4000
    assert_close(shares, torch.full((16,), 0.25), atol=0.03, rtol=0)  # four deviations


def test_picked_takes_places_of_any_axis():
    tokens = torch.arange(2 * 1 * 3 * 4 * 2).reshape(2, 1, 3, 4, 2)
    places = torch.tensor([[[0, 3]], [[1, 2]]])
    found = picked(tokens, places, axis=3)
    assert found.shape == (2, 1, 3, 2, 2)
    assert torch.equal(found[0], tokens[0][:, :, [0, 3]]) and torch.equal(found[1], tokens[1][:, :, [1, 2]])
    assert picked(tokens, None, axis=3) is tokens


def test_a_class_is_drawn_as_often_as_its_probability_says_and_never_one_time_more_or_less():
    """Of .5, .3, .15, .05 in ten draws: 5, 3, 1 or 2, 0 or 1; and on average exactly so."""
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().expand(200, 4)
    start = (torch.arange(200) + 0.5) / 200
    counts = torch.stack([row.bincount(minlength=4) for row in drawn_classes(logits, 10, start)]).double()
    assert_close(counts.mean(0), torch.tensor([5.0, 3.0, 1.5, 0.5]).double(), atol=1e-6, rtol=0)
    assert (counts[:, :2] == torch.tensor([5, 3])).all()
    assert counts[:, 2].unique().tolist() == [1, 2] and counts[:, 3].unique().tolist() == [0, 1]


def test_the_divergence_of_draws_and_its_gradient_are_those_of_all_classes_on_average():
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(1, 4, 24, generator=generator, dtype=torch.float64) * 2
    student = torch.randn(1, 4, 24, generator=generator, dtype=torch.float64).requires_grad_()
    log_probs = torch.log_softmax(target, dim=-1)
    entropy = -(log_probs.exp() * log_probs).sum(-1)
    expected = divergence(student, log_probs, 0.5)
    (gradient,) = torch.autograd.grad(expected.sum(), student)
    starts = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    values, gradients = [], []
    for start in starts[::20]:
        drawn = drawn_classes(target, 3, start.expand(1, 4))
        value = drawn_divergence(student, drawn, entropy, 0.5)
        gradients.append(torch.autograd.grad(value.sum(), student)[0])
        values.append(value.detach())
    spread = torch.stack(values).std(0)
    assert (spread > 0.05).all(), "each estimate is far off by itself"
    assert_close(torch.stack(values).mean(0), expected.detach(), atol=5e-3, rtol=0)
    assert_close(torch.stack(gradients).mean(0), gradient, atol=5e-3, rtol=0)


def test_draws_and_entropy_stand_in_place_of_logits():
    logits = torch.randn(1, 3, 24)
    stored = Form("float16", classes=5).stored({"logits": logits}, LOGITS, LOOKS)
    assert set(stored) == {"classes", "entropy"} and stored["classes"].shape == (3, 1, 5)
    assert stored["classes"].dtype == "int32" and stored["entropy"].dtype == "float32"


@pytest.mark.parametrize(
    ("form", "sampled", "said"),
    [
        (Form(tokens=4), Sampled(), "Leave --tokens out"),
        (Form(classes=4), TOKENS, "Leave --classes out"),
        (Form(tokens=16), TOKENS, "Use 1 to 15"),
    ],
)
def test_a_form_that_a_method_cannot_use_is_refused(form, sampled, said):
    with pytest.raises(UserError, match=said):
        form.stored(features(), sampled, LOOKS)
