"""`ssd methods`: every method with its paper, needs and configs."""

import importlib
import inspect
import pkgutil
from typing import Any

from rich.table import Table

from ssd.configs_path import config_names
from ssd.summary import check_json, console, write_json
from ssd.verbs.arguments import Parser


def run(argv: list[str]) -> int:
    parser = Parser(prog="ssd methods", description="Every method with what it does, its paper and its configs.")
    parser.add_argument("--json", metavar="FILE", help="also write the list as JSON")
    arguments = parser.parse_args(argv)
    check_json(arguments.json)
    found = methods()
    write_json(arguments.json, found)
    table = Table("method", "what", "paper", "configs")
    for method in found:
        table.add_row(method["name"], method["what"], method["paper"], "\n".join(method["configs"]))
    console().print(table)
    return 0


def methods() -> list[dict[str, Any]]:
    """All methods in `lightning_modules`, found by looking: name, what it does, paper, configs."""
    import lightning_modules
    from lightning_modules.base import SelfDistillation

    found = []
    for module_info in pkgutil.iter_modules(lightning_modules.__path__):
        module = importlib.import_module(f"lightning_modules.{module_info.name}")
        for name, cls in vars(module).items():
            if inspect.isclass(cls) and issubclass(cls, SelfDistillation) and cls.__module__ == module.__name__:
                if cls is SelfDistillation:
                    continue
                first, _, rest = inspect.cleandoc(module.__doc__ or "").partition("\n\n")
                own = f"method/{module_info.name}"
                configs = [config for config in config_names() if config == own or config.startswith(f"{own}_")]
                found.append(
                    {
                        "name": name,
                        "what": first.replace("\n", " "),
                        "paper": cited(rest),
                        "class_path": f"{module.__name__}.{name}",
                        "configs": configs,
                    }
                )
    return found


def cited(text: str) -> str:
    """The lines up to the one that names a paper's number, as one; titles may be long."""
    lines = text.split("\n")
    end = next((number for number, line in enumerate(lines) if "arXiv" in line), 0)
    return " ".join(lines[: end + 1])
