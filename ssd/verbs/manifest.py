"""`ssd manifest PATH --out FILE.csv`: a table of a data set's files, with what their headers say."""

import os
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from rich.progress import track

from ssd.data.counting import COUNTERS, counted
from ssd.data.folder import check_files, classes_of_folders, picture_files, read_list
from ssd.data.groups import check_group_by, group_names
from ssd.data.manifest import COUNTS, has_header, read_manifest, write_manifest
from ssd.errors import UserError
from ssd.summary import check_json, check_writable, console, print_facts, shown, write_json
from ssd.verbs.arguments import Parser

SHOWN = 3


class Files:
    """Names below `root` with the label of each as written; what `group_names` asks of a source."""

    def __init__(self, root: str, names: list[str], labels: list[str | None], groups: list[str | None]):
        self.root, self.names, self.labels, self.groups = root, names, labels, groups

    def __len__(self) -> int:
        return len(self.names)

    def path_within(self, index: int) -> str:
        return self.names[index]

    def describe(self, index: int) -> str:
        return os.path.join(self.root, self.names[index])


def run(argv: list[str]) -> int:
    parser = Parser(
        prog="ssd manifest",
        description="Writes a table (CSV) of the files of a folder or list, with labels, groups, and the size, length and "
        "rate that their headers say. It is data like any other: ssd fit --data FILE.csv. Files that cannot be "
        "read are named and left out.",
    )
    parser.add_argument(
        "path", metavar="PATH", help="folder, list of files, or manifest, whose labels and groups are kept"
    )
    parser.add_argument("--out", required=True, metavar="FILE.csv", help="file to write")
    parser.add_argument(
        "--group-by",
        metavar="BY",
        help="what belongs together: a number of folders below PATH, or a regular expression for the path",
    )
    parser.add_argument("--json", metavar="FILE", help="also write the numbers as JSON")
    arguments = parser.parse_args(argv)
    if not arguments.out.endswith((".csv", ".tsv")):
        raise UserError(f"--out {arguments.out} does not end in .csv or .tsv. Give the name of a table.")
    check_json(arguments.json)
    check_writable("--out", arguments.out)
    files = find_files(Path(arguments.path))
    if arguments.group_by is not None:
        by = int(arguments.group_by) if arguments.group_by.isdecimal() else arguments.group_by
        check_group_by(by)
        named = group_names(files, by)  # type: ignore[arg-type]
        files.groups = [None if name is None else name.replace("\0", " ") for name in named]

    start = time.perf_counter()
    rows, broken = counted_rows(files, Path(arguments.out))
    if not rows:
        raise UserError(f"none of the {len(files)} files of '{arguments.path}' can be read, for instance {broken[0]}.")
    write_manifest(arguments.out, rows)
    content = report(rows, broken) | {"seconds": time.perf_counter() - start, "file": arguments.out}
    write_json(arguments.json, content)
    tell(content)
    return 0


def find_files(path: Path) -> Files:
    """Raises UserError where there is nothing to list."""
    if path.is_dir():
        names = list(picture_files(str(path), tuple(COUNTERS)))
        if not names:
            raise UserError(
                f"folder '{path}' holds no files that end in {', '.join(COUNTERS)}. Is it the right folder?"
            )
        labels, classes = classes_of_folders(names, path, "auto")
        known = [None] * len(names) if labels is None or classes is None else [classes[label] for label in labels]
        return Files(str(path), names, known, [None] * len(names))
    if not path.is_file():
        raise UserError(f"there is no folder or list '{path}'. Give a folder of files, or a text file of paths.")
    if not has_header(path):
        names, given = read_list(path, tuple(COUNTERS))
        return Files(str(path.parent), names, given, [None] * len(names))
    table = read_manifest(path)
    check_files(path, table.names[:10])
    return Files(str(path.parent), table.names, table.labels, table.group_names)


def counted_rows(files: Files, out: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """One row for each file that can be read, and what is wrong with the others."""
    rows: list[dict[str, Any]] = []
    broken: list[str] = []
    here = os.path.abspath(out.parent)
    for index in track(range(len(files)), "files", disable=not sys.stdout.isatty()):
        path = os.path.abspath(files.describe(index))
        if not is_text(path):
            broken.append(f"{path!r} (its name is not UTF-8)")
            continue
        try:
            counts = counted(path)
        except OSError as error:
            broken.append(f"{path} ({error})")
            continue
        # below the manifest's folder, so that both can be moved together
        name = os.path.relpath(path, here) if path.startswith(here + os.sep) else path
        rows.append({"path": name, "label": files.labels[index], "group": files.groups[index], **counts})
    return rows, broken


def is_text(name: str) -> bool:
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def report(rows: list[dict[str, Any]], broken: list[str]) -> dict[str, Any]:
    """Counts of files, labels and groups, and the range of what was counted."""
    labels = Counter(row["label"] for row in rows if row["label"] is not None)
    groups = Counter(row["group"] for row in rows if row["group"] is not None)
    content: dict[str, Any] = {"files": len(rows), "broken": broken, "classes": dict(labels), "groups": len(groups)}
    if groups:
        content["largest_group"] = max(groups.values())
    for name in COUNTS:
        values = [row[name] for row in rows if name in row]
        if values:
            content[name] = {"least": min(values), "most": max(values)}
    durations = [row["length"] / row["rate"] for row in rows if row.get("rate")]
    if durations:
        content["hours"] = sum(durations) / 3600
    return content


def tell(content: dict[str, Any]) -> None:
    broken = content["broken"]
    facts = {"files": f"{content['files']:,} in {content['seconds']:.1f} s"}
    if broken:
        more = ", ..." if len(broken) > SHOWN else ""
        facts["left out"] = f"{len(broken):,} that cannot be read: {', '.join(broken[:SHOWN])}{more}"
    if content["classes"]:
        sizes = content["classes"].values()
        facts["labels"] = f"{len(sizes):,} classes of {min(sizes):,} to {max(sizes):,} files"
    if content["groups"]:
        facts["groups"] = f"{content['groups']:,}, the largest of {content['largest_group']:,} files"
    for name in COUNTS:
        if name in content:
            facts[name] = f"{content[name]['least']:,} to {content[name]['most']:,}"
    if "hours" in content:
        facts["in all"] = f"{content['hours']:.2f} hours"
    facts["use it"] = f"ssd fit ... --data {shown(content['file'])}"
    print_facts(console(), facts)
