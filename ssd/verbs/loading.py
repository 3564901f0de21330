"""What our verbs share: a checkpoint as a module, and the data to look at it with."""

from pathlib import Path
from typing import Any

from ssd.errors import UserError
from ssd.record import build
from ssd.weights.checkpoint import read_checkpoint, strict_load


def load_module(path: str | Path) -> tuple[Any, dict[str, Any]]:
    """The method of a checkpoint with its weights, in evaluation mode, and what the checkpoint says of itself.

    Raises UserError for a file that is missing, truncated, or does not fit what it says of itself.
    """
    checkpoint = read_checkpoint(path)
    module = build(checkpoint["ssd"]["method"])
    strict_load(module, checkpoint["state_dict"], str(path))
    return module.eval(), checkpoint["ssd"]


def load_data(arguments: list[str], about: dict[str, Any], verb: str) -> Any:
    """The datamodule that `--data ...` names, or the checkpoint's own, looked at as in training.

    Views, channels and normalisation are the checkpoint's, whatever the data is.
    """
    from jsonargparse import ArgumentParser

    from datamodules.base import PictureData
    from ssd.verbs.arguments import expand, import_choices
    from ssd.verbs.settings import BadSetting, RaisesReports, setting_message

    class Parser(RaisesReports, ArgumentParser):
        """jsonargparse's, with our messages."""

    for word in arguments:
        key = word.partition("=")[0]
        if key in ("--data.channels", "--data.normalize", "--data.value_range"):
            raise UserError(f"{key} is the checkpoint's own, as in its training. Leave it out.")
    import_choices()
    parser = Parser(prog=f"ssd {verb}")
    parser.add_argument("--config", action="config")
    parser.add_subclass_arguments(PictureData, "data")
    stored = about.get("data")
    try:
        config = parser.parse_args(expand(arguments, None if stored is None else {"data": stored}))
        if config.data is None:
            raise UserError(f"the checkpoint does not say which data it learned from. ssd {verb} needs --data.")
        settings = config.data.init_args
        settings.channels = about["channels"]
        settings.normalize = {"mean": about["mean"], "std": about["std"]}
        settings.value_range = about["value_range"]
        data = parser.instantiate_classes(config).data
    except BadSetting as error:
        raise UserError(setting_message(str(error), verb)) from None
    data.prepare(build(about["views"]))
    return data
