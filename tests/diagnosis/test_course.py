"""Rules over logged numbers: what they say of faults, and above all what they do not say of healthy runs."""

import math

import pytest

from lightning_modules.dinov2 import DINOv2
from ssd.diagnosis.course import Look, Phase, diagnose_course, phase_of
from ssd.diagnosis.findings import Finding, is_news
from ssd.diagnosis.logs import diagnose_logs
from ssd.diagnosis.targets import TargetUse
from ssd.schedules import Cosine
from tests.lightning_modules.runs import vit

PHASE = Phase(total_steps=1000, settled=50)
LN_K = math.log(1024)


def use(entropy=0.85 * LN_K, perplexity=600.0, center_share=1.0):
    return TargetUse(1024, 128, entropy, math.log(perplexity), center_share)


def looks(count, **series):
    """Looks at every tenth step; what is a function is asked for the number of the look."""
    usual = {"uses": {"picture": use()}, "terms": {"dino": 6.0}, "rank": 40.0, "gradient_norm": 1.0, "update": 1e-3}
    made = []
    for number in range(count):
        fields = {name: value(number) if callable(value) else value for name, value in (usual | series).items()}
        made.append(Look(step=10 * (number + 1), **fields))
    return made


def kinds(*arguments, phase=PHASE):
    return [finding.kind for finding in diagnose_logs(looks(*arguments[:1], **arguments[1]), phase)]


HEALTHY = {
    "targets that begin as one prototype for all and as uniform": {
        "uses": lambda n: {"picture": use(0.1, 1.1) if n < 3 else use(0.9999 * LN_K, 1023) if n < 5 else use()}
    },
    "uniform for long, on the way out": {
        "uses": lambda n: {"picture": use((1 - 2e-4 * n) * LN_K, 1023)},
    },
    "nearly uniform from the start, and learning": {"uses": lambda n: {"picture": use(0.992 * LN_K, 1022)}},
    "few prototypes, more and more": {"uses": lambda n: {"picture": use(0.5, 2.0 * 1.2**n)}},
    "a random network's rank that halves": {"rank": lambda n: max(75 / (1 + n), 8)},
    "gradients that fall, and rise tenfold": {"gradient_norm": lambda n: 8.0 if n < 2 else 0.25 if n < 20 else 2.5},
    "a warm-up from nothing": {"update": lambda n: 1e-9 if n < 5 else 1e-3, "rate_share": lambda n: min(1.0, n / 5)},
    "a rate that ends at nothing": {
        "update": lambda n: 1e-9 if n > 30 else 1e-3,
        "rate_share": lambda n: float(n <= 30),
    },
    "a loss that rises with targets": {"terms": lambda n: {"dino": min(4 + 0.5 * n, 7.4)}},
    "a loader that is slow to start": {"waiting": lambda n: 0.9 if n < 2 else 0.1, "waited_of": lambda n: 2.0},
    "a scaler that searches": {"loss_scale": 4096.0, "skipped": lambda n: 5 if n < 5 else 0, "recent": 50},
    "predictions that begin flat, and a target that is flat for once": {
        "deviations": lambda n: {"target": 0.05 if n == 20 else 0.5, "prediction": 0.001 if n < 5 else 0.3}
    },
    "predictions that rise from nothing, late": {"deviations": lambda n: {"target": 0.5, "prediction": 1e-4 * 1.2**n}},
    "a centre that follows": {"uses": lambda n: {"picture": use(center_share=1.3 + 0.01 * n)}},
}


@pytest.mark.parametrize("name", HEALTHY)
def test_what_healthy_runs_do_is_no_finding(name):
    assert kinds(40, HEALTHY[name]) == []


FAULTY = {
    "uniform-collapse": {"uses": lambda n: {"picture": use() if n < 10 else use(LN_K - 1e-5, 1023.9)}},
    "one-hot-collapse": {"uses": lambda n: {"picture": use() if n < 10 else use(0.01, 1.02)}},
    "dead-prototypes": {"uses": lambda n: {"picture": use(0.3, 3.0)}},
    "runaway-center": {"uses": lambda n: {"picture": use(center_share=1.0 + n)}},
    "falling-rank": {"rank": lambda n: 40.0 if n < 15 else 1.2},
    "flat-targets": {"deviations": lambda n: {"target": 0.5 if n < 10 else 0.02, "prediction": 0.3}},
    "flat-predictions": {"deviations": lambda n: {"target": 0.5, "prediction": 0.3 if n < 10 else 0.002}},
    "lr-too-high": {"update": 0.4},
    "lr-too-low": {"update": 1e-7},
    "exploding-gradient": {"gradient_norm": lambda n: 1.0 if n < 10 else 1e4},
    "rising-loss": {"terms": lambda n: {"dino": 6.0 if n < 10 else 30.0}},
    "still-teacher": {"teacher_moved": 0.0, "teacher_due": 1e-3},
    "fp16-overflow": {"loss_scale": 2.0**-9, "skipped": 25, "recent": 50},
    "loader-bound": {"waiting": 0.8, "waited_of": 5.0},
}


