"""`ssd verify`: proof, on this machine, that numbers are the papers' and that a killed run goes on exactly."""

import argparse
import contextlib
import hashlib
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from ssd.errors import UserError
from ssd.parity.cases import CASES
from ssd.parity.compare import check, recorded
from ssd.summary import check_json, console, write_json
from ssd.verbs.arguments import Parser
from ssd.weights.checkpoint import read_checkpoint

STEPS = 30
KILLS = (17, 10, 20)
"""Where runs of 10 steps an epoch are killed: in the middle of an epoch, and at the ends of two."""


def run(argv: list[str]) -> int:
    parser = Parser(
        prog="ssd verify",
        description="Proof on this machine: a table, rows of it by --json FILE, and status 1 where it fails. ssd verify "
        "parity --help and ssd verify resume --help say more.",
    )
    proofs = parser.add_subparsers(dest="what", metavar="parity|resume", required=True, help="what to prove")
    parity = proofs.add_parser(
        "parity",
        help="losses, targets, masks, schedules and twenty steps of every method equal the papers' equations",
        description="Computes every loss, target, head, mask statistic, schedule and parameter group, and twenty steps of "
        "each method, and compares them with values that plain restatements of the equations gave in float64. Takes less "
        "than a minute. Differences are absolute for numbers up to 1 and relative above; of shares of masks, they are those "
        "of samples.",
    )
    parity.add_argument("--device", default="cpu", help="cpu (default), or cuda with ten times the tolerances")
    resume = proofs.add_parser(
        "resume",
        help="a killed run goes on exactly",
        description="Trains a small network on the bundled digits for 30 steps, and again with SIGKILL in the middle and at "
        "the end of an epoch, and compares hashes of student, teacher, centre and optimiser.",
    )
    resume.add_argument("--workers", type=int, nargs="+", default=[0, 2], help="loader processes to try")
    resume.add_argument("--kills", type=int, nargs="+", default=list(KILLS), help="steps after which the run is killed")
    for proof in (parity, resume):
        proof.add_argument("--json", metavar="FILE", help="also write the rows as JSON")
    arguments = parser.parse_args(argv)
    check_json(arguments.json)
    return {"parity": prove_parity, "resume": prove_resume}[arguments.what](arguments)


# ---------------------------------------------------------------------- parity


def prove_parity(arguments: argparse.Namespace) -> int:
    device, out, expected = usable_device(arguments.device), console(), recorded()
    with float32_throughout():
        cases = track(CASES, "comparing", console=out, transient=True, disable=not out.is_terminal)
        rows = [check(case, expected[case.name], device) for case in cases]
    write_json(arguments.json, rows)
    table = Table("case", "largest difference", "tolerance", "ok")
    for row in rows:
        difference = "-" if row["difference"] is None else f"{row['difference']:.1e}"
        table.add_row(row["case"], difference, f"{row['tolerance']:.1e}", "yes" if row["ok"] else "NO")
    out.print(table)
    say(out, versions(device))
    wrong = [row for row in rows if not row["ok"]]
    if wrong:
        where = "; ".join(f"{row['case']} ({row['worst']})" for row in wrong)
        say(
            out,
            f"{len(wrong)} of {len(rows)} cases differ: {where}. Please report this line with the versions above it.",
        )
    return 1 if wrong else 0


def usable_device(name: str) -> torch.device:
    """Raises UserError for one that is not here."""
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name} is no device. Use cpu, cuda or cuda:1.") from None
    there = torch.cuda.device_count()
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {name}: tolerances are known for cpu and cuda. Use one of them.")
    if device.type == "cuda" and (device.index or 0) >= there:
        raise UserError(f"--device {name}: torch finds {there} CUDA devices here. Use {'cuda' if there else 'cpu'}.")
    return device


