"""The page: everything it needs is in it, and nothing is asked of a server."""

import base64
import io
import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from html import escape
from importlib.resources import files
from typing import Any

from PIL import Image

from ssd.report import words
from ssd.report.chart import chart, line_of, short
from ssd.report.reading import Result, Run, flattened, seeds_of_one, setting_differences

COLOURS = 8
LARGEST_PNG = 80_000  # bytes; larger pictures are photographs, which JPEG holds in a fifth
JPEG_QUALITY = 90
MOST_SETTINGS = 20  # that differ and are shown at once
MOST_CLASSES = 40  # named in a data card

OTHERS = ("train/loss/", "train/grad", "train/speed", "train/health", "train/memory", "train/schedule/")
CHARTS: dict[str, Callable[[str], bool]] = {
    "Held-out data": lambda name: name.startswith("val/"),
    "Loss": lambda name: name.startswith("train/loss/"),
    "Teacher and targets": lambda name: name.startswith("train/") and not name.startswith(OTHERS),
    "Gradients, speed and health": lambda name: name.startswith(
        ("train/grad", "train/speed", "train/health", "train/memory")
    ),
    "Schedules": lambda name: name.startswith("train/schedule/"),
}
CLOSED = ("Schedules",)
"""Sections that open on demand."""
PICTURES = {
    "views": "The first batch: originals with their crops, then the views as the network gets them",
    "attention": "Attention of each head of the last block",
    "components": "Main components of patch features, in colours that keep their meaning over time",
    "neighbours": "Nearest neighbours in the training data, framed in green where the class is the same",
    "prototypes": "What the most used prototypes score highest for",
}


@dataclass
class Group:
    """Runs of one colour: one, or several seeds of one."""

    name: str
    colour: int
    runs: list[Run]


def page(runs: Sequence[Run], title: str | None = None) -> str:
    """One HTML page about one run or several side by side."""
    groups = grouped(runs)
    parts = [
        opening(runs, groups, title),
        problems(runs),
        findings(runs),
        numbers(runs),
        differences(runs),
        curves(groups),
        pictures(runs),
        cards(runs),
        configs(runs),
    ]
    named = title or " and ".join(run.name for run in runs[:3])
    style, script = ((files("ssd.report") / name).read_text() for name in ("page.css", "page.js"))
    made = datetime.now().strftime("%Y-%m-%d %H:%M")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<title>{escape(named)}</title>\n<link rel="icon" href="data:,">\n<style>\n{style}</style>\n</head>\n<body>\n<main>\n'
        f"{''.join(parts)}<footer>Written by ssd report, {made}.</footer>\n</main>\n<script>\n{script}</script>\n"
        "</body>\n</html>\n"
    )


def grouped(runs: Sequence[Run]) -> list[Group]:
    """Runs that differ in nothing but their seed share a colour and a band."""
    groups: list[Group] = []
    for run in runs:
        home = next((group for group in groups if seeds_of_one([group.runs[0], run])), None)
        if home is not None:
            home.runs.append(run)
        else:
            groups.append(Group(run.name, len(groups) % COLOURS, [run]))
    for group in groups:
        if len(group.runs) > 1:
            group.name = f"{group.runs[0].name} and {len(group.runs) - 1} more seeds"
    return groups


# ---------------------------------------------------------------------- what comes first


def opening(runs: Sequence[Run], groups: Sequence[Group], title: str | None) -> str:
    """The verdict."""
    if len(runs) == 1:
        run = runs[0]
        said = "".join(f'<p class="verdict">{bold(sentence)}</p>' for sentence in words.verdict(run))
        return f'<p class="eyebrow">Pretraining run</p><h1>{escape(title or run.name)}</h1><p>{badge(run)}</p>{said}'
    rows = []
    for group in groups:
        for run in group.runs:
            said = " ".join(words.verdict(run))
            rows.append(
                f'<li class="run-{group.colour}"><span class="name">{escape(run.name)}</span> {badge(run)}'
                f'<p class="verdict">{bold(said)}</p></li>'
            )
    heading = title or f"{len(runs)} runs side by side"
    first = f'<p class="eyebrow">Pretraining runs</p><h1>{escape(heading)}</h1>{leader(groups)}'
    return f'{first}<ul class="runs">{"".join(rows)}</ul>'


