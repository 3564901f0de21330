"""`ssd bench data`: how fast this machine makes views, ours beside others' in one run."""

import platform

import torch
from rich.table import Table

from ssd.benchmarks.paired import pairs_table
from ssd.data.dataset import start_worker
from ssd.errors import UserError
from ssd.native import views as native
from ssd.summary import check_json, console, write_json
from ssd.verbs.arguments import Parser


def run(argv: list[str]) -> int:
    parser = Parser(
        prog="ssd bench",
        description="data: views of JPEG files in memory, one core and one thread, ours beside lightly's DINO transform "
        "and one made of torchvision's. Both sides in turn; medians and spread of the ratios of each turn.",
    )
    parser.add_argument("what", choices=["data"], metavar="data", help="what to measure")
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
