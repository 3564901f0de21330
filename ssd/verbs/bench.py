"""`ssd bench data`, `step`, `masked`, `cached`, `evaluation`: how fast this machine makes views, trains and probes, ours beside
others' in one run."""

import platform
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from rich.table import Table
from threadpoolctl import threadpool_limits

from ssd.benchmarks.paired import Pair, pairs_table
from ssd.data.dataset import start_worker
from ssd.errors import UserError
from ssd.memory import keep_freed_memory
from ssd.native import views as native
from ssd.summary import check_json, console, write_json
from ssd.verbs.arguments import Parser, at_least_one
from ssd.verbs.extraction import check_device

EPILOG = "Both sides in turn; medians, and the lowest and highest of the ratios of each turn."


def run(argv: list[str]) -> int:
    benchmarks: dict[str, Callable[[list[str]], int]] = {
        "data": run_data,
        "step": run_step,
        "masked": run_masked,
        "cached": run_cached,
        "evaluation": run_evaluation,
    }
    parser = Parser(
        prog="ssd bench",
        description="Measures this machine, ours beside others' doing the same work. data: views of JPEG files. step: a "
        "training step. masked: what is saved where patches are hidden. cached: what is saved where a teacher's answers are "
        "stored. evaluation: probes of cached features. ssd bench data "
        "--help and so on list what each takes.",
        epilog=EPILOG,
    )
    parser.add_argument(
        "what", choices=list(benchmarks), metavar="data|step|masked|cached|evaluation", help="what to measure"
    )
    what = parser.parse_args(argv[:1]).what
    return benchmarks[what](argv[1:])


def run_data(argv: list[str]) -> int:
    parser = Parser(
        prog="ssd bench data",
        description="Views of JPEG files in memory, one core and one thread, ours beside lightly's DINO transform and one "
        "made of torchvision's.",
        epilog=EPILOG,
    )
    parser.add_argument("--rounds", type=int, default=7, help="times that each pair runs")
    parser.add_argument("--pictures", type=int, default=32, help="pictures in each run of a pair")
    parser.add_argument("--json", metavar="FILE", help="also write the rows as JSON")
    arguments = parser.parse_args(argv)
    check_json(arguments.json)
    for name in ("rounds", "pictures"):
        if getattr(arguments, name) < 1:
            raise UserError(f"--{name} is {getattr(arguments, name)}. Use 1 or more.")

    from ssd.benchmarks.data import compare_masks, compare_views, device_photometry_ms, stages

    threads = torch.get_num_threads()
    start_worker(0)  # what is measured is what a loader's worker does
    try:
        pairs = compare_views(arguments.rounds, arguments.pictures)
        masks = compare_masks(arguments.rounds)
        spent = stages(arguments.rounds, arguments.pictures)
    finally:
        torch.set_num_threads(threads)

    out = console()
    made_by = "compiled code" if native.available() else "torch"
    title = f"views, one core, processor time; by {made_by} on {platform.machine()}, torch {torch.__version__}"
    out.print(pairs_table([*pairs, masks], title))
    table = Table("of a 500x375 JPEG, 2x224 + 8x96", "ms a picture", "share")
    total = sum(spent.values())
    for stage, time_ms in spent.items():
        table.add_row(stage, f"{time_ms:.3f}", f"{time_ms / total:.1%}")
    table.add_row("together", f"{total:.3f}", "")
    out.print(table)
    nothing = dict.fromkeys(("against", "baseline", "ratio", "low", "high"))
    stage_rows = [{"case": f"stage: {stage}", "ours": spent[stage], "unit": "ms/picture", **nothing} for stage in spent]
    if torch.cuda.is_available():
        time_ms = device_photometry_ms(arguments.rounds)
        out.print(f"colours of 64 pictures on {torch.cuda.get_device_name()}: {time_ms:.2f} ms")
        stage_rows.append({"case": "stage: colours of 64 on the device", "ours": time_ms, "unit": "ms", **nothing})
    write_json(arguments.json, [pair.row() for pair in (*pairs, masks)] + stage_rows)
    return 0