def leader(groups: Sequence[Group]) -> str:
    """Which run is ahead by the number that all of them have, and by how much, of runs on the same data alone; of several
    seeds of one run their mean."""
    known = {words.fingerprint_of(run) for group in groups for run in group.runs}
    if len(known) > 1:
        return '<p class="verdict">The runs learned from different data, so their numbers do not compare.</p>'
    for name in words.MONITORS:
        if len(groups) == 1:
            found = [result.value for run in groups[0].runs for result in run.numbers if result.name == name]
            if len(found) == len(groups[0].runs):
                factor, unit = (100, " %") if words.is_share(name) else (1, "")
                mean, low, high = (factor * value for value in (sum(found) / len(found), min(found), max(found)))
                return (
                    f'<p class="verdict">Over {len(found)} seeds, {words.measure(name)} is <b>{mean:.1f}{unit}</b> on average, '
                    f"from {low:.1f} to {high:.1f}.</p>"
                )
        means = []
        for group in groups:
            found = [result.value for run in group.runs for result in run.numbers if result.name == name]
            if len(found) == len(group.runs):
                means.append((sum(found) / len(found), group.name))
        if len(means) == len(groups) > 1:
            means.sort(reverse=True)
            (first, ahead), (second, behind) = means[:2]
            share = words.is_share(name)
            by = f"{100 * (first - second):.1f} points" if share else f"{first - second:.1f}"
            what = words.percent(first) if share else f"{first:.1f}"
            one = "the mean of its seeds" if any(len(group.runs) > 1 for group in groups) else "one run of each"
            return (
                f'<p class="verdict">By {words.measure(name)}, <b>{escape(ahead)}</b> is ahead with <b>{what}</b>, {by} before '
                f"{escape(behind)} ({one}).</p>"
            )
    return ""


def badge(run: Run) -> str:
    return f'<span class="badge {run.state}">{escape(words.state(run))}</span>'


def bold(sentence: str) -> str:
    """What stands between asterisks."""
    return re.sub(r"\*(.+?)\*", r"<b>\1</b>", escape(sentence))


def problems(runs: Sequence[Run]) -> str:
    """What could not be read, and how a run ended that did not finish."""
    said = []
    for run in runs:
        own = [*([f"the run ended with {run.error}"] if run.error else []), *run.problems]
        said += [f"{run.name}: {text}" if len(runs) > 1 else text for text in own]
    if not said:
        return ""
    rows = "".join(f"<p>{escape(text)}</p>" for text in said)
    return f'<section class="problems">{rows}</section>'


def findings(runs: Sequence[Run]) -> str:
    """What the doctor found."""
    rows = []
    for run in runs:
        for finding in run.findings:
            step = finding.get("step")
            where = f" at step {step:,}" if isinstance(step, int) else ""
            named = f"{run.name}: " if len(runs) > 1 else ""
            of = "".join(
                f", {part} {finding[part]}" for part in ("term", "layer", "rank") if finding.get(part) is not None
            )
            kind = escape(f"{named}{str(finding.get('kind', 'finding')).replace('-', ' ')}{where}{of}")
            advice = finding.get("advice") or finding.get("suggestion")
            rows.append(
                f'<div class="finding"><p><b>{kind}</b></p><p>{escape(str(finding.get("message", "")))}</p>'
                + (f'<p class="soft">{escape(str(advice))}</p>' if advice else "")
                + "</div>"
            )
    return f"<h2>What the doctor found</h2>{''.join(rows)}" if rows else ""


# ---------------------------------------------------------------------- numbers


def numbers(runs: Sequence[Run]) -> str:
    parts = [baselines(run, len(runs) > 1) for run in runs]
    names = sorted({result.name for run in runs for result in run.numbers}, key=words.importance)
    if names:
        heading = "<h3>At the last evaluation</h3>" if any(parts) else ""
        parts.append(heading + (one_table(runs[0].numbers) if len(runs) == 1 else side_by_side(runs, names)))
    for run in runs:
        named = f"{run.name}, " if len(runs) > 1 else ""
        parts += [f"<h3>{escape(named + file)}</h3>{one_table(found)}" for file, found in run.probes.items()]
    alone = [run for run in runs if not run.baselines and run.checkpoints]
    if alone:
        best = alone[0].checkpoints.get("best") or next(iter(alone[0].checkpoints.values()))
        command = f"ssd probe {best} --baselines --json {alone[0].folder / 'probe.json'}"
        parts.append(
            f'<p class="soft">To see {escape(alone[0].name)} beside raw pixels and the untrained network here:<br>'
            f"<code>{escape(command)}</code></p>"
        )
    return f"<h2>Results</h2>{''.join(parts)}" if any(parts) else ""


