"""`ssd report`: a page of what a run of ssd fit leaves."""

import json

import pytest

from ssd.facts import read_facts
from tests.verbs.conftest import typed


def test_a_run_of_fit_has_a_page_with_all_that_it_knows(run, tmp_path):
    said = typed("report", run.folder, "--out", tmp_path / "a.html", "--json", tmp_path / "a.json")
    assert (said.status, said.err) == (0, ""), said
    assert "(finished): DINO trained resnet18 (18,912 parameters) on Digits, 96 samples, for 6 steps" in said.out
    (row,) = json.loads((tmp_path / "a.json").read_text())["runs"]
    assert (row["state"], row["step"], row["total"], row["problems"]) == ("finished", 6, 6, [])
    assert row["pictures"] == {"views": 1, "neighbours": 2}
    assert {number["name"]: number["value"] for number in row["numbers"]} == {
        number["name"]: number["value"] for number in run.numbers["numbers"]
    }
    text = (tmp_path / "a.html").read_text()
    facts = read_facts(run.folder)
    for word in (facts["data"]["fingerprint"], "knn-v1", f"ssd export {run.folder}", facts["environment"]["torch"]):
        assert word in text


def test_a_run_says_what_it_is_while_it_goes_and_at_its_end(run):
    facts = read_facts(run.folder)
    (session,) = facts["sessions"]
    assert session["step"] == facts["total_steps"] == 6 and session["ended"] and session["seconds"] > 0
    assert facts["data"]["samples"] == {"training": 96, "held-out": 500} and facts["data"]["num_classes"] == 10
    assert [number["name"] for number in facts["numbers"]] == [n["name"] for n in run.numbers["numbers"]]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], ["RUN"]),
        (["gone"], ["gone is no folder of a run"]),
        (["."], ["holds nothing that a run leaves"]),
        (["RUN", "--out", "page.pdf"], ["--out page.pdf", ".html"]),
        (["RUN", "--out", "/"], ["--out /"]),
    ],
)
def test_a_mistake_is_one_message(run, tmp_path, monkeypatch, argv, words):
    monkeypatch.chdir(tmp_path)
    said = typed("report", *(run.folder if word == "RUN" else word for word in argv))
    assert said.status == 2 and said.out == "" and said.err.count("\n") == 1, said
    assert all(word in said.err for word in words), said.err
