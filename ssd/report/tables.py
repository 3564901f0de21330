"""Numbers with their protocols, and settings that differ."""

import json
from collections.abc import Sequence
from html import escape
from typing import Any

from ssd.report import words
from ssd.report.reading import Result, Run, setting_differences

MOST_SETTINGS = 20  # that differ and are shown at once


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