def baselines(run: Run, several: bool) -> str:
    """The pretrained network beside raw pixels and the untrained one."""
    table = run.baselines
    if not table:
        return ""
    columns = [name for name in words.TELLING if any(name in row for row in table.values())]
    columns += [name for row in table.values() for name in row if name not in columns]
    columns = list(dict.fromkeys(columns))
    head = "".join(f'<th class="number">{escape(words.measure(name))}</th>' for name in columns)
    order = [name for name in words.ROWS if name in table] + [name for name in table if name not in words.ROWS]
    body = "".join(
        f'<tr{" class=best" if name == "pretrained" else ""}><th scope="row">{escape(words.ROWS.get(name, name))}</th>'
        + "".join(cell(table[name].get(column)) for column in columns)
        + "</tr>"
        for name in order
    )
    protocols = {column: row[column].protocol for row in table.values() for column in columns if column in row}
    named = "".join(
        f"<li>{escape(words.measure(column))}: <code>{escape(protocol)}</code></li>"
        for column, protocol in protocols.items()
        if protocol
    )
    return (
        f"<h3>{f'{escape(run.name)}: f' if several else 'F'}rozen features of held-out data</h3>"
        f'<div class="scroll"><table><thead><tr><th></th>{head}</tr></thead><tbody>{body}</tbody></table></div>'
        + (f"<details><summary>Protocols</summary><ul class=facts>{named}</ul></details>" if named else "")
    )


def cell(result: Result | None) -> str:
    if result is None:
        return '<td class="number"></td>'
    spread = ""
    if result.spread is not None:
        spread = f' <span class="spread">± {100 * result.spread if words.is_share(result.name) else result.spread:.1f}</span>'
    return f'<td class="number">{escape(words.value(result))}{spread}</td>'


