"""Curves and pictures of runs."""

import base64
import io
import json
from collections.abc import Callable, Sequence
from html import escape

from PIL import Image

from ssd.report import words
from ssd.report.chart import chart, line_of, short
from ssd.report.groups import Group
from ssd.report.reading import Run

LARGEST_PNG = 80_000  # bytes; larger pictures are photographs, which JPEG holds in a fifth
JPEG_QUALITY = 90

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
