"""Answers sample by sample: the numbers of the report, and who is better beyond chance."""

import pytest
import torch

from ssd.errors import UserError
from ssd.evaluation.answers import Answers, compared, over_initialisations, probe_answers
from ssd.evaluation.suite import few_label_report
from tests.evaluation.samples import clouds


def test_the_share_of_right_answers_is_the_number_of_the_report():
    train, labels = clouds(200)
    test, truth = clouds(100, seed=1)
    found = probe_answers(train, labels, test, truth, draws=4, seed=2)
    report = few_label_report({"row": (train, test)}, labels, truth, draws=4, seed=2)["row"]
    assert found.keys() == report.keys()
    for question, answers in found.items():
        assert answers.correct.shape == (4 if "pct" in question else 1, 100)
        assert float(answers.correct.double().mean()) == pytest.approx(report[question].value, abs=1e-9)


def test_labels_that_are_missing_are_an_error():
    train, labels = clouds(40)
    with pytest.raises(UserError, match="needs labels, and 40 of the 40"):
        probe_answers(train, torch.full_like(labels, -1), train, labels)


def test_draws_are_shared_out_over_initialisations():
    """Draw number d is answered by initialisation d modulo 2; what is asked once is asked of each."""

    def answers(value: bool) -> dict[str, Answers]:
        return {"few": Answers(torch.full((5, 3), value), "p"), "all": Answers(torch.full((1, 3), value), "p")}

    joined = over_initialisations([answers(True), answers(False)])
    assert joined["few"].correct[:, 0].tolist() == [True, False, True, False, True]
    assert joined["all"].correct[:, 0].tolist() == [True, False]


def test_the_best_is_named_only_where_it_beats_every_other_beyond_chance():
    def row(count: int) -> dict[str, Answers]:
        return {"knn": Answers((torch.arange(400) < count)[None], "p")}

    cells = compared({"a": row(200), "b": row(280), "c": row(282)}, baseline="a")
    assert cells["a"]["knn"].gain is None
    assert cells["b"]["knn"].gain.value == pytest.approx(0.2) and cells["b"]["knn"].gain.beyond_chance
    assert not any(cells[name]["knn"].best for name in "abc"), "two more of 400 are chance"
    cells = compared({"a": row(200), "b": row(280), "c": row(300)}, baseline="b")
    assert [cells[name]["knn"].best for name in "abc"] == [False, False, True]


def test_a_row_may_lack_a_question():
    asked = Answers(torch.ones(1, 50, dtype=torch.bool), "p")
    cells = compared({"pixels": {"knn": asked}, "net": {"knn": asked, "finetune": asked}}, baseline="pixels")
    assert list(cells["net"]) == ["knn", "finetune"]
    assert cells["net"]["finetune"].gain is None and not cells["net"]["finetune"].best
