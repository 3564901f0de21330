"""In which ranges settings are known to work, and where that is known from. All of it in `RULES`."""

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

from ssd.planning.facts import Facts

DINO = "Caron et al. 2021"
IBOT = "Zhou et al. 2022"
DINOV2 = "Oquab et al. 2024"
DINOV3 = "Siméoni et al. 2025"
OURS = "docs/performance.md"

PROTOTYPES = ((20_000, 1024), (50_000, 2048), (100_000, 4096), (200_000, 16_384), (500_000, 32_768))
"""Below so many samples, K (lightly-train's defaults for DINO)."""
MOST_PROTOTYPES = 65_536
SHORTEST_RUN = 1800
"""Steps of the quickstart, the shortest run that was measured to learn more than pixels."""


@dataclass(frozen=True)
class Rule:
    """A quantity of a run and the range in which it is known to work.

    Args:
        setting: which the user would change.
        quantity: of a run, None where the rule says nothing of it.
        low, high: of the range, both inside it.
        what: the finding, in a few words; may use {value}, and {low} and {high}.
        why: what happened beyond the range.
        mend: what to set, from the run's facts.
        source: of the range.
    """

    setting: str
    quantity: Callable[[Facts], float | None]
    what: str
    why: str
    mend: Callable[[Facts], str]
    source: str
    low: float = -math.inf
    high: float = math.inf


@dataclass(frozen=True)
class Warned:
    """A rule that a run leaves."""

    setting: str
    what: str
    why: str
    mend: str
    source: str

    def row(self) -> dict[str, str]:
        return asdict(self)


def warned(facts: Facts) -> Iterator[Warned]:
    """What a run's settings leave of the ranges in `RULES`, in their order."""
    for rule in RULES:
        value = rule.quantity(facts)
        if value is None or rule.low <= value <= rule.high:
            continue
        what = rule.what.format(value=value, low=rule.low, high=rule.high)
        yield Warned(rule.setting, what, rule.why, rule.mend(facts), rule.source)


# ---------------------------------------------------------------------- quantities


def fitting_prototypes(samples: int) -> int:
    return next((prototypes for below, prototypes in PROTOTYPES if samples < below), MOST_PROTOTYPES)


def prototypes(facts: Facts) -> float | None:
    """The largest K."""
    return max(facts.prototypes.values(), default=None)


def crowded(facts: Facts) -> float | None:
    """For targets of pictures: there are many more patches, and CAPI's published ablation wants K as large as it gets."""
    most = prototypes(facts)
    if not most or not facts.teacher_follows or facts.targets_of_patches:
        return None
    return most / fitting_prototypes(facts.samples)


def few_prototypes(facts: Facts) -> float | None:
    return min(facts.prototypes.values(), default=None) if facts.teacher_follows else None


def prototypes_for_each_row(facts: Facts) -> float | None:
    """K for each row that Sinkhorn-Knopp assigns: the teacher's views of a step, or their patches."""
    most = prototypes(facts)
    if not facts.sinkhorn or most is None or "global" not in facts.views:
        return None
    return most / facts.target_rows


def half_life_share(facts: Facts) -> float | None:
    half = facts.momentum_half_life
    return None if half is None or facts.stage else half / facts.steps


def momentum(facts: Facts) -> float | None:
    return facts.curves["momentum"].lowest if "momentum" in facts.curves else None


def temperature(facts: Facts) -> float | None:
    """The highest of the teacher's temperatures, of a teacher that follows: only such a one can collapse."""
    found = [curve.highest for name, curve in facts.curves.items() if name.endswith("teacher_temperature")]
    return max(found) if found and facts.teacher_follows else None


def lowest_temperature(facts: Facts) -> float | None:
    found = [curve.lowest for name, curve in facts.curves.items() if name.endswith("teacher_temperature")]
    return min(found) if found and facts.teacher_follows else None


def temperature_warmup(facts: Facts) -> float | None:
    found = [curve.rise for name, curve in facts.curves.items() if name.endswith("teacher_temperature")]
    return max(found) / facts.steps if found else None


def warmup(facts: Facts) -> float | None:
    return facts.curves["lr"].rise / facts.steps


def missing_warmup(facts: Facts) -> float | None:
    """Steps of warm-up of a transformer that begins as it was drawn and follows its own average."""
    begins = facts.patches_px is not None and facts.teacher_follows and not facts.stage
    return facts.curves["lr"].rise if begins else None


