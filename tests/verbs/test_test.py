"""`ssd test`: the numbers of `ssd probe`, asked for as Lightning's verbs are."""

import json

from tests.verbs.conftest import typed

FEW = ("--measures", "knn", "ridge", "spectrum", "--device", "cpu")


def test_the_numbers_are_those_of_a_probe(run, tmp_path):
    tested, probed = tmp_path / "test.json", tmp_path / "probe.json"
    said = typed("test", "--ckpt_path", run.last, *FEW, "--json", tested)
    assert said.status == 0 and said.err == "", said.err
    assert said == typed("probe", run.last, *FEW, "--json", probed)
    assert json.loads(tested.read_text()) == json.loads(probed.read_text())


def test_a_checkpoint_is_needed_and_a_trainer_is_not(run):
    said = typed("test")
    assert said.status == 2 and "the following arguments are required: --ckpt_path" in said.err
    said = typed("test", "--ckpt_path", run.last, "--trainer.precision=bf16-mixed")
    assert said.status == 2 and "'--trainer.precision' is not a setting of ssd test" in said.err
    assert "Use --precision and --device" in said.err
