"""What is wrong with a setting, said in one line: which one, what was given, what was expected."""

import difflib
import inspect
import re
import typing
from typing import Any

from ssd.verbs.arguments import subclasses

PLAIN = {
    "NoneType": "null",
    "str": "text",
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "dict": "a mapping",
    "list": "a list",
}
SECTIONS = ("model", "data", "trainer", "checkpoints", "evaluation", "seed_everything", "ckpt_path", "json", "config")
FEW = 12


class BadSetting(ValueError):
    """The parser's own report, many nested lines that quote whole configs."""


class RaisesReports:
    """Mixed into a parser: a mistake raises its report, without the usage of two hundred settings, and no
    option may be shortened, because a shortened name is a misspelled one that happens to work."""

    def __init__(self, *arguments: Any, **settings: Any):
        super().__init__(*arguments, **{"allow_abbrev": False, **settings})

    def error(self, message: str, ex: Exception | None = None) -> typing.NoReturn:
        # also called for parts that a longer report then quotes, so it is made short only where it arrives
        raise BadSetting(message) from ex


def setting_message(report: str, verb: str) -> str:
    """One line for a report of the parser."""
    if found := re.match(r"the following arguments are required: (.*)", report):
        return missing_section(found[1], verb)
    if found := re.match(r"Subcommand '\w+' does not accept option '([^']+)'", report):
        return unknown_section(found[1], verb)
    if found := re.match(r"unrecognized arguments: (.*)", report):
        word = found[1].split()[0]
        if not word.startswith("--"):
            return f"'{word}' is not understood: settings are typed as --name value. ssd {verb} --help lists them."
        return unknown_section(word.removeprefix("--").partition("=")[0], verb)
    keys, leaf = innermost(report)
    if not keys:
        return f"{' '.join(report.split())} ssd {verb} --help lists all settings."
    return leaf_message(keys, leaf, report, verb)


def innermost(report: str) -> tuple[list[str], str]:
    """The path of keys into a nested report, and what stands below the last."""
    keys: list[str] = []
    depth, below = -1, ""
    lines = report.splitlines()
    for number, line in enumerate(lines):
        found = re.match(r'([\s-]*)Parser key "([^"]+)":(.*)', line)
        if found is None:
            continue
        if len(found[1]) <= depth:
            break
        depth = len(found[1])
        keys += found[2].split(".")
        inside = [rest for rest in lines[number + 1 :] if len(rest) - len(rest.lstrip()) > depth or not rest.strip()]
        below = "\n".join([found[3], *inside])
    return keys, below


def leaf_message(keys: list[str], leaf: str, report: str, verb: str) -> str:
    name = ".".join(keys)
    if found := re.search(r"Option '([^']+)' is not accepted", leaf):
        unknown = found[1].rpartition(".")[2]
        return f"'{unknown}' is not a setting of {name}. {nearest(unknown, settings_at(keys))}{help_hint(keys, verb)}"
    if found := re.search(r"arguments are required: (.*)", leaf):
        return f"{name} lacks {found[1]}. {abstract_hint(keys, report)}{help_hint(keys, verb)}"
    if found := re.search(r"Expected a dot import path string: (.*)", leaf):
        given, kinds = found[1], union_kinds(leaf) or [cls.__name__ for cls in classes_at(keys)]
    elif found := re.search(r"Given value: (.*)", leaf):
        given, kinds = found[1], union_kinds(leaf)
    elif found := re.search(r"Expected a (.*)\. Got value: (.*)", leaf):
        given, kinds = found[2], [kind_name(found[1])]
    else:
        return f"{name}: {' '.join(leaf.split())} {help_hint(keys, verb)}"
    given = re.sub(r"^NestedArg\(key='[^']*', val='?(.*?)'?\)$", r"\1", given)
    kinds = [kind for kind in kinds if kind != "NoneType"] if len(keys) == 1 else kinds
    expected = " or ".join(dict.fromkeys(described(kind, keys) for kind in kinds)) or "something else"
    return f"{name}: {shortened(given)} was given, expected {expected}. {help_hint(keys, verb)}"


def missing_section(names: str, verb: str) -> str:
    missing = [name.rpartition(".")[2] for name in names.split(", ")]
    what = {"model": "a method", "data": "data"}
    lacking = " and ".join(what.get(name, name) for name in sorted(missing, reverse=True))
    if verb in ("fit", "plan"):
        return (
            f"ssd {verb} needs {lacking}. For instance: ssd {verb} --config method/dino_small --data FOLDER. ssd methods lists "
            "methods, and --data takes a folder of pictures, clips or sounds, a list, a Parquet file, or Digits."
        )
    return f"ssd {verb} needs {lacking}, which a checkpoint knows: ssd {verb} --ckpt_path FILE"


