"""What our verbs share: a checkpoint as a module, and the data to look at it with."""

from pathlib import Path
from typing import Any

from ssd.errors import UserError
from ssd.record import build
from ssd.views.recipes import views_named
from ssd.views.view import Views
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
    for word in arguments:
        key = word.partition("=")[0]
        if key in ("--data.channels", "--data.normalize", "--data.value_range"):
            raise UserError(f"{key} is the checkpoint's own, as in its training. Leave it out.")
    own: dict[str, Any] = {}
    if "mean" in about:
        own = {"channels": about["channels"], "normalize": {"mean": about["mean"], "std": about["std"]}}
        own |= {"value_range": about["value_range"]} if "value_range" in about else {}
    data, _ = parsed(arguments, verb, stored=about.get("data"), own=own)
    if data is None:
        raise UserError(f"the checkpoint does not say which data it learned from. ssd {verb} needs --data.")
    data.prepare(build(about["views"]))
    return data


def typed_data(arguments: list[str], verb: str) -> tuple[Any, Views]:
    """The datamodule that `--data ...` and configs name, not prepared, and the views that `--views ...` names.

    Without `--views` those of the method in a config, or else dino's.
    """
    data, views = parsed(arguments, verb)
    if data is None:
        raise UserError(
            f"ssd {verb} needs data: --data takes a folder of pictures, a list, a Parquet file, any other path that ssd "
            "fit takes, a class or a data config."
        )
    return data, views_named(views)


def of_pictures(data: Any) -> bool:
    """Whether a datamodule is one of pictures."""
    from datamodules.pictures import PictureData

    return isinstance(data, PictureData)


def check_pictures(data: Any, verb: str) -> None:
    """Raises UserError for data that is no pictures, which a verb does not know how to show or to judge."""
    if not of_pictures(data):
        raise UserError(f"ssd {verb} is for pictures, and the data is {type(data).__name__}. Give it data of pictures.")


def parsed(
    arguments: list[str], verb: str, stored: dict[str, Any] | None = None, own: dict[str, Any] | None = None
) -> tuple[Any, Any]:
    """Datamodule and views, None and the name of a recipe where they are not given.

    Args:
        stored: record of data that is used where none is typed.
        own: settings of the data that count whatever is typed.
    """
    from jsonargparse import ArgumentParser

    from datamodules.base import SampleData
    from ssd.verbs.arguments import expand, import_choices, spelled_out
    from ssd.verbs.settings import BadSetting, RaisesReports, setting_message

    class Parser(RaisesReports, ArgumentParser):
        """jsonargparse's, with our messages."""

    import_choices()
    parser = Parser(prog=f"ssd {verb}")
    parser.add_argument("--config", action="config")
    parser.add_subclass_arguments(SampleData, "data")
    if own is None:
        parser.add_argument("--views", type=str | Views)
    first = {} if stored is None else {"data": stored}
    try:
        if own is None:
            words = expand(arguments, first | {"views": spelled_out("dino")}, only=("data", "views"))
        else:
            words = expand(arguments, first)
        config = parser.parse_args(words)
        if config.data is not None:
            for name, value in (own or {}).items():
                if name in config.data.init_args:  # sounds have no channels
                    config.data.init_args[name] = value
        made = parser.instantiate_classes(config)
    except BadSetting as error:
        raise UserError(setting_message(str(error), verb)) from None
    return made.data, made.get("views")
