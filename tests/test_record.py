"""What a checkpoint remembers of how its objects were built."""

import enum
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from datamodules.images import Images
from lightning_modules.dino import DINO
from ssd.backbones.convnet import ConvNet
from ssd.errors import UserError
from ssd.optim import Clip
from ssd.record import Recorded, build, class_path, describe, differences, import_class
from ssd.schedules import Cosine, Linear
from ssd.views.recipes import DINOViews
from tests.weights.networks import RESNET


class Part(Recorded):
    def __init__(self, size, *, names=("a",), inner=None, **more):
        self.size, self.names, self.inner, self.more = size, names, inner, more


class Derived(Part):
    def __init__(self, scale=2, **part):
        super().__init__(**part)
        self.scale = scale


@dataclass(frozen=True)
class Setting:
    start: float
    below: "Setting | None" = None
    derived: float = field(init=False, default=3.0)


class Mode(enum.Enum):
    FAST = "fast"


plain = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
nested = st.recursive(
    plain, lambda inner: st.lists(inner) | st.dictionaries(st.text(max_size=3), inner, max_size=3), max_leaves=8
)


@given(nested)
def test_plain_data_is_its_own_description(value):
    assert describe(value) == value
    assert build(describe(value)) == value


def test_an_object_comes_back_with_all_that_was_given_however_it_was_given():
    once = Part(3, names=["b", "c"], inner=Part(1), extra={"deep": [1, {"x": None}]})
    again = build(describe(once))
    assert isinstance(again, Part) and (again.size, again.names) == (3, ["b", "c"])
    assert isinstance(again.inner, Part) and again.inner.size == 1 and again.inner.names == ("a",)
    assert again.more == {"extra": {"deep": [1, {"x": None}]}}
    assert describe(again) == describe(once)


def test_a_record_reads_like_a_config_and_holds_only_what_was_given():
    assert describe(Part(3, inner=Part(1))) == {
        "class_path": "tests.test_record.Part",
        "init_args": {"size": 3, "inner": {"class_path": "tests.test_record.Part", "init_args": {"size": 1}}},
    }


def test_arguments_for_a_base_class_are_recorded_once():
    record = describe(Derived(size=4, extra=True))
    assert record["init_args"] == {"size": 4, "extra": True}
    again = build(record)
    assert (again.scale, again.size, again.more) == (2, 4, {"extra": True})


@pytest.mark.parametrize(
    "value",
    [
        Setting(1.0, Setting(2.0)),
        Linear(0.04, 0.07, until=0.3, every="epoch"),
        Cosine(1.0, 0.0, warmup="10 epochs"),
        Clip(3.0, over="tensor"),
        DINOViews(global_size=32, local_count=0),
    ],
)
def test_a_frozen_setting_comes_back_equal(value):
    assert build(describe(value)) == value


def test_paths_tuples_and_choices_become_what_yaml_can_hold():
    record = describe({"path": Path("a/b"), "pair": (1, 2), "mode": Mode.FAST, 3: "key"})
    assert record == {"path": "a/b", "pair": [1, 2], "mode": "fast", "3": "key"}
    assert yaml.safe_load(yaml.safe_dump(record)) == record


@pytest.mark.parametrize(
    "value", [torch.zeros(2), np.zeros(2), torch.nn.Linear(1, 1), lambda: None, {1, 2}, b"raw", object(), Setting]
)
def test_what_cannot_be_described_is_refused_by_the_name_of_its_argument(value):
    with pytest.raises(UserError, match=r"'value\.inner\[1\]\.x' is a \w+, which a checkpoint cannot describe"):
        describe({"inner": [0, {"x": value}]})


def test_a_part_that_cannot_be_described_is_named_within_its_owner():
    with pytest.raises(UserError, match=r"argument 'inner' is a Tensor.*ssd.record.Recorded"):
        describe(Part(1, inner=torch.zeros(1)))


@pytest.mark.parametrize(
    "path", ["ssd.nowhere.Thing", "ssd.record.Nothing", "Bare", "", "tests.test_record.Part.Inner"]
)
def test_an_unknown_class_is_the_users_to_mend(path):
    with pytest.raises(UserError, match=r"cannot be imported.*installed"):
        build({"class_path": path, "init_args": {}})


def test_a_class_is_found_where_it_was_defined():
    assert import_class(class_path(Part)) is Part


@pytest.mark.parametrize("scalar", [np.float64(0.5), np.float32(0.5), np.int64(3), np.bool_(True)])
def test_numbers_of_numpy_are_numbers(scalar, tmp_path):
    """Else a checkpoint would hold them as objects, which loading refuses."""
    record = describe({"lr": scalar})
    assert record == {"lr": scalar.item()} and type(record["lr"]) is type(scalar.item())
    torch.save(record, tmp_path / "file")
    assert torch.load(tmp_path / "file", weights_only=True) == record


def test_a_method_built_in_plain_python_is_rebuilt_from_what_loads_without_running_code(tmp_path):
    method = DINO(
        ConvNet("resnet18", in_chans=1, arguments=RESNET),
        views=DINOViews(global_size=16, local_count=1, local_size=8),
        num_prototypes=8,
        head_hidden_dim=8,
        momentum=Cosine(0.9, 1.0),
        clip=None,
        steps=7,
    )
    torch.save(describe(method), tmp_path / "file")
    again = build(torch.load(tmp_path / "file", weights_only=True))
    assert again.views == method.views and again.momentum == method.momentum
    assert again.clip is None and again.steps == 7
    shapes = {name: value.shape for name, value in method.state_dict().items() if isinstance(value, torch.Tensor)}
    assert shapes == {n: v.shape for n, v in again.state_dict().items() if isinstance(v, torch.Tensor)}


def test_data_is_rebuilt_from_its_record(tmp_path):
    data = Images(tmp_path, batch_size=3, normalize={"mean": [0.5], "std": [0.2]}, channels=1)
    again = build(describe(data))
    assert (again.path, again.batch_size, again.normalize) == (str(tmp_path), 3, data.normalize)
    assert describe(again) == describe(data)


def test_differences_are_named_as_a_config_writes_them():
    one = Part(1, inner=Cosine(1.0, 0.5), depth=2).record()
    other = Part(1, inner=Cosine(1.0, 0.1), names=["b"], depth=2).record()
    assert differences(one, one) == []
    assert differences(one, other) == ["inner.end", "names"]
    assert differences(one, Part(1, inner=Linear(1.0, 0.5), depth=2).record())[0] == "inner.class_path"
