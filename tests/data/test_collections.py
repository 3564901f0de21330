"""Data sets of torchvision and of Hugging Face, written here and opened by their names."""

import io
import pickle

import numpy as np
import pytest
from PIL import Image

from ssd.data.mixture import Mixture
from ssd.data.pictures import decode
from ssd.data.sources import Renamed, open_source
from ssd.errors import UserError


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    """A CIFAR10 of torchvision's layout with 12 pictures."""
    from torchvision.datasets import CIFAR10

    folder = tmp_path / CIFAR10.base_folder
    folder.mkdir()
    data = np.arange(12 * 3072, dtype=np.uint32).astype(np.uint8).reshape(12, 3072)
    labels = [n % 10 for n in range(12)]
    for name, rows in (("data_batch_1", slice(0, 12)), ("test_batch", slice(0, 5))):
        (folder / name).write_bytes(pickle.dumps({"data": data[rows], "labels": labels[rows]}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": [f"class {n}" for n in range(10)]}))
    monkeypatch.setattr(CIFAR10, "train_list", [["data_batch_1", None]])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", None]])
    monkeypatch.setattr(CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    return tmp_path


def test_torchvision_by_name_with_both_parts(cifar):
    source = open_source(f"torchvision:CIFAR10:{cifar}")
    assert len(source) == 12 and len(open_source(f"torchvision:CIFAR10:{cifar}:test")) == 5
    assert source.labels.tolist() == [n % 10 for n in range(12)] and source.classes[3] == "class 3"
    assert source.open(2).shape == (32, 32, 3) and source.label(11) == 1
    assert open_source(f"torchvision:CIFAR10:{cifar}", labels=False).labels is None
    assert source.fingerprint() == open_source(f"torchvision:CIFAR10:{cifar}").fingerprint()


def test_two_classes_of_one_name_stay_two(cifar):
    names = ["crane" if n in (2, 7) else f"class {n}" for n in range(10)]
    (cifar / "cifar-10-batches-py" / "batches.meta").write_bytes(pickle.dumps({"label_names": names}))
    training, separate = (open_source(f"torchvision:CIFAR10:{cifar}:{part}") for part in ("train", "test"))
    assert Renamed(separate, training.classes).labels.tolist() == [0, 1, 2, 3, 4]
    assert Renamed(training, separate.classes).labels.tolist() == [n % 10 for n in range(12)]
    assert Mixture({"a": training, "b": separate}).classes[-2:] == ["crane 2", "crane 7"]


@pytest.mark.parametrize(
    "text, said",
    [
        ("torchvision:CIFAR10", "lacks a part"),
        ("torchvision:Nothing:x", "has no 'Nothing'"),
        ("torchvision:CIFAR10:nowhere", "download=True"),
    ],
)
def test_what_torchvision_cannot_open_is_said(text, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=said):
        open_source(text)


@pytest.fixture
def saved(tmp_path):
    datasets = pytest.importorskip("datasets")
    pictures = [Image.fromarray(np.full((6, 5, 3), n, np.uint8)) for n in range(7)]
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"]), "id": datasets.Value("int64")}
    )
    rows = {"image": pictures, "label": [n % 2 for n in range(7)], "id": list(range(7))}
    train = datasets.Dataset.from_dict(rows, features=features)
    datasets.DatasetDict({"train": train, "test": train.select(range(3))}).save_to_disk(str(tmp_path / "both"))
    train.save_to_disk(str(tmp_path / "one"))
    return tmp_path


def test_a_saved_data_set_is_read_as_its_encoded_pictures(saved):
    for text, length in ((f"hf:{saved}/both", 7), (f"hf:{saved}/both:test", 3), (f"hf:{saved}/one", 7)):
        source = open_source(text)
        assert len(source) == length and source.classes == ["cat", "dog"]
        assert source.labels.tolist() == [n % 2 for n in range(length)]
        assert (decode(source.open(2)) == 2).all()
        assert Image.open(io.BytesIO(source.open(2))).size == (5, 6)


def test_a_part_that_is_not_there_is_said(saved):
    with pytest.raises(UserError, match=r"no part 'dev'.*train, test"):
        open_source(f"hf:{saved}/both:dev")


def test_a_name_that_cannot_be_fetched_is_said(monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: (_ for _ in ()).throw(ConnectionError("no network")))
    with pytest.raises(UserError, match=r"no network.*save_to_disk"):
        open_source("hf:somebody/pictures")


def test_without_the_package_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(UserError, match=r"ssd\[hub\]"):
        open_source("hf:somebody/pictures")
