"""`ssd verify resume`: proof, on this machine, that a killed run goes on exactly."""

import hashlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from ssd.errors import UserError
from ssd.summary import check_json, console, write_json
from ssd.verbs.arguments import Parser
from ssd.weights.checkpoint import read_checkpoint

STEPS = 30
KILLS = (17, 10, 20)
"""Where runs of 10 steps an epoch are killed: in the middle of an epoch, and at the ends of two."""


def run(argv: list[str]) -> int:
    parser = Parser(
        prog="ssd verify",
        description="resume: trains a small network on the bundled digits for 30 steps, and again with SIGKILL in the "
        "middle and at the end of an epoch, and compares hashes of student, teacher, centre and optimiser.",
    )
    parser.add_argument("what", choices=["resume"], metavar="resume", help="what to prove")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2], help="loader processes to try")
    parser.add_argument("--kills", type=int, nargs="+", default=list(KILLS), help="steps after which the run is killed")
    parser.add_argument("--json", metavar="FILE", help="also write the rows as JSON")
    arguments = parser.parse_args(argv)
    check_json(arguments.json)
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