@pytest.mark.parametrize("kind", FAULTY)
def test_each_fault_is_named_and_no_other(kind):
    assert set(kinds(40, FAULTY[kind])) == {kind}


@pytest.mark.parametrize(
    "kind", ["uniform-collapse", "one-hot-collapse", "dead-prototypes", "rising-loss", "falling-rank", "flat-targets"]
)
def test_collapse_is_no_matter_before_a_run_has_settled(kind):
    assert kinds(40, FAULTY[kind], phase=Phase(total_steps=10_000, settled=500)) == []


@pytest.mark.parametrize("kind", ["uniform-collapse", "one-hot-collapse", "dead-prototypes", "still-teacher"])
def test_a_teacher_that_does_not_follow_cannot_collapse_with_the_student(kind):
    assert kinds(40, FAULTY[kind], phase=Phase(total_steps=1000, settled=50, follows=False)) == []


def test_who_was_sharp_has_fallen_back_sooner():
    """0.997 of ln K is where some begin; it is collapse in a run that had been at 0.4."""
    series = {"uses": lambda n: {"picture": use(0.4 * LN_K) if n < 10 else use(0.997 * LN_K, 1020)}}
    assert kinds(40, series) == ["uniform-collapse"]


def test_patches_are_asked_for_apart_and_their_term_is_named():
    series = {
        "uses": lambda n: {"picture": use(), "patch": use(0.01, 1.02)},
        "terms": {"dino": 6.0, "ibot": 0.1},
    }
    (finding,) = diagnose_course(looks(30, **series), PHASE)
    assert (finding.kind, finding.term) == ("one-hot-collapse", "ibot") and "every patch" in finding.message


def test_advice_follows_the_temperatures():
    blunt = looks(30, uses={"picture": use(LN_K, 1024)}, temperatures=(0.2, 0.1))
    (finding,) = diagnose_course(blunt, PHASE)
    assert finding.advice == "Lower teacher_temperature, 0.2, below student_temperature, 0.1: 0.04."
    sharp = looks(30, uses={"picture": use(LN_K, 1024)}, temperatures=(0.04, 0.1))
    assert diagnose_course(sharp, PHASE)[0].advice == "They never were sharper: halve teacher_temperature."
    fallen = looks(30, uses=lambda n: {"picture": use() if n < 10 else use(LN_K, 1024)}, temperatures=(0.04, 0.1))
    assert diagnose_course(fallen, PHASE)[0].advice == "Lower lr: a third."


def test_the_advice_for_a_high_rate_brings_updates_to_a_hundredth():
    (finding,) = diagnose_course(looks(5, update=0.4), PHASE)
    assert finding.advice == "Divide lr by 100."


def test_a_finding_is_news_once_and_again_when_it_is_twice_as_bad_but_not_for_ever():
    def finding(severity, kind="lr-too-high"):
        return Finding(kind, 1, "message.", "advice.", severity=severity)

    before = [finding(1.0)]
    assert not is_news(finding(1.9), before) and is_news(finding(2.0), before)
    assert is_news(finding(0.1, "falling-rank"), before)
    assert not is_news(finding(100.0), [finding(1.0), finding(2.0), finding(4.0)])


def test_a_run_has_settled_when_all_that_begins_has_begun():
    module = vit(DINOv2, koleo_group=16, freeze_last_layer="3 epochs", lr=Cosine(1e-3, 1e-6, warmup=0.1))
    module.begin(1000, 20)
    assert phase_of(module).settled == 100
    module.begin(400, 20)
    assert phase_of(module).settled == 60
    module.begin(100_000, 20)
    assert phase_of(module).settled == 10_000
    short = vit(lr=1e-3, freeze_last_layer=0.0)
    short.begin(40, 20)
    assert phase_of(short).settled == 20
