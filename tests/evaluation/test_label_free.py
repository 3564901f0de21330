"""What a run says of itself without labels: values by hand, and what must not matter."""

import math

import pytest
import torch
from torch.testing import assert_close

from ssd.evaluation.label_free import PrototypeUse, agreement_number, prototype_numbers
from tests.evaluation.samples import clouds


def use_of(*batches):
    use = PrototypeUse()
    for probs in batches:
        use.add(probs)
    return {number.name: number.value for number in prototype_numbers(use.state())}


def test_prototypes_in_use_by_hand():
    """Four views of eight prototypes; masses 2, 1, 1: perplexity exp(.5 ln 2 + .5 ln 4) = 2 sqrt 2; three of four chosen."""
    probs = torch.eye(8)[[0, 0, 1, 2]]
    assert use_of(probs) == pytest.approx({"prototypes/perplexity": 2 * math.sqrt(2), "prototypes/used": 3 / 4})


def test_every_view_alike_uses_one_prototype_or_all_softly():
    one = use_of(torch.eye(8)[[3] * 16])
    assert one == pytest.approx({"prototypes/perplexity": 1, "prototypes/used": 1 / 8})
    assert use_of(torch.full((16, 8), 1 / 8))["prototypes/perplexity"] == pytest.approx(8)


def test_prototypes_in_use_do_not_depend_on_how_views_fall_into_batches():
    probs = torch.rand(2, 12, 8, generator=torch.Generator().manual_seed(0)).softmax(-1)
    assert use_of(probs) == pytest.approx(use_of(probs[:, :5], probs[:, 5:]), rel=1e-5)


def test_agreement_is_one_up_to_scale_and_place_and_zero_of_what_is_apart():
    features, _ = clouds(400)
    assert_close(agreement_number(features, 3 * features + 7).value, 1.0)
    assert_close(agreement_number(features, -features).value, -1.0)
    noise = torch.randn(400, 16, generator=torch.Generator().manual_seed(0))
    other = torch.randn(400, 16, generator=torch.Generator().manual_seed(1))
    assert abs(agreement_number(noise, other).value) < 3 / math.sqrt(400 * 16) * 1.5
