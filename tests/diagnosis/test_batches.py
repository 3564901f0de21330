import math

import pytest
import torch

from ssd.batch import Batch
from ssd.diagnosis.batches import BatchFacts, diagnose_batch, first_views, guilty_rows, measure_batch

HEALTHY = BatchFacts(not_finite=0, blank=0, same_views=0, copies=0, mean=0.1, spread=0.9)


def views(**changes):
    return torch.randn(2, 10, 3, 4, 4, generator=torch.Generator().manual_seed(0))


def facts_of(x):
    return BatchFacts(*measure_batch(x).tolist())


def kinds(*facts, follows=True, least_copies=math.inf):
    return [finding.kind for finding in diagnose_batch(facts, 1, follows, least_copies)]


def test_noise_is_a_healthy_batch():
    facts = facts_of(views())
    assert (facts.not_finite, facts.blank, facts.same_views, facts.copies) == (0, 0, 0, 0)
    assert abs(facts.mean) < 0.1 and facts.spread == pytest.approx(1, abs=0.05)
    assert kinds(facts, least_copies=0.0) == []


def test_what_is_wrong_with_a_sample_is_counted_and_found():
    x = views()
    x[1, 2, 0, 1, 1] = math.inf
    x[:, 4] = torch.arange(3.0)[:, None, None]  # each channel one value
    x[1, 6] = x[0, 6]
    x[0, 8] = x[0, 9]
    facts = facts_of(x)
    assert facts.not_finite == facts.blank == facts.same_views == pytest.approx(0.1)
    assert facts.copies == pytest.approx(0.2)
    found = {
        kind: guilty_rows(kind, x).tolist()
        for kind in ("not-finite", "blank-inputs", "identical-views", "koleo-copies")
    }
    assert found == {"not-finite": [2], "blank-inputs": [4], "identical-views": [6], "koleo-copies": [8, 9]}
    assert guilty_rows("wrong-normalisation", x).tolist() == list(range(10))


def test_rearranged_pixels_are_no_copy():
    x = views()
    x[0, 1] = x[0, 0].flip(-1)
    assert facts_of(x).copies == 0


def test_one_view_has_no_other_to_be_equal_to():
    assert math.isnan(facts_of(views()[:1]).same_views) and kinds(facts_of(views()[:1])) == []


@pytest.mark.parametrize(("mean", "spread"), [(0.45, 0.27), (-2.0, 0.2), (2.4, 1.0), (0.0, 4.0)])
def test_statistics_of_other_data_and_strong_colours_are_no_fault(mean, spread):
    assert kinds(BatchFacts(0, 0, 0, 0, mean, spread)) == []


@pytest.mark.parametrize(("mean", "spread"), [(120.0, 60.0), (-2.1, 0.004), (0.0, 40.0), (30.0, 1.0)])
def test_pictures_that_were_normalised_twice_or_not_at_all_are(mean, spread):
    assert kinds(BatchFacts(0, 0, 0, 0, mean, spread)) == ["wrong-normalisation"]


def test_the_rank_that_is_wrong_is_named():
    (finding,) = diagnose_batch([HEALTHY, BatchFacts(0, 0.9, 0, 0, 0, 1)], 7, True)
    assert (finding.kind, finding.rank, finding.step) == ("blank-inputs", 1, 7) and "rank 1" in finding.message


def test_equal_views_are_no_fault_of_a_teacher_that_does_not_follow():
    same = BatchFacts(0, 0, 1.0, 0, 0, 1)
    assert kinds(same) == ["identical-views"] and kinds(same, follows=False) == []


def test_sound_is_not_looked_at():
    sound = Batch(views={"global": torch.zeros(2, 4, 100)}, index=torch.arange(4), total=4)
    assert first_views(sound) is None
    assert kinds(BatchFacts(*[math.nan] * 6), least_copies=0.0) == []