def adam_rate(facts: Facts) -> float | None:
    return facts.curves["lr"].highest if facts.adam and not facts.stage else None


def frozen(facts: Facts) -> float | None:
    return facts.frozen_steps / facts.steps


def local_grid(facts: Facts) -> float | None:
    """Patches along the side of a local view."""
    if facts.patches_px is None or "local" not in facts.views:
        return None
    return min(facts.views["local"].grid[-2:])


def masked_grid(facts: Facts) -> float | None:
    """Patches along the side of a view that is masked."""
    return min((min(facts.views[kind].grid[-2:]) for kind in facts.masked), default=None)


def fewest_masked(facts: Facts) -> float | None:
    """Patches hidden in the crop of which the fewest are."""
    return min((masks.fewest for masks in facts.masked.values()), default=None)


def whole_crops(facts: Facts) -> float | None:
    """Share of crops of which nothing is masked, where the views are compared too."""
    found = [masks.whole for masks in facts.masked.values()]
    return min(found) if found and facts.patch_loss else None


def smallest_crop(facts: Facts) -> float | None:
    """Pixels of the data along the smallest crop, of pictures that would have more to show."""
    sides = [view.smallest_side_px for view in facts.views.values() if view.smallest_side_px is not None]
    if not sides or facts.picture_px is None:
        return None
    return min(sides) if min(sides) < facts.picture_px / 2 else None


def enlarged(facts: Facts) -> float | None:
    """By how much the largest crop of the largest view is enlarged."""
    if facts.picture_px is None or not facts.views:
        return None
    return max(view.size / (facts.picture_px * math.sqrt(view.scale[1])) for view in facts.views.values())


def reduced(facts: Facts) -> float | None:
    """By how much the largest crop is made smaller for the largest view."""
    factor = enlarged(facts)
    return 1 / factor if factor else None


def steps(facts: Facts) -> float | None:
    return None if facts.stage else facts.steps


def patch_loss_samples(facts: Facts) -> float | None:
    """Samples of a run with a loss of patches and nothing that spreads features."""
    return facts.samples if facts.patch_loss and facts.koleo_group is None else None


# ---------------------------------------------------------------------- what to set


def fitting_momentum(facts: Facts) -> str:
    steps = 0.02 * facts.steps
    value = 0.5 ** (1 / max(steps, 1))
    return f"a momentum that starts at {max(value, 0.9):.3g}: half of the teacher is then newer after {steps:.0f} steps"


def longer(facts: Facts) -> str:
    return f"trainer.max_epochs {math.ceil(SHORTEST_RUN / facts.steps_per_epoch)}, which is {SHORTEST_RUN} steps"


def shorter(facts: Facts) -> str:
    return f"a length of {max(1000 * facts.steps_per_epoch, SHORTEST_RUN):,} steps or less".replace(",", "")


def fitting_scale(facts: Facts) -> str:
    side = facts.picture_px or 10
    share = min((10 / side) ** 2, 0.25)
    recipe = ", or the recipe dino_small" if 24 <= side <= 64 else ""
    return f"scales of crops that begin at {math.ceil(round(100 * share, 6)) / 100:g}{recipe}"


def fewer_prototypes(facts: Facts) -> str:
    return f"num_prototypes {fitting_prototypes(facts.samples):,}".replace(",", "")


def fewer_for_sinkhorn(facts: Facts) -> str:
    return f"num_prototypes {2 ** int(math.log2(max(8 * facts.target_rows, 2)))} or fewer, or larger batches"


def larger_local(facts: Facts) -> str:
    return f"local_size {4 * (facts.patches_px or 1)} or more, smaller patches, or local_count 0"


def smaller_patches(facts: Facts) -> str:
    size = min(facts.views[kind].size for kind in facts.masked)
    return f"patches of {max(size // 8, 1)} px or fewer, or larger views"


def more_rate(facts: Facts) -> str:
    scaled = "" if facts.lr_rule == "none" else f"; lr_rule {facts.lr_rule} made this of a batch of {facts.step_batch}"
    return f"lr so that it peaks between 5e-4 and 2e-3{scaled}"


