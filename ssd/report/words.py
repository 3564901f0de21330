"""How a report says things: names of measures, times, counts, and the sentence that comes first."""

import math
from collections.abc import Sequence

from ssd.report.chart import short
from ssd.report.reading import Result, Run

MEASURES = {
    "knn": "kNN",
    "linear": "linear probe",
    "linear_1pct": "linear probe, 1 % of the labels",
    "linear_10pct": "linear probe, 10 % of the labels",
    "knn/top1": "kNN",
    "linear/top1": "linear probe",
    "logistic/top1": "logistic regression",
    "spectrum/rankme": "RankMe",
    "spectrum/alpha_req": "alpha-ReQ",
    "dense/correspondence": "patches found again",
    "spectrum/lidar": "LiDAR",
    "agreement/cosine": "agreement of student and teacher, cosine",
    "prototypes/perplexity": "prototypes in use, perplexity",
    "prototypes/used": "prototypes in use",
    "masks/masked_crops": "share of crops that are masked",
    "loss/total": "total loss",
    "teacher/entropy": "teacher entropy, nats",
    "teacher/kl": "divergence from the teacher, nats",
    "teacher/patch_entropy": "teacher entropy of patches, nats",
    "teacher/patch_kl": "divergence of patches, nats",
    "grad/norm": "gradient norm",
    "speed/images_per_s": "images per second",
    "speed/waiting_share": "time spent waiting for data",
    "health/skipped_steps": "skipped steps",
    "memory/peak_gib": "peak memory, GiB",
}
PROBES = {
    "linear_1pct": "a linear probe on 1 % of the labels",
    "linear_10pct": "a linear probe on 10 % of the labels",
    "knn": "their nearest neighbours",
    "linear": "a linear probe",
}
"""In a sentence."""
ROWS = {
    "pixels": "raw pixels",
    "log-mel": "log-mel statistics",
    "untrained": "untrained network",
    "pretrained": "pretrained",
}
TELLING = ("linear_1pct", "linear_10pct", "knn", "linear")
"""Measures by how much they tell of pretraining: the fewer labels, the more."""
IMPORTANT = ("knn/top1", "linear/top1", "dense/correspondence", "spectrum/rankme", "loss/total")
MONITORS = ("knn/top1", "linear/top1", "dense/correspondence", "spectrum/rankme")


def measure(name: str) -> str:
    """What a logged name, without its stage, is called."""
    return MEASURES.get(
        name,
        name.removesuffix("/top1").removeprefix("loss/").removeprefix("schedule/").replace("/", " ").replace("_", " "),
    )


def importance(name: str) -> tuple[int, str]:
    """Sorts what readers look for first to the front."""
    return (IMPORTANT.index(name) if name in IMPORTANT else len(IMPORTANT), name)


def is_share(name: str) -> bool:
    """Whether a number is in [0, 1] and shown in percent."""
    return name.endswith(("top1", "correspondence", "share", "used")) or name in TELLING


def value(result: Result) -> str:
    if not math.isfinite(result.value):
        return "not finite"
    return percent(result.value) if is_share(result.name) else short(result.value)


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min"
    return f"{hours // 24} days {hours % 24} h"


def millions(count: float) -> str:
    return f"{count / 1e6:.1f} M" if count >= 1e5 else f"{count:,.0f}"


def listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def class_name(config: object) -> str | None:
    path = config.get("class_path") if isinstance(config, dict) else None
    return path.rpartition(".")[2] if isinstance(path, str) else None


def method_of(run: Run) -> str:
    return str(run.facts.get("method") or class_name(run.config.get("model")) or "A method that is not told")


def backbone_of(run: Run) -> str | None:
    """Name and size of the network, as far as they are known."""
    known = run.facts.get("backbone")
    if isinstance(known, dict) and known.get("name"):
        count = known.get("parameters")
        return f"{known['name']} ({millions(count)} parameters)" if isinstance(count, int) else str(known["name"])
    model = run.config.get("model")
    arguments = model.get("init_args") if isinstance(model, dict) else None
    backbone = arguments.get("backbone") if isinstance(arguments, dict) else None
    inner = backbone.get("init_args") if isinstance(backbone, dict) else None
    return str(inner["name"]) if isinstance(inner, dict) and inner.get("name") else None


def data_of(run: Run) -> str:
    card = run.facts.get("data")
    name = card.get("name") if isinstance(card, dict) else None
    return str(name or class_name(run.config.get("data")) or "data that is not told")


def fingerprint_of(run: Run) -> str:
    """Of the data, or its name where that is all that is known."""
    card = run.facts.get("data")
    known = card.get("fingerprint") if isinstance(card, dict) else None
    return str(known or run.about.get("fingerprint") or data_of(run))


def samples_of(run: Run) -> int | None:
    card = run.facts.get("data")
    counts = card.get("samples") if isinstance(card, dict) else None
    found = counts.get("training") if isinstance(counts, dict) else None
    return found if isinstance(found, int) else None


def verdict(run: Run) -> list[str]:
    """What was trained on what, for how long, and what came of it: sentences with the numbers between asterisks."""
    network, count = backbone_of(run), samples_of(run)
    trained = f"{method_of(run)} {'is training' if run.state == 'going' else 'trained'} {network or 'a network'}"
    on = f"on {data_of(run)}" + (f", {count:,} samples," if count else "")
    steps = f"*{run.step:,}* steps" if run.total is None or run.finished else f"*{run.step:,}* of {run.total:,} steps"
    took = f" in *{duration(run.seconds)}*" if run.seconds else ""
    sentences = [f"{trained} {on} for {steps}{took}."]
    table = run.baselines
    best = next((name for name in TELLING if name in table.get("pretrained", {})), None)
    if best is not None:
        of = table["pretrained"][best]
        sentence = f"Its frozen features get *{percent(of.value)}* of held-out samples right by {PROBES[best]}"
        beside = [
            f"*{100 * (of.value - table[row][best].value):+.1f}* points over {words} ({percent(table[row][best].value)})"
            for row, words in (
                ("pixels", "raw pixels"),
                ("log-mel", "log-mel statistics"),
                ("untrained", "the untrained network"),
            )
            if best in table.get(row, {})
        ]
        sentences.append(f"{sentence}: {listed(beside)}." if beside else f"{sentence}.")
        return sentences
    known = {number.name: number for number in run.numbers}
    found = [known[name] for name in MONITORS if name in known][:2]
    if found:
        what = listed([f"*{value(number)}* {measure(number.name)}" for number in found])
        chance = found[0].chance
        guess = f" (chance {percent(chance)})" if chance is not None else ""
        sentences.append(f"At its last evaluation: {what}{guess}.")
    else:
        sentences.append("It has not been evaluated.")
    return sentences


def state(run: Run) -> str:
    if run.state == "finished":
        return "finished"
    ago = f"last sign of life {duration(run.last_sign_s)} ago" if math.isfinite(run.last_sign_s) else "no sign of life"
    return f"going, {ago}" if run.state == "going" else f"stopped early, {ago}"