def run_step(argv: list[str]) -> int:
    from ssd.benchmarks.step import PARTS, Case, compare_on_gpu, measure

    parser = Parser(
        prog="ssd bench step",
        description="A training step of DINO, ours beside lightly's building blocks on the same timm backbone and the same "
        "pictures: one forward pass per view, float32, its head, loss and momentum update, as its example does it. Parts: "
        + "; ".join(f"{part}, {what}" for part, what in PARTS.items())
        + ". Rows of memory are in MiB, where a ratio below 1 is the better one. With a GPU also a ViT-S of 2x224 + 8x96 in "
        "bf16: images/s, model-flops utilisation, the largest batch that fits.",
        epilog=EPILOG + " One thread is timed in processor time, more by the wall, for which nothing else should run.",
    )
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS), help="what to measure; all")
    parser.add_argument("--rounds", type=at_least_one, default=7, help="times that each pair runs")
    parser.add_argument("--threads", type=at_least_one, default=2, help="of torch, on both sides")
    parser.add_argument("--network", default="vit_tiny_patch16_224", help="timm's name of the ViT that is trained")
    parser.add_argument("--large", default="vit_base_patch16_224", help="that of the ViT whose average is kept up")
    parser.add_argument("--batch", type=at_least_one, default=32, help="pictures in a step")
    parser.add_argument("--prototypes", type=at_least_one, nargs="+", default=[4096, 65_536], help="K, one or more")
    parser.add_argument("--compile", action="store_true", help="also what torch.compile does; minutes on a CPU")
    parser.add_argument("--json", metavar="FILE", help="also write the rows as JSON")
    arguments = parser.parse_args(argv)
    check_json(arguments.json)

    out, case = console(), Case(arguments.network, batch=arguments.batch)
    case.backbone()  # refuses a name that is no ViT's before anything is spent
    threads = torch.get_num_threads()
    torch.set_num_threads(arguments.threads)
    pairs: list[Pair] = []
    facts: list[dict[str, Any]] = []
    try:
        for part in arguments.parts:
            out.print(f"{part}: {PARTS[part]}")
            pairs += measure(part, case, arguments.prototypes, arguments.large, arguments.rounds, arguments.compile)
    finally:
        torch.set_num_threads(threads)
    if torch.cuda.is_available():
        gpu_pairs, facts = compare_on_gpu(arguments.rounds)
        pairs += gpu_pairs
    timed = "processor time of one thread" if arguments.threads == 1 else f"{arguments.threads} threads"
    out.print(pairs_table(pairs, f"DINO's step, {timed} on {platform.machine()}, torch {torch.__version__}"))
    for fact in facts:
        out.print(f"{fact['case']}: {fact['ours']:.1%} {fact['unit']}")
    write_json(arguments.json, [pair.row() for pair in pairs] + facts)
    return 0


def run_masked(argv: list[str]) -> int:
    from ssd.benchmarks.masked import PARTS, Case, check, measure

    parser = Parser(
        prog="ssd bench masked",
        description="What masked regression and LEAP do not compute, beside the same network computing it. Parts: "
        + "; ".join(f"{part}, {what}" for part, what in PARTS.items())
        + ".",
        epilog=EPILOG + " One thread is timed in processor time, more by the wall, for which nothing else should run.",
    )
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS), help="what to measure; all")
    parser.add_argument("--rounds", type=at_least_one, default=7, help="times that each pair runs")
    parser.add_argument("--threads", type=at_least_one, default=2, help="of torch, on both sides")
    parser.add_argument("--network", default=Case.network, help="timm's name of the ViT")
    parser.add_argument("--size", type=at_least_one, default=Case.size, help="side of the pictures, px")
    parser.add_argument("--batch", type=at_least_one, default=Case.batch, help="pictures in a pass")
    parser.add_argument("--ratio", type=float, default=Case.ratio, help="share of patches that is hidden")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--json", metavar="FILE", help="also write the rows as JSON")
    arguments = parser.parse_args(argv)
    check_json(arguments.json)
    check_device(arguments.device)
    out, threads = console(), torch.get_num_threads()
    cases = [
        Case(arguments.network, {}, arguments.size, arguments.batch, arguments.ratio, half, arguments.device)
        for half in (False, True)
    ]
    check(cases[0])  # before anything is spent
    keep_freed_memory()  # as a run does
    torch.set_num_threads(arguments.threads)
    pairs: list[Pair] = []
    try:
        for part in arguments.parts:
            out.print(f"{part}: {PARTS[part]}")
            pairs += [pair for case in cases for pair in measure(part, case, arguments.rounds)]
    finally:
        torch.set_num_threads(threads)
    timed = "processor time of one thread" if arguments.threads == 1 else f"{arguments.threads} threads"
    out.print(pairs_table(pairs, f"masked regression, {timed} on {platform.machine()}, torch {torch.__version__}"))
    write_json(arguments.json, [pair.row() for pair in pairs])
    return 0