RULES: tuple[Rule, ...] = (
    Rule(
        "num_prototypes",
        crowded,
        "K is {value:.3g} times what suits so few samples",
        "2,048 instead of 1,024 prototypes cost 3.6 points with one label per class on 1,297 digits; reports of runs that "
        "learned nothing from little data were mended by a smaller K",
        fewer_prototypes,
        f"lightly-train's defaults by the size of the data; {OURS}",
        high=2,
    ),
    Rule(
        "num_prototypes",
        few_prototypes,
        "K is {value:.0f}",
        "runs with 64 prototypes, and with 32 under Sinkhorn, ended in uniform targets; 256 is the fewest that worked",
        lambda facts: "num_prototypes 256 or more",
        OURS,
        low=256,
    ),
    Rule(
        "target_rule",
        prototypes_for_each_row,
        "Sinkhorn has {value:.3g} prototypes for each row of a step that it shares out",
        "each row must then fill many prototypes alike, which is uniform noise; the published runs had up to 32",
        fewer_for_sinkhorn,
        f"{DINO}, ablation of Sinkhorn-Knopp; {DINOV2}, long recipe",
        high=32,
    ),
    Rule(
        "momentum",
        half_life_share,
        "the teacher takes {value:.0%} of the run to be half new",
        "until then its targets are those of the random network that it began as",
        fitting_momentum,
        f"{DINO}: 0.1 % at .996; {OURS}: 0.8 % at .95",
        high=0.1,
    ),
    Rule(
        "momentum",
        momentum,
        "the teacher keeps only {value:.2g} of itself in a step",
        "a teacher that is nearly the student gave kNN 0.1 in the published ablation; .95 is the lowest that was measured",
        lambda facts: "a momentum from 0.95",
        f"{DINO}, table of teachers; {OURS}",
        low=0.9,
    ),
    Rule(
        "teacher_temperature",
        temperature,
        "the teacher's temperature reaches {value:.3g}",
        "a constant .08 collapsed (kNN 0.1 instead of 69.7); .07 is the highest that is published, reached by a warm-up",
        lambda facts: "0.04, or a warm-up from 0.04 to 0.07",
        f"{DINO}, ablation of sharpening",
        high=0.07,
    ),
    Rule(
        "teacher_temperature",
        lowest_temperature,
        "the teacher's temperature is {value:.3g}",
        "kNN 66.7 at .02 and 43.9 at 0, instead of 69.6 at .04",
        lambda facts: "0.04, or 0.02 where targets stay uniform",
        f"{DINO}, ablation of sharpening",
        low=0.02,
    ),
    Rule(
        "teacher_temperature",
        temperature_warmup,
        "the teacher's temperature rises for {value:.0%} of the run",
        "published recipes are done after 30 %, and a rise that the run does not outlast never gets there",
        lambda facts: "until: 0.3, a share of the run",
        f"{DINO}: 30 of 100 epochs",
        high=0.5,
    ),
    Rule(
        "lr",
        warmup,
        "the learning rate rises for {value:.0%} of the run",
        "published recipes use 10 %, at most 16 %; what is left to learn in is too short",
        lambda facts: "warmup: 0.1, a share of the run",
        f"{DINO}; {DINOV2}",
        high=0.3,
    ),
    Rule(
        "lr",
        missing_warmup,
        "the learning rate has no warm-up",
        "every published run of a transformer has one; without it the first steps can throw it off for good",
        lambda facts: "warmup: 0.1",
        DINO,
        low=1,
    ),
    Rule(
        "lr",
        adam_rate,
        "the learning rate peaks at {value:.3g} for AdamW",
        "published peaks lie between 2.4e-4 and 5.7e-3, ours on small data between 1e-3 and 1.5e-3",
        more_rate,
        f"{DINO}: batch 128 to 1024; {DINOV2}: short recipe; {DINOV3}: Gram stage; {OURS}",
        low=1e-4,
        high=6e-3,
    ),
    Rule(
        "freeze_last_layer",
        frozen,
        "prototypes stay as drawn for {value:.0%} of the run",
        "they are meant to wait for the first epoch of a hundred, until features mean anything",
        lambda facts: "freeze_last_layer 0.01, a share of the run, or 0",
        DINO,
        high=0.1,
    ),
    Rule(
        "data.batch_size",
        lambda facts: facts.step_batch,
        "a step has {value:.0f} samples",
        "batches of 64 to 4,096 are what was published or measured; kNN fell from 59.9 at 1,024 to 57.9 at 128",
        lambda facts: (
            "64 or more" if facts.step_batch < 64 else "a smaller batch, and lr tuned for it where it is above 1024"
        ),
        f"{DINO}, ablation of batch sizes; {DINOV3}; {OURS}",
        low=32,
        high=4096,
    ),
    Rule(
        "koleo_group",
        lambda facts: facts.koleo_group,
        "KoLeo looks for neighbours among {value:.0f} samples",
        "published groups have 16 to 64; the nearest of few is no neighbour, and the nearest of many is a repeat",
        lambda facts: "koleo_group 32, which must divide data.batch_size",
        f"{DINOV2}; {DINOV3}",
        low=16,
        high=64,
    ),
    Rule(
        "views.local_size",
        local_grid,
        "local views have {value:.0f} patches a side",
        "published ones have 6, and 4 worked on 32 px; with 2 a side every run ended in uniform targets",
        larger_local,
        f"{DINO}; {OURS}, the family on digits",
        low=4,
    ),
    Rule(
        "masks",
        masked_grid,
        "masked views have {value:.0f} patches a side",
        "published grids have 14 and more, ours on 32 px 8; on 4 a side the loss of patches taught nothing",
        smaller_patches,
        f"{IBOT}; {OURS}, the family on digits",
        low=6,
    ),
    Rule(
        "masks",
        fewest_masked,
        "some masked crops hide only {value:.0f} patches",
        "a hole of so few is filled from what lies around it; rectangles in the published recipes begin at 4",
        lambda facts: "a higher lower end of masks.ratio, or smaller patches",
        f"{DINOV2}: smallest block 4",
        low=2,
    ),
    Rule(
        "masks",
        whole_crops,
        "{value:.0%} of the crops stay whole",
        "with every global view masked while local ones are whole, the loss between views was unstable",
        lambda facts: "masks.share 0.5",
        f"{IBOT}, the random ratio",
        low=0.3,
    ),
    Rule(
        "views",
        smallest_crop,
        "the smallest crops show {value:.0f} px of a picture",
        "below about 10 px a side there is nothing left to tell pictures apart by",
        fitting_scale,
        OURS,
        low=9.5,
    ),
    Rule(
        "views",
        enlarged,
        "views are {value:.3g} times as large as the pictures",
        "a step costs the square of that, for pixels that are made up; the digits of the quickstart are enlarged 3 times",
        lambda facts: (
            f"views of about {min(int(2 * (facts.picture_px or 32)), 224)} px and patches to match, or dino_small"
        ),
        OURS,
        high=4,
    ),
    Rule(
        "views",
        reduced,
        "pictures are {value:.3g} times as large as the views",
        "what tells them apart may be less than a pixel of a view; published recipes reduce pictures 1.7 times, and "
        "dino_small is for pictures of about 32 px",
        lambda facts: f"views of {max(round((facts.picture_px or 32) / 2 / 16), 1) * 16} px or more, as in method/dino",
        f"{DINO}: ImageNet at 224 px; configs/method/dino_small.yaml",
        high=4,
    ),
    Rule(
        "trainer.max_epochs",
        steps,
        "the run has {value:.0f} steps",
        "runs of 800 and 1,000 steps learned less than raw pixels, 1,800 are the fewest that did",
        longer,
        f"{OURS}, the quickstart and the family",
        low=1500,
    ),
    Rule(
        "trainer.max_epochs",
        lambda facts: facts.samples_seen / facts.samples,
        "each sample is seen {value:,.0f} times",
        "published runs of these methods see theirs up to 1,000 times; beyond that time is better spent on more data",
        shorter,
        f"{DINO}: 800 epochs; solo-learn, CIFAR-10: 1,000; {DINOV3}",
        high=1000,
    ),
    Rule(
        "trainer.precision",
        lambda facts: 16.0 if facts.precision in ("16-mixed", "16", "16-true") else None,
        "half precision with 5 bits of exponent",
        "most reports of losses that are not finite come from it, and bf16 or 32-bit cured them",
        lambda facts: "trainer.precision bf16-mixed",
        f"reports on the released code of {DINO} and {IBOT}",
        low=32,
    ),
    Rule(
        "model",
        patch_loss_samples,
        "a loss of masked patches on {value:,.0f} samples",
        "with published settings iBOT reached kNN 43 on about 10,000 photographs where DINO reached 84",
        lambda facts: "DINO (method/dino_small), or DINOv2 with KoLeo",
        "stable-pretraining, Imagenette",
        low=20_000,
    ),
)
