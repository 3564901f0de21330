"""What a user types, turned into what the parsers take: configs by name, data by path, a checkpoint by itself."""

import argparse
import importlib.util
import inspect
import os
import pkgutil
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

import yaml

from ssd.configs_path import config_file, config_names
from ssd.errors import UserError


class Parser(argparse.ArgumentParser):
    """For the options of our own verbs: a mistake is one message, and no option may be shortened."""

    def __init__(self, **settings: Any):
        super().__init__(allow_abbrev=False, **settings)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}. {self.prog} --help explains.")


def at_least_one(text: str) -> int:
    """A count, for the `type` of an option."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least 1")
    return int(text)


def import_choices() -> None:
    """Imports every method, datamodule and part a config can name, so that short class names resolve."""
    from jsonargparse import set_parsing_settings

    import datamodules
    import lightning_modules
    import ssd.backbones
    import ssd.masking
    from ssd.data.sampling import Sampling
    from ssd.masking.recipes import Masking
    from ssd.optim import OptimizerRule
    from ssd.schedules import Schedule
    from ssd.views.view import Views

    # settings that are dataclasses and have kinds: a config names the kind by its class
    set_parsing_settings(subclasses_enabled=[Masking, OptimizerRule, Sampling, Schedule, Views])
    read_null_at_any_depth()
    for package in (lightning_modules, datamodules, ssd.backbones, ssd.masking):
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{package.__name__}.{module.name}")


@cache
def read_null_at_any_depth() -> None:
    """Lets `--model.backbone.weights null` mean none: jsonargparse reads null, and hands it on to inner classes spelled None."""
    from jsonargparse import get_loader, set_loader

    load = get_loader("yaml")
    set_loader("yaml", lambda text: None if text.strip() == "None" else load(text), (yaml.YAMLError,))


def subclasses(cls: type) -> list[type]:
    """Those that can be built, at any depth."""
    below: list[type] = type.__subclasses__(cls)
    found = [found for sub in below for found in [sub, *subclasses(sub)]]
    return [sub for sub in dict.fromkeys(found) if not inspect.isabstract(sub)]


# ---------------------------------------------------------------------- configs and data


def expand(argv: list[str], stored: Mapping[str, Any] | None = None, only: Sequence[str] | None = None) -> list[str]:
    """Arguments for the parser: what is stored, then the data, then everything else in the order it was typed.

    `--data` chooses data anew: what configs say of other data is left out. What a config says of the data
    without naming a class (a batch size for a machine) still counts, and so does every `--data.KEY`.

    Args:
        stored: config of a checkpoint, which everything typed overrides.
        only: sections that count of configs of whole runs, null = all; "views" are those of the method.
    """
    chosen: list[str] | None = None
    typed: list[str | Path] = []
    change_views = any(word.startswith("--model.views.") for word in argv)
    words = iter(argv)
    for word in words:
        option, equals, value = word.partition("=")
        if option not in ("--config", "-c", "--data", "--views"):
            typed.append(word)
            continue
        if not equals:
            value = next(words, "")
        if not value or value.startswith("--"):
            raise UserError(f"{option} needs a value.")
        if option == "--data":
            chosen = data_arguments(value)
        elif option == "--views":
            views = spelled_out(value)
            typed += ["--views", views] if views is value else ["--config", yaml.safe_dump({"views": views})]
        else:
            typed.append(config_file(value))

    expanded = [] if stored is None else config_arguments(stored, None, chosen)
    expanded += chosen or []
    for entry in typed:
        if not isinstance(entry, Path):
            expanded.append(entry)
        elif only is None:
            config = read_config(entry)
            method = with_views_spelled_out(config.get("model")) if change_views else None
            path = entry if method is None else None
            expanded += config_arguments(config if method is None else {**config, "model": method}, path, chosen)
        else:
            expanded += config_arguments(sections_of(read_config(entry), only), None, chosen)
    return expanded


def sections_of(config: Mapping[str, Any], only: Sequence[str]) -> dict[str, Any]:
    """Of a config what a verb needs that does not train: some sections, and the method's views as one of them."""
    method = config.get("model")
    views = (method.get("init_args") or {}).get("views") if isinstance(method, Mapping) else None
    found = {**config, **({} if views is None else {"views": spelled_out(views)})}
    return {key: value for key, value in found.items() if key in only}