@contextlib.contextmanager
def float32_throughout() -> Iterator[None]:
    """Without TF32, whose ten bits of a product would be seen as an error."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def versions(device: torch.device) -> str:
    """What a report of a difference must say."""
    packages = ", ".join(f"{name} {version(name)}" for name in ("ssd", "torch", "timm", "numpy"))
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu ({platform.machine()})"
    return f"{packages}, Python {platform.python_version()}, {platform.system()}, {where}, float32"


def say(out: Console, text: str) -> None:
    """One line, whatever the width, so that it can be copied."""
    out.print(text, markup=False, highlight=False, soft_wrap=True)


# ---------------------------------------------------------------------- resume


def prove_resume(arguments: argparse.Namespace) -> int:
    if any(not 0 < kill < STEPS for kill in arguments.kills):
        raise UserError(f"--kills {arguments.kills}: a run of {STEPS} steps can be killed after step 1 to {STEPS - 1}.")
    if any(workers < 0 for workers in arguments.workers):
        raise UserError(f"--workers {arguments.workers}: give counts of processes, 0 for none.")

    rows: list[dict[str, Any]] = []
    out = console()
    with tempfile.TemporaryDirectory() as folder:
        for workers in arguments.workers:
            straight = Path(folder, f"straight-{workers}")
            fit(straight, workers)
            expected = hashes(straight)
            out.print(f"{STEPS} steps without a stop; {workers} workers: done")
            for kill in arguments.kills:
                killed = Path(folder, f"killed-{workers}-{kill}")
                stopped_at = fit_and_kill(killed, workers, kill)
                fit(killed, workers, resume=True)
                found = hashes(killed)
                different = [part for part in expected | found if expected.get(part) != found.get(part)]
                case = f"{STEPS} steps against {stopped_at}, SIGKILL, {STEPS - stopped_at}; {workers} workers"
                rows.append({"case": case, "difference": len(different), "tolerance": 0, "ok": not different})
                out.print(f"{case}: {'equal' if not different else 'differs in ' + ', '.join(different)}")
    write_json(arguments.json, rows)
    table = Table("case", "parts that differ", "allowed", "ok")
    for row in rows:
        table.add_row(row["case"], str(row["difference"]), str(row["tolerance"]), "yes" if row["ok"] else "NO")
    out.print(table)
    return 0 if all(row["ok"] for row in rows) else 1


def command(folder: Path, workers: int, resume: bool) -> list[str]:
    checkpoint = folder / "checkpoints" / "last.ckpt"
    start = ["--ckpt_path", str(checkpoint)] if resume else ["--config", "verify", "--data.num_workers", str(workers)]
    settings = ["--trainer.default_root_dir", str(folder), "--trainer.enable_progress_bar", "false"]
    return [sys.executable, "-m", "ssd", "fit", *start, *settings]


def environment() -> dict[str, str]:
    return os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


def fit(folder: Path, workers: int, resume: bool = False) -> None:
    done = subprocess.run(
        command(folder, workers, resume), env=environment(), capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"a run of the proof failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")


def fit_and_kill(folder: Path, workers: int, kill: int) -> int:
    """Starts a run and kills it, all its processes at once, when the checkpoint of step `kill` is there."""
    process = subprocess.Popen(
        command(folder, workers, resume=False),
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    checkpoint = folder / "checkpoints" / "last.ckpt"
    try:
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline and process.poll() is None:
            if checkpoint.is_file() and read_checkpoint(checkpoint)["state_dict"]["_extra_state"]["step"] >= kill:
                break
            time.sleep(0.02)
        else:
            raise RuntimeError(f"the run to be killed ended by itself or wrote no checkpoint of step {kill} in time")
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return int(read_checkpoint(checkpoint)["state_dict"]["_extra_state"]["step"])


def hashes(folder: Path) -> dict[str, str]:
    """A hash of each part of the run's last checkpoint: student, teacher, centre, counts and each optimiser."""
    checkpoint = read_checkpoint(folder / "checkpoints" / "last.ckpt")
    parts: dict[str, Any] = {}
    for name, value in checkpoint["state_dict"].items():
        parts.setdefault(name.partition(".")[0], {})[name] = value
    for number, state in enumerate(checkpoint["optimizer_states"]):
        parts[f"optimizer {number}"] = state
    return {part: digest(content) for part, content in parts.items()}


def digest(content: Any) -> str:
    """A hash of nested plain data and tensors, to the bit."""
    state = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            state.update(str((value.dtype, tuple(value.shape))).encode())
            state.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        elif isinstance(value, dict):
            for key in value:
                state.update(str(key).encode())
                add(value[key])
        elif isinstance(value, list | tuple):
            for item in value:
                add(item)
        else:
            state.update(repr(value).encode())

    add(content)
    return state.hexdigest()
