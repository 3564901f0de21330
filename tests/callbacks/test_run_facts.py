"""What a run says of itself: sessions add up, and how it died is known."""

import pytest

from ssd.callbacks.run_facts import RunFacts, commit
from ssd.facts import read_facts, write_facts
from tests.lightning_modules.runs import At, digits, fit, last, vit


def few():
    """3 steps an epoch."""
    return digits(limit=48)


def test_a_run_that_goes_on_adds_a_session(tmp_path):
    fit(tmp_path, vit(), few(), callbacks=[RunFacts(), At(4, lambda trainer, module: stop(trainer))])
    (first,) = read_facts(tmp_path)["sessions"]
    assert (first["from_step"], first["step"], first["ended"]) == (0, 4, True)
    fit(tmp_path, vit(), few(), callbacks=[RunFacts()], resume=last(tmp_path))
    facts = read_facts(tmp_path)
    before, second = facts["sessions"]
    assert before == first and (second["from_step"], second["step"]) == (4, 9) and facts["total_steps"] == 9
    fit(tmp_path, vit(), few(), callbacks=[RunFacts()])
    assert len(read_facts(tmp_path)["sessions"]) == 1, "a new run in an old folder is a new run"


def stop(trainer) -> None:
    trainer.should_stop = True


def test_how_a_run_died_is_kept(tmp_path):
    def fail(trainer, module):
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        fit(tmp_path, vit(), few(), callbacks=[RunFacts(), At(2, fail)])
    (session,) = read_facts(tmp_path)["sessions"]
    assert session["error"] == "RuntimeError: out of memory" and session["step"] == 2 and session["ended"]


def test_facts_that_cannot_be_read_are_none(tmp_path):
    assert read_facts(tmp_path) == {}
    for broken in ("{", "[1]"):
        (tmp_path / "run.json").write_text(broken)
        assert read_facts(tmp_path) == {}
    write_facts(tmp_path / "new", {"a": 1})
    assert read_facts(tmp_path / "new") == {"a": 1} and len(list((tmp_path / "new").iterdir())) == 1


def test_source_in_a_repository_names_its_commit():
    found = commit()
    assert found is None or (len(found) == 12 and set(found) <= set("0123456789abcdef"))
