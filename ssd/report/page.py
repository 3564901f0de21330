"""The page: everything it needs is in it, and nothing is asked of a server."""

import re
from collections.abc import Sequence
from datetime import datetime
from html import escape
from importlib.resources import files

from ssd.report import words
from ssd.report.cards import cards, configs
from ssd.report.figures import curves, pictures
from ssd.report.groups import Group, grouped
from ssd.report.reading import Run
from ssd.report.tables import differences, numbers


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
