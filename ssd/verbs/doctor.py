"""`ssd doctor RUN`: what went wrong in a run, from its logs and its checkpoint."""

from pathlib import Path
from typing import Any

from rich.table import Table

from ssd.diagnosis.course import phase_of, temperatures_of
from ssd.diagnosis.findings import Finding
from ssd.diagnosis.logs import diagnose_logs, diagnose_weights, looks_of, read_logs, skipped_steps
from ssd.errors import UserError
from ssd.heads import PROTOTYPES
from ssd.summary import check_json, console, print_facts, shown, write_json
from ssd.verbs.arguments import Parser, run_of
from ssd.verbs.loading import load_module
from ssd.weights.checkpoint import read_checkpoint


def run(argv: list[str]) -> int:
    parser = Parser(
        prog="ssd doctor",
        description="Says what is wrong with a run after the fact: what the doctor said while it went, what the same rules "
        "find in its logged numbers (collapse, dead prototypes, falling rank, learning rates that do not fit, overflow), "
        "and what its weights show. Exit status 1 where something is wrong.",
    )
    parser.add_argument("run", metavar="RUN", help="folder of a run, or one of its checkpoints")
    parser.add_argument("--json", metavar="FILE", help="also write what was found as JSON")
    arguments = parser.parse_args(argv)
    check_json(arguments.json)
    checkpoint = checkpoint_of(Path(arguments.run))
    folder = run_of(checkpoint)

    contents = read_checkpoint(checkpoint)
    module, _ = load_module(checkpoint)
    said = [Finding(**row) for row in contents.get("callbacks", {}).get("Doctor", {}).get("findings", [])]
    rows = {} if folder is None else read_logs(folder)
    looks = looks_of(rows, prototypes_of(module), targets_of(module), lambda step: temperatures_of(module, step))
    found = diagnose_logs(looks, phase_of(module)) if module.total_steps else []
    found += skipped_steps(rows) + diagnose_weights(contents["state_dict"], module.step)
    findings = said + [finding for finding in found if finding.kind not in {known.kind for known in said}]
    findings.sort(key=lambda finding: finding.step)

    out = console()
    facts = {
        "checkpoint": f"{shown(str(checkpoint))}, {type(module).__name__}",
        "steps": f"{module.step} of {module.total_steps}, {module.skipped_steps} skipped",
        "logs": f"{len(looks)} logged steps"
        if looks
        else "none beside the checkpoint: only its weights were looked at",
    }
    print_facts(out, facts)
    if findings:
        out.print(table_of(findings))
    else:
        out.print("nothing found")
    content: dict[str, Any] = {"checkpoint": str(checkpoint), "step": module.step, "logged_steps": len(looks)}
    write_json(arguments.json, content | {"findings": [finding.row() for finding in findings]})
    return 1 if findings else 0


def checkpoint_of(path: Path) -> Path:
    """The checkpoint itself, or the last of a run's folder. Raises UserError where there is none."""
    if not path.exists():
        raise UserError(f"there is no {path}. Give the folder of a run, such as runs/NAME, or a checkpoint.")
    if not path.is_dir():
        return path
    for folder in (path / "checkpoints", path):
        for name in ("last.ckpt", "best.ckpt"):
            if (folder / name).is_file():
                return folder / name
    raise UserError(
        f"{path} holds no checkpoints/last.ckpt, so it is no run that took a step. Give the folder of a run, such as "
        "runs/NAME, or a checkpoint."
    )


def prototypes_of(module: Any) -> dict[str, int]:
    """Kind of target -> K, as the teacher's heads have them; patches without prototypes of their own use the pictures'."""
    sizes: dict[str, int] = {}
    for place, part in module.teacher.named_modules():  # none without a teacher
        if isinstance(part, PROTOTYPES):
            # of several levels the last is the widest, whose targets are logged
            sizes["patch" if "patch" in place else "picture"] = len(next(part.parameters()))
    return {"patch": sizes["picture"], **sizes} if "picture" in sizes else sizes


def targets_of(module: Any) -> dict[str, int]:
    """Kind of target -> how many a step has; patches vary."""
    views = module.views.kinds().get("global", [])
    return {"picture": module.samples_per_step * len(views)}


def table_of(findings: list[Finding]) -> Table:
    table = Table("step", "finding", "what", "try")
    for finding in findings:
        kept = "" if finding.batch is None else f" The batch is kept in {finding.batch}."
        table.add_row(str(finding.step), finding.kind, finding.message + kept, finding.advice)
    return table