def run_cached(argv: list[str]) -> int:
    from ssd.benchmarks.cached import METHODS, compare_step
    from ssd.benchmarks.masked import Case, check
    from ssd.cached_targets.forms import DTYPES, Form

    parser = Parser(
        prog="ssd bench cached",
        description="Forward and backward pass of a student whose targets are read from a folder, in the process that trains, "
        "beside the same with its teacher's pass. Files that were just written are read from memory. Methods: "
        + "; ".join(f"{name}, {what}" for name, what in METHODS.items())
        + ".",
        epilog=EPILOG + " One thread is timed in processor time, more by the wall, for which nothing else should run.",
    )
    parser.add_argument(
        "--methods", nargs="+", choices=list(METHODS), default=list(METHODS), help="what to measure; all"
    )
    parser.add_argument("--rounds", type=at_least_one, default=7, help="times that each pair runs")
    parser.add_argument("--threads", type=at_least_one, default=2, help="of torch, on both sides")
    parser.add_argument("--network", default=Case.network, help="timm's name of the student")
    parser.add_argument("--teacher", default="vit_small_patch16_224", help="timm's name of the teacher")
    parser.add_argument("--size", type=at_least_one, default=Case.size, help="side of the pictures, px")
    parser.add_argument("--batch", type=at_least_one, default=Case.batch, help="pictures in a pass")
    parser.add_argument("--ratio", type=float, default=Case.ratio, help="share of patches that is hidden")
    parser.add_argument("--half", action="store_true", help="both sides under bf16 autocast")
    parser.add_argument("--dtype", choices=DTYPES, default="float16", help="of what is stored")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--json", metavar="FILE", help="also write the rows as JSON")
    arguments = parser.parse_args(argv)
    check_json(arguments.json)
    check_device(arguments.device)
    out, threads = console(), torch.get_num_threads()
    case = Case(
        arguments.network, {}, arguments.size, arguments.batch, arguments.ratio, arguments.half, arguments.device
    )
    for name in (arguments.network, arguments.teacher):  # before anything is spent
        check(replace(case, network=name))
    keep_freed_memory()  # as a run does
    torch.set_num_threads(arguments.threads)
    form = Form(arguments.dtype)
    try:
        found = [compare_step(name, case, arguments.teacher, form, arguments.rounds) for name in arguments.methods]
    finally:
        torch.set_num_threads(threads)
    timed = "processor time of one thread" if arguments.threads == 1 else f"{arguments.threads} threads"
    title = f"stored targets, {timed} on {platform.machine()}, torch {torch.__version__}"
    out.print(pairs_table([each.pair for each in found], title))
    table = Table("method", "bytes a look", "pictures in a GB", f"{arguments.dtype} is off by")
    for name, each in zip(arguments.methods, found, strict=True):
        table.add_row(name, f"{each.bytes_per_look:,}", f"{10**9 // each.bytes_per_look:,}", f"{each.error:.1e}")
    out.print(table)
    write_json(arguments.json, [each.row() for each in found])
    return 0


def run_evaluation(argv: list[str]) -> int:
    from ssd.benchmarks.evaluation import PARTS, Sizes, measure, measure_on_gpu

    sizes = Sizes()
    parser = Parser(
        prog="ssd bench evaluation",
        description="Probes of cached features, ours beside the usual way to the same numbers, on features drawn with a "
        "spectrum like a network's. Parts: "
        + "; ".join(f"{part}, {what}" for part, what in PARTS.items())
        + ". With a GPU also the seconds that each takes there.",
        epilog=EPILOG + " One thread is timed in processor time, more by the wall, for which nothing else should run.",
    )
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS), help="what to measure; all")
    parser.add_argument("--rounds", type=at_least_one, default=5, help="times that each pair runs")
    parser.add_argument("--threads", type=at_least_one, default=2, help="of torch and of BLAS, on both sides")
    parser.add_argument("--bank", type=at_least_one, default=sizes.bank, help="k-NN's training samples")
    parser.add_argument("--queries", type=at_least_one, default=sizes.queries, help="k-NN's test samples")
    parser.add_argument("--train", type=at_least_one, default=sizes.train, help="the linear probes' training samples")
    parser.add_argument("--json", metavar="FILE", help="also write the rows as JSON")
    arguments = parser.parse_args(argv)
    check_json(arguments.json)
    if arguments.train < 256:
        raise UserError(f"--train is {arguments.train}, and a batch of the linear probe has 256. Use more.")
    if arguments.bank < sizes.k:
        raise UserError(f"--bank is {arguments.bank}, and {sizes.k} neighbours are asked. Use more.")

    sizes = Sizes(bank=arguments.bank, queries=arguments.queries, train=arguments.train)
    clock = time.process_time if arguments.threads == 1 else time.perf_counter
    out, threads = console(), torch.get_num_threads()
    torch.set_num_threads(arguments.threads)
    pairs: list[Pair] = []
    facts: list[dict[str, Any]] = []
    try:
        with threadpool_limits(arguments.threads):
            for part in arguments.parts:
                out.print(f"{part}: {PARTS[part]}")
                found, answers = measure(part, sizes, arguments.rounds, clock)
                pairs, facts = pairs + found, facts + answers
    finally:
        torch.set_num_threads(threads)
    if torch.cuda.is_available():
        facts += measure_on_gpu(sizes, arguments.rounds)
    timed = "processor time of one thread" if arguments.threads == 1 else f"{arguments.threads} threads"
    out.print(pairs_table(pairs, f"probes, {timed} on {platform.machine()}, torch {torch.__version__}"))
    for fact in facts:
        beside = "" if fact["baseline"] is None else f", theirs {fact['baseline']:.4f}"
        out.print(f"{fact['case']}: {fact['ours']:.4f}{beside} {fact['unit']}", markup=False, highlight=False)
    write_json(arguments.json, [pair.row() for pair in pairs] + facts)
    return 0
