"""`ssd compare`: several starts on the same samples, and test pictures that were seen before."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ssd.record import describe
from ssd.verbs.duplicates import LABELLED, find_duplicates
from ssd.verbs.loading import load_data
from ssd.views.recipes import PlainViews
from tests.verbs.conftest import typed

ON_CPU = ("--device", "cpu", "--workers", "0")


@pytest.fixture(scope="module")
def compared(run, tmp_path_factory):
    file = tmp_path_factory.mktemp("compare") / "compare.json"
    words = ("--baseline", "pixels", "--draws", "3", "--seeds", "2", "--finetune", "0.2", "--epochs", "1")
    said = typed("compare", run.last, "pixels", "random", *words, "--json", file, *ON_CPU)
    assert said.status == 0, said.err
    return said, json.loads(file.read_text())


def test_every_start_is_asked_the_same_and_pixels_are_not_trained(compared, run):
    said, content = compared
    assert list(content["rows"]) == [run.last, "pixels", "random"]
    questions = ["knn", "linear_1pct", "linear_10pct", "linear"]
    assert list(content["rows"]["pixels"]) == questions
    for name in (run.last, "random"):
        assert list(content["rows"][name]) == [*questions, "finetune_20pct"]
    repeated = {name: row["linear"]["repetitions"] for name, row in content["rows"].items()}
    assert repeated == {run.last: 1, "pixels": 1, "random": 2}, "random weights are drawn twice"
    assert all(row["linear_10pct"]["repetitions"] == 3 for row in content["rows"].values())
    for row in content["rows"].values():
        for question, cell in row.items():
            assert cell["low"] < cell["value"] < cell["high"], question
    assert f"{100 * content['rows']['pixels']['knn']['value']:.1f}" in said.out


def test_gains_are_over_the_baseline_and_the_best_is_beyond_chance(compared, run):
    _, content = compared
    rows = content["rows"]
    assert all(cell["gain"] is None for cell in rows["pixels"].values())
    knn = rows["random"]["knn"]
    assert knn["gain"]["value"] == pytest.approx(knn["value"] - rows["pixels"]["knn"]["value"])
    assert rows["pixels"]["knn"]["best"], "six steps of training are far from pixels"
    assert rows[run.last]["finetune_20pct"]["gain"] is None, "which pixels have not"


def test_the_numbers_are_those_of_the_probe(compared, run, tmp_path):
    file = tmp_path / "probe.json"
    said = typed(
        "probe", run.last, "--measures", "knn", "--baselines", "--draws", "3", "--json", file, "--device", "cpu"
    )
    assert said.status == 0, said.err
    probed = json.loads(file.read_text())["baselines"]
    for name, row in (("pretrained", run.last), ("pixels", "pixels")):
        for question, number in probed[name].items():
            assert compared[1]["rows"][row][question]["value"] == pytest.approx(number["value"], abs=0.002), question


@pytest.fixture
def pictures(tmp_path) -> Path:
    """40 labelled pictures; of the 8 held out one is in the other folder as it is, one as a JPEG."""
    chance = np.random.default_rng(0)
    rows, columns = np.mgrid[:32, :32] / 32
    for number in range(40):
        waves = chance.uniform(1, 9, (3, 2)) @ np.stack([rows.ravel(), columns.ravel()])
        picture = Image.fromarray((127 + 120 * np.sin(waves.sum(0).reshape(32, 32))).astype(np.uint8)).convert("RGB")
        folder = tmp_path / "labelled" / "ab"[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        picture.save(folder / f"{number:02}.png")
    (tmp_path / "seen").mkdir()
    for number in range(6):
        Image.fromarray(chance.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(tmp_path / "seen" / f"n{number}.png")
    return tmp_path


def test_test_pictures_that_were_pretrained_on_are_found(pictures):
    about = {"views": describe(PlainViews(size=32)), "channels": 3, "mean": [0.5] * 3, "std": [0.2] * 3, "data": None}
    data = load_data(["--data", str(pictures / "labelled"), "--data.val_share", "0.2"], about, "compare")
    queries = data.labelled_parts()[1]
    assert len(queries) == 8
    (pictures / "seen" / "copy.png").write_bytes(queries.open(2))
    Image.open(io.BytesIO(queries.open(5))).save(pictures / "seen" / "again.jpg", quality=80)
    images = {"class_path": "datamodules.images.Images", "init_args": {"path": str(pictures / "seen")}}
    gone = {"class_path": "datamodules.images.Images", "init_args": {"path": str(pictures / "gone")}}
    known = {"net": about | {"data": images}, "lost": about | {"data": gone}, "public": about}

    found = find_duplicates(data, known)
    assert found.seen.nonzero()[0].tolist() == [2, 5]
    assert found.counts == {LABELLED: {"exact": 0, "near": 0}, "net's pretraining": {"exact": 1, "near": 1}}
    told = "\n".join(found.texts)
    assert "1 of 8" in told and "copy.png" in told and "again.jpg" in told
    assert "lost learned from cannot be opened" in told and "public learned from is not known" in told


def test_a_comparison_is_made_without_them_too(run, pictures, tmp_path):
    """Labelled training and test data that are the same: nothing is left; half of it: the rest is judged again."""
    (pictures / "test").mkdir()
    for folder in ("a", "b"):
        (pictures / "test" / folder).mkdir()
        for number, file in enumerate(sorted((pictures / "labelled" / folder).glob("*.png"))[:10]):
            changed = Image.open(file).transpose(Image.Transpose.ROTATE_90) if number % 2 else Image.open(file)
            changed.save(pictures / "test" / folder / file.name)
    data = ("--data", pictures / "labelled", "--data.val_path", pictures / "test")
    said = typed("compare", run.last, "pixels", *data, "--draws", "2", "--json", tmp_path / "c.json", *ON_CPU)
    assert said.status == 0, said.err
    content = json.loads((tmp_path / "c.json").read_text())
    assert content["duplicates"]["counts"][LABELLED]["exact"] == 10
    assert content["without_duplicates"]["test"] == 10 and "the same without them: 10 test samples" in said.out
    whole, left = content["rows"]["pixels"]["knn"], content["without_duplicates"]["rows"]["pixels"]["knn"]
    # of 20 answers 10 are left, so that the right ones among them are at most 10 fewer
    assert 20 * whole["value"] - 10 <= 10 * left["value"] <= 20 * whole["value"]
    all_same = ("--data", pictures / "labelled", "--data.val_path", pictures / "labelled")
    said = typed("compare", run.last, "pixels", *all_same, "--draws", "2", *ON_CPU)
    assert "no test picture is left without them" in said.out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("pixels", "random"), "pixels and random alone say nothing of size and channels"),
        (("RUN", "RUN"), "is given more than once"),
        (("RUN", "pixels", "--baseline", "raw"), "--baseline raw is none of what is compared: "),
        (("RUN", "--seeds", "0"), "0 is not a whole number of at least 1"),
        (("RUN", "--finetune", "2"), "2 is not a share above 0 and at most 1"),
        (("RUN", "--data", "nowhere"), "--data nowhere is neither a path"),
        (("nowhere",), "there is no file nowhere"),
    ],
)
def test_a_mistake_is_one_message(run, words, message):
    said = typed("compare", *(run.last if word == "RUN" else word for word in words))
    assert said.status == 2 and message in said.err and said.err.count("\n") == 1, said
