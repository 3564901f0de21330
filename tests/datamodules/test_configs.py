"""The data configs name what exists."""

import inspect
from pathlib import Path

import pytest
import yaml
from jsonargparse import ArgumentParser

from datamodules.base import SampleData
from datamodules.clips import Clips
from datamodules.digits import Digits
from datamodules.images import Images
from datamodules.sound import Sound
from ssd.record import build

CLASSES = {cls.__name__: cls for cls in (Clips, Digits, Images, Sound)}
CONFIGS = sorted((Path(__file__).parents[2] / "configs" / "data").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_each_data_config_builds_and_says_only_what_differs(path):
    config = yaml.safe_load(path.read_text())
    assert set(config) == {"data"}
    cls = CLASSES[config["data"]["class_path"]]
    given = config["data"].get("init_args", {})
    bases = [base for base in reversed(cls.__mro__) if issubclass(base, SampleData)]
    defaults = {name: value for base in bases for name, value in signature(base).items()}
    assert all(name in defaults and defaults[name] != value for name, value in given.items())
    data = build({"class_path": f"{cls.__module__}.{cls.__name__}", "init_args": given})
    assert data.record()["init_args"] == given


def signature(cls) -> dict:
    return {name: parameter.default for name, parameter in inspect.signature(cls).parameters.items()}


@pytest.mark.parametrize(
    ("typed", "arguments"),
    [
        (["--data.cache", "false", "--data.labels", "true"], {"cache": False, "labels": True}),
        (["--data.cache", "auto", "--data.normalize", "imagenet"], {"cache": "auto", "normalize": "imagenet"}),
        (
            ["--data.channels", "1", "--data.normalize", "{mean: [0.5], std: [0.25]}"],
            {"channels": 1, "normalize": {"mean": [0.5], "std": [0.25]}},
        ),
    ],
)
def test_settings_arrive_from_a_command_line_as_they_are_meant(typed, arguments):
    parser = ArgumentParser()
    parser.add_subclass_arguments(SampleData, "data")
    config = parser.parse_args(["--data", "Images", "--data.path", "somewhere", *typed])
    given = parser.instantiate_classes(config).data.record()["init_args"]
    assert given["path"] == "somewhere" and arguments.items() <= given.items()


@pytest.mark.parametrize(
    ("name", "typed", "arguments"),
    [
        ("Clips", ["--data.cache", "2.5", "--data.short_side", "null"], {"cache": 2.5, "short_side": None}),
        ("Clips", ["--data.cache", "true", "--data.normalize", "imagenet"], {"cache": True, "normalize": "imagenet"}),
        ("Clips", ["--data.cache", "auto", "--data.labels", "false"], {"cache": "auto", "labels": False}),
        ("Sound", ["--data.batch_seconds", "30", "--data.seed", "3"], {"batch_seconds": 30.0, "seed": 3}),
        ("Sound", ["--data.label_pattern", "(?P<label>[0-9])_"], {"label_pattern": "(?P<label>[0-9])_"}),
    ],
)
def test_settings_of_clips_and_sound_arrive_as_they_are_meant(name, typed, arguments):
    parser = ArgumentParser()
    parser.add_subclass_arguments(SampleData, "data")
    config = parser.parse_args(["--data", name, "--data.path", "somewhere", *typed])
    given = parser.instantiate_classes(config).data.record()["init_args"]
    assert given["path"] == "somewhere" and arguments.items() <= given.items()