def with_views_spelled_out(method: Any) -> dict[str, Any] | None:
    """A config's model whose views are no longer a recipe's name, None where they are none or it has none."""
    if not isinstance(method, Mapping) or not isinstance(method.get("init_args"), Mapping):
        return None
    views = method["init_args"].get("views")
    spelled = spelled_out(views)
    return None if spelled is views else {**method, "init_args": {**method["init_args"], "views": spelled}}


def spelled_out(views: Any) -> Any:
    """The settings of a recipe that is named, so that some of them can be typed; anything else as it is."""
    from ssd.record import describe
    from ssd.views.recipes import RECIPES
    from ssd.views.view import PictureViews

    if not isinstance(views, str) or views not in RECIPES:
        return views
    recipe = RECIPES[views]
    record = describe(recipe)
    if isinstance(recipe, PictureViews) and recipe.evaluation_size == recipe.image_size:
        record["init_args"]["evaluation_size"] = None  # follows the views
    return record


def config_arguments(config: Mapping[str, Any], path: Path | None, chosen: list[str] | None) -> list[str]:
    """A config for the parser, as a file or spelled out, without its choice of data where another was made."""
    data = config.get("data")
    if chosen is not None and (isinstance(data, str) or (isinstance(data, Mapping) and "class_path" in data)):
        config, path = {key: value for key, value in config.items() if key != "data"}, None
    if not config:
        return []
    return ["--config", yaml.safe_dump(dict(config)) if path is None else str(path)]


def read_config(path: Path) -> dict[str, Any]:
    """Raises UserError that names the file where it is not a YAML mapping."""
    try:
        config = yaml.safe_load(path.read_text())
    except UnicodeDecodeError:
        raise UserError(f"config {path} is not a text file. Give a YAML file; a checkpoint is --ckpt_path.") from None
    except yaml.YAMLError as error:
        place = getattr(error, "problem_mark", None)
        where = f" line {place.line + 1}" if place else ""
        problem = getattr(error, "problem", None) or str(error)
        raise UserError(f"config {path}{where} is not YAML: {problem}. Mend the file.") from None
    if config is None:
        return {}
    if not isinstance(config, dict):
        raise UserError(
            f"config {path} holds a {type(config).__name__}, expected sections such as model, data, trainer."
        )
    return config


def data_arguments(value: str) -> list[str]:
    """`--data` takes a class name, a data config, or a path whose kind decides the class."""
    import_choices()
    from datamodules.base import SampleData
    from ssd.data.media import kind_of
    from ssd.data.shards import is_remote
    from ssd.data.sources import COLLECTIONS

    names = sorted(cls.__name__ for cls in subclasses(SampleData))
    if value in names:
        return ["--data", value]
    is_config = value.endswith((".yaml", ".yml"))
    if os.path.exists(value) and not is_config:
        # whole, so that a checkpoint finds its data from any folder
        return ["--data", kind_of(value), "--data.path", os.path.abspath(value)]
    if is_config or value in config_names():
        file = config_file(value)
        if "data" not in read_config(file):
            raise UserError(f"--data {value} is a config that says nothing of data. Give it by --config.")
        return ["--config", str(file)]
    if value.startswith(COLLECTIONS) or is_remote(value) or is_mixture(value):
        return ["--data", "Images", "--data.path", value]
    if any(letter in value for letter in "*?[{"):
        return ["--data", "Images", "--data.path", os.path.abspath(value)]
    if is_class_path(value):
        return ["--data", value]
    configs = [name for name in config_names() if name.startswith("data/")]
    raise UserError(
        f"--data {value} is neither a path that exists (seen from {os.getcwd()}), nor a class ({', '.join(names)}), nor "
        f"a config ({', '.join(configs)})."
    )


def is_mixture(text: str) -> bool:
    """Whether a text is a mapping such as {photos: {path: A, weight: 2}, scans: B}, which no file's name is."""
    try:
        return text.startswith("{") and isinstance(yaml.safe_load(text), dict) and ":" in text
    except yaml.YAMLError:
        return False