def one_table(numbers: Sequence[Result]) -> str:
    """Columns that nothing is known of are left out."""
    chances, protocols = any(r.chance is not None for r in numbers), any(r.protocol for r in numbers)
    head = '<th class="number">chance</th>' * chances + "<th>protocol</th>" * protocols
    body = "".join(
        f'<tr><th scope="row">{escape(words.measure(result.name))}</th>{cell(result)}'
        + f'<td class="number">{"" if result.chance is None else words.percent(result.chance)}</td>' * chances
        + f"<td><code>{escape(result.protocol)}</code></td>" * protocols
        + "</tr>"
        for result in sorted(numbers, key=lambda result: words.importance(result.name))
    )
    return (
        f'<div class="scroll"><table><thead><tr><th>measure</th><th class="number">value</th>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def side_by_side(runs: Sequence[Run], names: Sequence[str]) -> str:
    head = "".join(f'<th class="number">{escape(words.measure(name))}</th>' for name in names)
    tables = [{result.name: result for result in run.numbers} for run in runs]
    body = "".join(
        f'<tr><th scope="row">{escape(run.name)}</th>{"".join(cell(table.get(name)) for name in names)}'
        f'<td class="number">{run.step:,}</td><td class="number">{words.duration(run.seconds) if run.seconds else ""}</td></tr>'
        for run, table in zip(runs, tables)
    )
    return (
        f'<div class="scroll"><table><thead><tr><th></th>{head}<th class="number">steps</th><th class="number">time</th></tr>'
        f"</thead><tbody>{body}</tbody></table></div>"
    )


def differences(runs: Sequence[Run]) -> str:
    """Settings that are not the same in all runs."""
    if len(runs) < 2:
        return ""
    found = setting_differences(runs)
    if not found:
        return "<h2>What differs</h2><p>Nothing in the settings: the runs are repeats.</p>"
    head = "".join(f"<th>{escape(run.name)}</th>" for run in runs)
    rows = [
        f'<tr><th scope="row"><code>{escape(name)}</code></th>'
        + "".join(f"<td><code>{escape(setting(name, value))}</code></td>" for value in row)
        + "</tr>"
        for name, row in found.items()
    ]

    def table(part: Sequence[str]) -> str:
        return (
            f'<div class="scroll"><table><thead><tr><th>setting</th>{head}</tr></thead><tbody>{"".join(part)}</tbody></table>'
            "</div>"
        )

    more = rows[MOST_SETTINGS:]
    rest = f"<details><summary>{len(more)} more</summary>{table(more)}</details>" if more else ""
    return f"<h2>What differs</h2>{table(rows[:MOST_SETTINGS])}{rest}"


def setting(name: str, value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return value.rpartition(".")[2] if name.endswith("class_path") else value
    return json.dumps(value)


# ---------------------------------------------------------------------- curves and pictures


def curves(groups: Sequence[Group]) -> str:
    names = sorted({name for group in groups for run in group.runs for name in run.series})
    sections = []
    for heading, belongs in CHARTS.items():
        drawn: list[str] = []
        constant: list[str] = []
        shapes: list[list[list[float]]] = []
        own = sorted((name for name in names if belongs(name)), key=lambda name: words.importance(behind(name)))
        for name in own:
            lines = [
                line_of(group.name, group.colour, [run.series[name] for run in group.runs if run.series.get(name)])
                for group in groups
            ]
            known = [line for line in lines if line is not None]
            told = words.measure(behind(name))
            level = {value for line in known for value in (*line.values, *(line.low or ()), *(line.high or ()))}
            if len(level) == 1 and all(len(line.steps) > 1 for line in known):
                constant.append(f"{told} {short(level.pop())}")
            elif known and [line.values for line in known] not in shapes:
                # a loss of one term is its total
                shapes.append([line.values for line in known])
                drawn.append(chart(known, told, "%" if words.is_share(name) else ""))
        if drawn or constant:
            body = f'<div class="charts">{"".join(drawn)}</div>' if drawn else ""
            if constant:
                body += f'<p class="soft sans small">Constant: {escape(", ".join(constant))}.</p>'
            closed = heading in CLOSED
            sections.append(
                f"<details><summary>{heading}</summary>{body}</details>" if closed else f"<h3>{heading}</h3>{body}"
            )
    if not sections:
        return ""
    return f"<h2>Curves</h2>{key(groups) if len(groups) > 1 or len(groups[0].runs) > 1 else ''}{''.join(sections)}"


def behind(name: str) -> str:
    """A logged name without its stage."""
    return name.partition("/")[2]


def key(groups: Sequence[Group]) -> str:
    """Which colour is which run; a band is drawn from the lowest to the highest of several seeds."""
    named = "".join(f'<span class="run-{group.colour}"><i>{escape(group.name)}</i></span>' for group in groups)
    band = '<span class="soft">bands from the lowest to the highest seed, lines their mean</span>'
    seeds = any(len(group.runs) > 1 for group in groups)
    return f'<div class="key">{named}</div>' + (f'<p class="soft sans">{band}</p>' if seeds else "")


def pictures(runs: Sequence[Run]) -> str:
    kinds = [kind for kind in PICTURES if any(kind in run.pictures for run in runs)]
    kinds += sorted({kind for run in runs for kind in run.pictures} - set(kinds))
    sections = []
    for kind in kinds:
        shown = "".join(picture(run, kind, len(runs) > 1) for run in runs if kind in run.pictures)
        sections.append(f"<h3>{escape(PICTURES.get(kind, kind))}</h3>{shown}")
    return f"<h2>Pictures</h2>{''.join(sections)}" if sections else ""


def picture(run: Run, kind: str, several: bool) -> str:
    """The last picture of its kind, and with a script any other."""
    found = run.pictures[kind]
    named = f'<p class="row-name">{escape(run.name)}</p>' if several else ""
    steps = [one.step for one in found]
    images = []
    for number, one in enumerate(found):
        when = "" if one.step is None else f", step {one.step:,}"
        hidden = "" if number == len(found) - 1 else " hidden"
        images.append(f'<img src="{data_uri(one.data)}" alt="{escape(f"{kind} of {run.name}{when}")}"{hidden}>')
    frame = f'<div class="frame">{"".join(images)}</div>'
    if len(found) == 1 or None in steps:
        return f'<figure class="picture">{named}{frame}</figure>'
    chooser = (
        f'<label class="steps" hidden><input type="range" min="0" max="{len(found) - 1}" value="{len(found) - 1}" '
        f'aria-label="step"><output></output></label>'
    )
    return f'<figure class="picture" data-steps="{json.dumps(steps)}">{named}{chooser}{frame}</figure>'


def data_uri(data: bytes) -> str:
    """A picture in the page itself; a large one as JPEG, which shows photographs in less."""
    kind = "png"
    if len(data) > LARGEST_PNG:
        out = io.BytesIO()
        with Image.open(io.BytesIO(data)) as opened:
            opened.convert("RGB").save(out, "JPEG", quality=JPEG_QUALITY, subsampling=0)
        if out.tell() < len(data):
            kind, data = "jpeg", out.getvalue()
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


# ---------------------------------------------------------------------- what it was made of


def cards(runs: Sequence[Run]) -> str:
    parts = []
    for run in runs:
        named = f"<h2>{escape(run.name)}</h2>" if len(runs) > 1 else ""
        columns = [
            facts("Data", data_facts(run)),
            facts("Run", run_facts(run)),
            facts("Machine and versions", machine_facts(run)),
        ]
        body = "".join(f"<div>{column}</div>" for column in columns if column)
        parts.append(f'{named or "<h2>What it was made of</h2>"}<div class="columns">{body}</div>{loading(run)}')
    return "".join(parts)


def facts(heading: str, rows: dict[str, str]) -> str:
    if not rows:
        return ""
    body = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td>{escape(text)}</td></tr>' for name, text in rows.items()
    )
    return f"<h3>{heading}</h3><table>{body}</table>"


def data_facts(run: Run) -> dict[str, str]:
    known = run.facts.get("data")
    card = {**run.about, **(known if isinstance(known, dict) else {})}
    rows = {"name": words.data_of(run)}
    if card.get("path"):
        rows["path"] = str(card["path"])
    counts = card.get("samples")
    if isinstance(counts, dict):
        rows["samples"] = ", ".join(f"{count:,} {name}" for name, count in counts.items() if isinstance(count, int))
    if isinstance(card.get("num_classes"), int):
        named = card.get("classes")
        some = [str(name) for name in named[:MOST_CLASSES]] if isinstance(named, list) else []
        more = ", ..." if isinstance(named, list) and len(named) > len(some) else ""
        count = f"{card['num_classes']} (for evaluation alone)" if card["num_classes"] else "no labels"
        rows["classes"] = f"{count}: {', '.join(some)}{more}" if some else count
    if card.get("channels") is not None:
        rows["channels"] = str(card["channels"])
    for name in ("mean", "std"):
        if isinstance(card.get(name), list | tuple):
            rows[name] = ", ".join(f"{value:.4f}" for value in card[name] if isinstance(value, int | float))
    for name in ("value_range", "sampling", "batch_size", "seed", "fingerprint"):
        if card.get(name) is not None:
            rows[name.replace("_", " ")] = str(card[name])
    return rows


def run_facts(run: Run) -> dict[str, str]:
    rows = {"method": words.method_of(run)}
    network = words.backbone_of(run)
    if network:
        rows["backbone"] = network
    rows["steps"] = f"{run.step:,}" if run.total is None else f"{run.step:,} of {run.total:,}"
    if run.seconds:
        rows["time"] = words.duration(run.seconds)
    sessions = run.facts.get("sessions")
    starts = (
        [str(one.get("started")) for one in sessions if isinstance(one, dict)] if isinstance(sessions, list) else []
    )
    if starts:
        rows["started"] = ", and again ".join(
            start.replace("T", " ").removesuffix("+00:00") + " UTC" for start in starts
        )
    skipped = run.series.get("train/health/skipped_steps")
    if skipped:
        rows["skipped steps"] = f"{skipped[max(skipped)]:.0f}"
    speed = run.series.get("train/speed/images_per_s")
    if speed:
        rows["speed"] = f"{speed[max(speed)]:,.0f} images/s"
    return rows


def machine_facts(run: Run) -> dict[str, str]:
    known = run.facts.get("environment")
    if isinstance(known, dict):
        return {name.replace("_", " "): str(value) for name, value in known.items() if value is not None}
    return {"ssd": str(run.about["version"])} if run.about.get("version") else {}


def loading(run: Run) -> str:
    """Where its checkpoints and exports are, and the commands that use them."""
    lines = []
    best = run.checkpoints.get("best") or run.checkpoints.get("last")
    if run.export is not None:
        where = json.dumps(f"local-dir:{run.export}")
        lines += [
            "# in Python, with timm alone",
            "import timm",
            f"model = timm.create_model({where}, pretrained=True)",
            "",
        ]
    if best is not None:
        lines += ["# take the backbone elsewhere", f"ssd export {best} --to timm --out {run.folder / 'export'}"]
        lines += ["# judge it again", f"ssd probe {best} --baselines"]
    last = run.checkpoints.get("last")
    if last is not None and not run.finished:
        lines += ["# go on", f"ssd fit --ckpt_path {last}"]
    if not lines:
        return ""
    return f"<h3>How to load it</h3><pre>{escape(chr(10).join(lines))}</pre>"


def configs(runs: Iterable[Run]) -> str:
    parts = [
        f"<details><summary>All settings of {escape(run.name)} ({len(flattened(run.config)):,})</summary>"
        f"<pre>{escape(run.config_text)}</pre></details>"
        for run in runs
        if run.config_text
    ]
    return "".join(parts)
