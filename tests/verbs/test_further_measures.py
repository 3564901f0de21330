"""`ssd probe`: what is asked for by name."""

import json

import numpy as np
import pytest
from PIL import Image

from ssd.evaluation.clustering import clustering_numbers
from ssd.evaluation.ood import ood_numbers
from ssd.evaluation.protocol import Number
from ssd.evaluation.retrieval import retrieval_numbers
from ssd.verbs.loading import load_data, load_module
from ssd.verbs.probe import features_of
from tests.verbs.conftest import typed

ON_CPU = ("--device", "cpu", "--cache", "none")


def test_measures_that_are_named_are_those_of_the_features(run, tmp_path):
    file = tmp_path / "probe.json"
    names = ("few_shot", "retrieval", "ood", "calibration", "clustering")
    said = typed("probe", run.last, "--measures", *names, "--json", file, *ON_CPU)
    assert said.status == 0 and said.err == "", said.err
    content = json.loads(file.read_text())
    groups = [number["name"].partition("/")[0] for number in content["numbers"]]
    assert list(dict.fromkeys(groups)) == [
        *("few_shot", "retrieval", "ood_knn", "ood_mahalanobis", "calibration", "calibration_scaled", "clustering")
    ]
    module, about = load_module(run.last)
    data = load_data([], about, "probe")
    bank, queries = features_of(module.evaluated_backbone, data, ["knn"], "pretrained", device="cpu")
    both = (bank.features, bank.labels, queries.features, queries.labels)
    found = {number["name"]: number for number in content["numbers"]}
    for number in (*retrieval_numbers(*both), *ood_numbers(*both), *clustering_numbers(*both)):
        assert found[number.name] == vars(number) and number.protocol.partition(" ")[0] in said.out


def test_the_confusion_is_a_picture_and_five_pairs(run, tmp_path):
    file, picture = tmp_path / "probe.json", tmp_path / "confusion.png"
    said = typed("probe", run.last, "--measures", "spectrum", "--confusion", picture, "--json", file, *ON_CPU)
    assert said.status == 0, said.err
    found = json.loads(file.read_text())["confusion"]
    assert len(found["top1"]) == 10 and all(0 <= share <= 1 for share in found["top1"].values())
    pairs = found["pairs"]
    assert len(pairs) == 5 and all(pair in said.out and "taken for" in pair for pair in pairs)
    assert Image.open(picture).size[0] > 400


def test_segmentation_needs_no_classes(run, tmp_path):
    """A picture that is bright or dark, whole, and the class of all its pixels: even one patch tells."""
    random = np.random.default_rng(0)
    for number in range(20):
        level = number % 2
        for folder, values in (
            ("pictures", random.integers(200 * level, 200 * level + 50, (16, 16), dtype=np.uint8)),
            ("maps", np.full((16, 16), level, np.uint8)),
        ):
            (tmp_path / folder).mkdir(exist_ok=True)
            Image.fromarray(values).save(tmp_path / folder / f"{number}.png")
    file = tmp_path / "probe.json"
    said = typed(
        *("probe", run.last, "--data", tmp_path / "pictures", "--measures", "segmentation"),
        *("--labels", tmp_path / "maps", "--json", file, *ON_CPU),
    )
    assert said.status == 0, said.err
    found = {number["name"]: number["value"] for number in json.loads(file.read_text())["numbers"]}
    assert found["segmentation/linear/miou"] == found["segmentation/knn/miou"] == 1.0


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--measures", "segmentation"], ["--labels MAPS together"]),
        (["--labels", "maps"], ["--measures segmentation"]),
        (["--measures", "attentive"], ["1 patch a sample", "leave the measure attentive out"]),
        (["--confusion", "pairs.txt"], ["--confusion pairs.txt is no name of a picture"]),
        (["--confusion", "/nowhere/at/all.png", "--measures", "knn"], ["--confusion"]),
        (["--measures", "segmentation", "--labels", "maps"], ["no folder of label maps 'maps'"]),
    ],
)
def test_a_mistake_is_one_message(run, more, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    more = [str(tmp_path / "file" / "all.png") if word.startswith("/nowhere") else word for word in more]
    said = typed("probe", run.last, *more, *ON_CPU)
    assert said.status == 2 and said.err.count("\n") == 1, said
    assert all(word in said.err for word in words), said.err


@pytest.mark.parametrize(
    ("name", "value", "chance", "texts"),
    [
        ("retrieval/map", 0.4312, 0.1, ("43.1", "10.0")),
        ("dense/correspondence", 0.3456, 0.1, ("34.6", "10.0")),
        ("spectrum/rankme", 51.44, None, ("51.4", "")),
        ("calibration/nll", 0.11294, 2.3, ("0.113", "2.300")),
    ],
)
def test_shares_are_written_in_percent_and_nothing_else_is(name, value, chance, texts):
    number = Number(name, value, "", chance)
    assert (number.text(), number.chance_text()) == texts
