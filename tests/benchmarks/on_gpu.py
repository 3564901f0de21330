"""All that is measured on a GPU, one after the other, each with a limit of its own, into one folder: what was done stays when
the next one is cut off, and is not done again.

    python -m tests.benchmarks.on_gpu --out measured
    python -m tests.benchmarks.on_gpu --out measured --minutes 9 --train TRAIN.parquet --test TEST.parquet
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

SSD = (sys.executable, "-c", "from ssd.cli import main; raise SystemExit(main())")
STEPS, BATCH = "4000", "256"  # of each run of the tables of the family and of masked distillation


def stages(out: Path, train: str | None, test: str | None) -> dict[str, tuple[list[str], float]]:
    """Name -> command and the minutes that it may take."""
    found = {
        "tests": ([sys.executable, "-m", "pytest", "-q", "-m", "gpu"], 3.0),
        "parity": ([*SSD, "verify", "parity", "--device", "cuda"], 2.0),
        "step": ([*SSD, "bench", "step", "--parts", "steps", "--rounds", "3"], 8.0),
        "masked": ([*SSD, "bench", "masked", "--device", "cuda", "--batch", "64", "--rounds", "3"], 2.0),
        "evaluation": ([*SSD, "bench", "evaluation", "--rounds", "3", "--parts", "knn"], 4.0),
        "data": ([*SSD, "bench", "data", "--rounds", "3"], 2.0),
    }
    for name in ("parity", "step", "masked", "evaluation", "data"):
        found[name][0].extend(("--json", str(out / f"{name}.json")))
    if train is not None and test is not None:
        family = [sys.executable, "-m", "tests.benchmarks.family", "cifar10", "--path", train, "--val_path", test]
        family += ["--accelerator", "gpu", "--steps", STEPS, "--batch", BATCH, "--workers", "8", "--seeds", "0"]
        found["family"] = ([*family, "--out", str(out / "family")], 25.0)
        regression = [*family, "--out", str(out / "masked_distillation")]
        regression[2] = "tests.benchmarks.masked_distillation"
        found["masked_distillation"] = (regression, 25.0)
    return found


def measure(name: str, command: list[str], out: Path, limit_s: float) -> str:
    """Runs it unless it was done before, its output into a file; how it ended, in words."""
    done = out / f"{name}.txt"
    if done.exists():
        return "done before"
    begun, unfinished = time.monotonic(), out / f"{name}.unfinished.txt"
    with open(unfinished, "w") as said:
        environment = os.environ | {"PYTHONUNBUFFERED": "1", "COLUMNS": "160"}
        try:
            status = subprocess.run(
                command, stdout=said, stderr=subprocess.STDOUT, timeout=limit_s, env=environment, check=False
            ).returncode
        except subprocess.TimeoutExpired:
            return f"cut off after {limit_s:.0f} s"
    if status:
        return f"failed with status {status}, see {unfinished}"
    unfinished.rename(done)
    return f"{time.monotonic() - begun:.0f} s"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="folder for tables and logs")
    parser.add_argument(
        "--minutes", type=float, default=60.0, help="in all; what does not fit is left for another call"
    )
    parser.add_argument("--train", help="CIFAR-10 as Parquet, for the tables of the family and of masked distillation")
    parser.add_argument("--test", help="its held-out part")
    parser.add_argument("--stages", nargs="+", help="only these")
    arguments = parser.parse_args(argv)
    out = Path(arguments.out).absolute()
    out.mkdir(parents=True, exist_ok=True)
    known = stages(out, arguments.train, arguments.test)
    unknown = set(arguments.stages or ()) - set(known)
    if unknown:
        parser.error(
            f"no stage {', '.join(sorted(unknown))}. There are {', '.join(known)}; family and masked_distillation need --train "
            "and --test."
        )
    print(f"on {torch.cuda.get_device_name() if torch.cuda.is_available() else 'no GPU'}, torch {torch.__version__}")
    ends, failed = time.monotonic() + 60 * arguments.minutes, False
    for name in arguments.stages or known:
        command, minutes = known[name]
        left_s = ends - time.monotonic()
        how = measure(name, command, out, min(60 * minutes, left_s)) if left_s > 10 else "left for another call"
        failed |= not how.endswith((" s", "before")) or how.startswith("cut")
        print(f"{name}: {how}", flush=True)
        if (out / f"{name}.txt").exists():
            print((out / f"{name}.txt").read_text()[-3000:], flush=True)
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