def is_class_path(text: str) -> bool:
    module, _, name = text.rpartition(".")
    try:
        return bool(module) and name.isidentifier() and importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def split_data(argv: list[str]) -> tuple[list[str], list[str]]:
    """What is typed for a verb of our own: its options, and those that say which data and views."""
    own: list[str] = []
    data: list[str] = []
    words = iter(argv)
    for word in words:
        option, equals, _ = word.partition("=")
        if option in ("--data", "--views", "--config", "-c") or option.startswith(("--data.", "--views.")):
            value = None if equals else next(words, None)
            data += [word] if value is None else [word, value]
        else:
            own.append(word)
    return own, data


# ---------------------------------------------------------------------- checkpoints


def go_on(argv: list[str]) -> list[str]:
    """Arguments of a fit, with the last checkpoint of its own folder where that is meant.

    `--ckpt_path last` means it wherever there is one, and so does a job that SLURM has put back into its queue, which
    runs the command of its first time again.
    """
    asked = False
    kept: list[str] = []
    words = iter(argv)
    for word in words:
        option, equals, value = word.partition("=")
        if option != "--ckpt_path":
            kept.append(word)
            continue
        value = value if equals else next(words, "")
        asked = value == "last"
        if not asked:
            kept += [option, value]
    again = os.environ.get("SLURM_RESTART_COUNT", "0") not in ("", "0")
    if not asked and not (again and "--ckpt_path" not in kept):
        return argv
    folder = folder_typed(kept)
    if folder is None and asked:
        raise UserError(
            "--ckpt_path last needs the folder of the run, which a new run names by the time. Give it by "
            "--trainer.default_root_dir, or the checkpoint's own path."
        )
    last = None if folder is None else folder / "checkpoints" / "last.ckpt"
    return [*kept, "--ckpt_path", str(last)] if last is not None and last.is_file() else kept


def folder_typed(argv: list[str]) -> Path | None:
    """Where the run lies, as far as that is known before settings are parsed."""
    found = os.environ.get("SSD_RUN_FOLDER")
    words = iter(argv)
    for word in words:
        option, equals, value = word.partition("=")
        value = (
            value if equals else next(words, "") if option in ("--trainer.default_root_dir", "--config", "-c") else ""
        )
        if option == "--trainer.default_root_dir":
            found = value
        elif option in ("--config", "-c") and value:
            found = (read_config(config_file(value)).get("trainer") or {}).get("default_root_dir") or found
    job = os.environ.get("SLURM_JOB_ID")
    of_job = sorted(Path("runs").glob(f"*-{job}")) if job and found is None else []
    return Path(found) if found else of_job[-1] if of_job else None


def checkpoint_typed(argv: list[str]) -> Path | None:
    """The file behind the last `--ckpt_path`."""
    found = None
    words = iter(argv)
    for word in words:
        option, equals, value = word.partition("=")
        if option == "--ckpt_path":
            found = value if equals else next(words, "")
            if not found or found.startswith("--"):
                raise UserError("--ckpt_path needs a value, the checkpoint that ssd fit wrote.")
    return None if found in (None, "null") else Path(found)


def stored_config(verb: str, path: Path) -> dict[str, Any]:
    """What a checkpoint says of its run: all of it to go on, method, data and precision to look at it again."""
    from ssd.weights.checkpoint import read_checkpoint

    about = read_checkpoint(path)["ssd"]
    written = yaml.safe_load(about["config"]) if about.get("config") else {}
    if verb == "fit" and written:
        written.pop("ckpt_path", None)
        config = written
    else:
        config = {"model": about["method"]}
        if about.get("data"):
            config["data"] = about["data"]
        precision = (written.get("trainer") or {}).get("precision")
        if precision is not None:
            # the numbers of a run are those of its precision
            config["trainer"] = {"precision": precision}
    folder = run_of(path)
    if folder is not None:
        config["trainer"] = {**(config.get("trainer") or {}), "default_root_dir": str(folder)}
    return config


def run_of(checkpoint: Path) -> Path | None:
    """The run's folder, wherever it has been moved to; None for a checkpoint that lies by itself."""
    folder = checkpoint.absolute().parent
    return folder.parent if folder.name == "checkpoints" else None
