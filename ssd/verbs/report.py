"""`ssd report RUN...`: what runs did and what came of it, as one page that needs nothing else."""

from pathlib import Path

from ssd.errors import UserError
from ssd.summary import check_json, check_writable, console, write_json
from ssd.verbs.arguments import Parser


def run(argv: list[str]) -> int:
    parser = Parser(
        prog="ssd report",
        description="Writes one HTML page about a run, or about several side by side: what was trained on what and how well, "
        "tables, curves, pictures, settings that differ, data, machine, and how to load the result. The page holds all it "
        "needs, so it can be mailed, and opens without a server or the network. A run that is still going, or that died, is "
        "told as such; runs that differ in their seed alone are drawn as one line with a band.",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder that ssd fit wrote, such as runs/NAME")
    parser.add_argument(
        "--out", metavar="FILE", help="default: report.html in the run's folder, or here for several runs"
    )
    parser.add_argument("--title", help="heading of the page; default: the name of the run")
    parser.add_argument("--json", metavar="FILE", help="also write each run's state, numbers and problems as JSON")
    arguments = parser.parse_args(argv)

    # what the page is made with takes a second to import, which --help need not wait for
    from ssd.report.page import page
    from ssd.report.reading import read_run
    from ssd.report.words import state, verdict

    check_json(arguments.json)
    runs = [read_run(folder) for folder in arguments.runs]
    out = Path(arguments.out or (runs[0].folder / "report.html" if len(runs) == 1 else "report.html"))
    if out.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"--out {out} is no page. Give a name that ends in .html.")
    check_writable("--out", out)
    text = page(runs, arguments.title)
    out.write_text(text)
    told = console()
    for one in runs:
        said = " ".join(verdict(one)).replace("*", "")
        told.print(f"{one.name} ({state(one)}): {said}", markup=False, highlight=False, soft_wrap=True)
        for problem in one.problems:
            told.print(f"  {problem}", markup=False, highlight=False, soft_wrap=True)
    size = len(text) / 2**20
    told.print(
        f"{out}: {len(runs)} {'run' if len(runs) == 1 else 'runs'}, {size:.1f} MiB", markup=False, highlight=False
    )
    rows = [
        {
            "run": str(one.folder),
            "state": one.state,
            "step": one.step,
            "total": one.total,
            "seconds": one.seconds,
            "numbers": [vars(number) for number in one.numbers],
            "pictures": {kind: len(found) for kind, found in one.pictures.items()},
            "findings": one.findings,
            "problems": one.problems,
        }
        for one in runs
    ]
    write_json(arguments.json, {"file": str(out), "runs": rows})
    return 0