def unknown_section(option: str, verb: str) -> str:
    """For a key that is not below a class: of the command itself, of the trainer or of the checkpoints."""
    from pytorch_lightning import Trainer

    from ssd.callbacks.checkpoints import Checkpoints

    first, _, rest = option.partition(".")
    known = {"trainer": Trainer, "checkpoints": Checkpoints}
    if first in known and rest:
        names = list(inspect.signature(vars(known[first])["__init__"]).parameters)[1:]
        hint = nearest(rest.partition(".")[0], names, prefix=f"{first}.")
    else:
        hint = nearest(first, list(SECTIONS))
    return f"'{option}' is not a setting of ssd {verb}. {hint}ssd {verb} --help lists all settings."


# ---------------------------------------------------------------------- what would be right


def nearest(name: str, choices: list[str], prefix: str = "") -> str:
    """The choices that look like a name, or all of them where none does and they are few."""
    near = difflib.get_close_matches(name, choices, n=3)
    shown = near or (choices if len(choices) <= FEW else [])
    if not shown:
        return ""
    return f"{'Nearest' if near else 'There are'}: {', '.join(prefix + choice for choice in shown)}. "


def help_hint(keys: list[str], verb: str) -> str:
    """How to see the settings around a key."""
    section = keys[0]
    if section not in ("model", "data"):
        return f"ssd {verb} --help lists all settings."
    names = sorted(cls.__name__ for cls in subclasses(roots()[section]) if defined_here(cls))
    wide = verb if verb in ("fit", "validate", "predict") else "fit"
    return f"ssd {wide} --{section}.help {names[0] if len(names) == 1 else 'CLASS'} lists all settings."


def abstract_hint(keys: list[str], report: str) -> str:
    """For settings of a class that only others are made from: which class was meant?"""
    for cls in classes_at(keys):
        if subclasses(cls) and f"{cls.__module__}.{cls.__qualname__}" in report:
            return f"Say which by class_path: {', '.join(choices_of(cls))}. "
    return ""


def roots() -> dict[str, type]:
    from datamodules.base import SampleData
    from lightning_modules.base import SelfDistillation

    return {"model": SelfDistillation, "data": SampleData}


def classes_at(keys: list[str]) -> list[type]:
    """Our classes that may stand at a key such as model.backbone, by the annotations of those that take it."""
    found = [roots()[keys[0]]] if keys[0] in roots() else []
    for key in keys[1:]:
        hints = [parameters(cls)[key] for top in found for cls in [top, *subclasses(top)] if key in parameters(cls)]
        kinds = [kind for hint in hints for kind in (typing.get_args(hint) or (hint,))]
        found = list(dict.fromkeys(kind for kind in kinds if inspect.isclass(kind) and defined_here(kind)))
    return found


def settings_at(keys: list[str]) -> list[str]:
    """Settings of all classes that may stand at a key."""
    known = [cls for top in classes_at(keys) for cls in [top, *subclasses(top)]]
    return list(dict.fromkeys(name for cls in known for name in parameters(cls)))


def parameters(cls: type) -> dict[str, Any]:
    """Name of each setting of a class, those handed on to its bases included -> annotation."""
    known: dict[str, Any] = {}
    for part in reversed([part for part in cls.__mro__ if defined_here(part) and "__init__" in vars(part)]):
        for name, parameter in list(inspect.signature(vars(part)["__init__"]).parameters.items())[1:]:
            if parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
                known[name] = parameter.annotation
    return known


def defined_here(cls: type) -> bool:
    return cls.__module__.partition(".")[0] in ("ssd", "lightning_modules", "datamodules")


def union_kinds(leaf: str) -> list[str]:
    """Names of the alternatives in `Subtypes: [...]`, all literal choices as one."""
    found = re.search(r"Subtypes: \[(.*)\]", leaf)
    if found is None:
        return []
    parts = re.findall(r"<class '[\w.]+'>|(?:typing\.)?\w+(?:\[[^\]]*\])?", found[1])
    kinds: list[str] = []
    choices: list[str] = []
    for part in parts:
        if literal := re.fullmatch(r"typing\.Literal\[(.*)\]", part):
            choices += [choice.strip("' ") for choice in literal[1].split(",")]
        else:
            kinds.append(kind_name(part))
    return [listed(list(dict.fromkeys(choices))), *kinds] if choices else kinds


def kind_name(text: str) -> str:
    """The last name of `<class 'a.b.C'>` or `dict[...]`."""
    found = re.search(r"<class '([\w.]+)'>", text)
    return (found[1] if found else text.partition("[")[0]).rpartition(".")[2]


def described(kind: str, keys: list[str]) -> str:
    if kind in PLAIN:
        return PLAIN[kind]
    for cls in classes_at(keys):
        if cls.__name__ == kind:
            names = choices_of(cls)
            return listed(names) if names else f"a {kind} ({', '.join(parameters(cls))})"
    return kind


def listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"one of {', '.join(names)}"


def choices_of(cls: type) -> list[str]:
    return sorted(sub.__name__ for sub in subclasses(cls) if defined_here(sub))


def shortened(text: str, most: int = 60) -> str:
    return repr(text) if len(text) <= most else f"{text[:most]}..."
