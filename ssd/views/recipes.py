"""View recipes by name. A recipe's settings are plain fields, so a config can name one or spell it out."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from ssd.data.randomness import uniforms
from ssd.errors import UserError
from ssd.views.clips import ClipViews
from ssd.views.sound import SoundViews
from ssd.views.view import PictureViews, View, Views, check_scale, check_size, is_number, keep_as_tuples

SIZE = -7  # key of the numbers that choose a step's sizes


@dataclass(frozen=True, kw_only=True)
class DINOViews(PictureViews):
    """Two large global views and several small local ones of every picture.

    Defaults are those of the published code. The published ViTs use 10 local views, split at .25 of the
    area instead of .4, and the ResNet-50 6, split at .14; without local views the global scale should be
    .14 to 1. Caron et al. 2021, section 3.1 and appendix; colours as in BYOL, Grill et al. 2020, table 6.

    Args:
        global_size: side of the two global views, px.
        global_scale: smallest and largest share of the picture's area in a global view.
        local_count: number of local views, 0 or more.
        local_size: side of the local views, px.
        local_scale: smallest and largest share of the picture's area in a local view.
        ratio: narrowest and widest crop, width / height.
        flip: probability of a left-right flip.
        jitter: how far brightness, contrast, saturation and hue move.
        jitter_prob: probability that a view is jittered.
        grey_prob: probability that a view loses its colour.
        blur_prob: probability of a blur in the first global, the second global and the local views.
        blur_prob_inverted: blur with 1 - `blur_prob` instead: what the released DINOv2 and DINOv3 were trained with.
        blur_radius: smallest and largest standard deviation of the blur, px.
        solarize_prob: probability of solarisation in the first global, the second global and the local views.
        solarize_threshold: pixel values from here on are inverted, 0 to 255.
        rotate: largest rotation either way, degrees; like `shear` not in the published recipe, for small data.
        shear: largest slant either way, sideways by a share of the height above the centre.
        gram_size: side of two more views, px, that show what the global ones show in their own colours ("gram": what
            DINOv3's Gram teacher sees); null = none.
    """

    global_size: int = 224
    global_scale: Sequence[float] = (0.4, 1.0)
    local_count: int = 8
    local_size: int = 96
    local_scale: Sequence[float] = (0.05, 0.4)
    ratio: Sequence[float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    jitter: Sequence[float] = (0.4, 0.4, 0.2, 0.1)
    jitter_prob: float = 0.8
    grey_prob: float = 0.2
    blur_prob: Sequence[float] = (1.0, 0.1, 0.5)
    blur_prob_inverted: bool = False
    blur_radius: Sequence[float] = (0.1, 2.0)
    solarize_prob: Sequence[float] = (0.0, 0.2, 0.0)
    solarize_threshold: float = 128
    rotate: float = 0.0
    shear: float = 0.0
    gram_size: int | None = None

    def __post_init__(self):
        keep_as_tuples(
            self, "global_scale", "local_scale", "ratio", "jitter", "blur_prob", "blur_radius", "solarize_prob"
        )
        check_size("global_size", self.global_size)
        check_size("local_size", self.local_size)
        if self.gram_size is not None:
            check_size("gram_size", self.gram_size)
        check_scale("global_scale", self.global_scale)
        check_scale("local_scale", self.local_scale)
        if isinstance(self.local_count, bool) or not isinstance(self.local_count, int) or self.local_count < 0:
            raise UserError(f"local_count is {self.local_count!r}. Give the number of local views, 0 or more.")
        for name in ("blur_prob", "solarize_prob"):
            probabilities = getattr(self, name)
            if len(probabilities) != 3:
                raise UserError(
                    f"{name} is {list(probabilities)}. Give three probabilities: first global view, "
                    "second global view, local views."
                )
        super().__post_init__()

    def kinds(self) -> dict[str, tuple[View, ...]]:
        first, second, local = (
            View(
                size=size,
                scale=scale,
                ratio=self.ratio,
                flip=self.flip,
                jitter=self.jitter,
                jitter_prob=self.jitter_prob,
                grey_prob=self.grey_prob,
                blur_prob=1 - blur_prob if self.blur_prob_inverted else blur_prob,
                blur_radius=self.blur_radius,
                solarize_prob=solarize_prob,
                solarize_threshold=self.solarize_threshold,
                rotate=self.rotate,
                shear=self.shear,
            )
            for size, scale, blur_prob, solarize_prob in zip(
                (self.global_size, self.global_size, self.local_size),
                (self.global_scale, self.global_scale, self.local_scale),
                self.blur_prob,
                self.solarize_prob,
                strict=True,
            )
        )
        kinds: dict[str, tuple[View, ...]] = {"global": (first, second)}
        if self.local_count:
            kinds["local"] = (local,) * self.local_count
        if self.gram_size is not None:
            kinds["gram"] = tuple(
                View(
                    size=self.gram_size,
                    scale=self.global_scale,
                    ratio=self.ratio,
                    flip=self.flip,
                    rotate=self.rotate,
                    shear=self.shear,
                    twin=twin,
                )
                for twin in (0, 1)
            )
        return kinds

    @property
    def image_size(self) -> int:
        return self.global_size


@dataclass(frozen=True, kw_only=True)
class MixedDINOViews(DINOViews):
    """DINOViews of another size from step to step, one in each step for all samples and processes.

    What DINOv3's stage at high resolution is trained with. Siméoni et al. 2025, section 5.1. "gram" views, where there are
    such, keep their proportion to the global ones: `gram_size` / `global_size`.

    Args:
        sizes: rows of three: side of the global views, side of the local views, px, and how often, relative to the others.
    """

    sizes: Sequence[Sequence[float]] = (
        (512, 112, 0.3),
        (768, 112, 0.3),
        (768, 168, 0.3),
        (768, 224, 0.05),
        (768, 336, 0.05),
    )
    global_size: int = 512
    local_size: int = 112

    def __post_init__(self):
        rows = [tuple(row) for row in self.sizes]
        if not rows or any(len(row) != 3 or not is_number(row[2]) or row[2] <= 0 for row in rows):
            raise UserError(
                f"sizes is {[list(row) for row in rows]}. Give one row or more of global size, local size and a weight "
                "above 0, for instance [[512, 112, 0.5], [768, 168, 0.5]]."
            )
        for row in rows:
            for side in row[:2]:
                check_size("a size in sizes", int(side) if side == int(side) else side)  # type: ignore[arg-type]
        object.__setattr__(self, "sizes", tuple((int(row[0]), int(row[1]), float(row[2])) for row in rows))
        super().__post_init__()

    def all_of_a_run(self) -> tuple[Views, ...]:
        return tuple(self._sized(int(large), int(small)) for large, small, _ in self.sizes)

    def at(self, seed: int, step: int) -> Views:
        weights = np.array([row[2] for row in self.sizes])
        drawn = float(uniforms((1,), seed, step, SIZE)[0]) * weights.sum()
        place = min(int(np.searchsorted(weights.cumsum(), drawn, side="right")), len(weights) - 1)
        large, small, _ = self.sizes[place]
        return self._sized(int(large), int(small))

    def _sized(self, global_size: int, local_size: int) -> DINOViews:
        own = {field.name: getattr(self, field.name) for field in fields(DINOViews)}
        if self.gram_size is not None:
            own["gram_size"] = round(self.gram_size / self.global_size * global_size)
        return DINOViews(**own | {"global_size": global_size, "local_size": local_size})


@dataclass(frozen=True, kw_only=True)
class CropViews(PictureViews):
    """One view: a random crop, resized, mirrored, a little recoloured. Defaults are those of MAE (He et al. 2022).

    Args:
        size: side of the view, px.
        scale: smallest and largest share of the picture's area in the view.
        ratio: narrowest and widest crop, width / height.
        flip: probability of a left-right flip.
        jitter: how far brightness, contrast, saturation and hue move.
        jitter_prob: probability that the view is jittered.
        grey_prob: probability that it loses its colour.
        blur_prob: probability of a blur.
        blur_radius: smallest and largest standard deviation of the blur, px.
        rotate: largest rotation either way, degrees.
        shear: largest slant either way, sideways by a share of the height above the centre.
    """

    size: int = 224
    scale: Sequence[float] = (0.2, 1.0)
    ratio: Sequence[float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    jitter: Sequence[float] = (0.0, 0.0, 0.0, 0.0)
    jitter_prob: float = 1.0
    grey_prob: float = 0.0
    blur_prob: float = 0.0
    blur_radius: Sequence[float] = (0.1, 2.0)
    rotate: float = 0.0
    shear: float = 0.0

    def __post_init__(self):
        keep_as_tuples(self, "scale", "ratio", "jitter", "blur_radius")
        check_size("size", self.size)
        super().__post_init__()

    def kinds(self) -> dict[str, tuple[View, ...]]:
        own = {field.name: getattr(self, field.name) for field in fields(CropViews)}
        return {"global": (View(**{name: value for name, value in own.items() if not name.startswith("evaluation")}),)}

    @property
    def image_size(self) -> int:
        return self.size


@dataclass(frozen=True, kw_only=True)
class PlainViews(PictureViews):
    """One view: the largest centred square of the picture, resized, colours as they are.

    Args:
        size: side of the view, px.
    """

    size: int = 224
    evaluation_crop: float = 1.0

    def __post_init__(self):
        check_size("size", self.size)
        super().__post_init__()

    def kinds(self) -> dict[str, tuple[View, ...]]:
        return {"global": (View(size=self.size, scale=(1.0, 1.0), ratio=(1.0, 1.0)),)}

    @property
    def image_size(self) -> int:
        return self.size


RECIPES: dict[str, Views] = {
    "dino": DINOViews(),
    # as the released models were trained; blur_prob_inverted: false is what was meant
    "dinov2": DINOViews(global_scale=(0.32, 1.0), local_scale=(0.05, 0.32), blur_prob_inverted=True),
    # pictures of about 32 px: a local crop below a tenth of them holds under 10 px a side, and a blur of
    # 2 px wipes out what little there is
    "dino_small": DINOViews(
        global_size=32,
        local_count=4,
        local_size=16,
        local_scale=(0.1, 0.4),
        blur_prob=(0.0, 0.0, 0.0),
        evaluation_crop=1.0,
    ),
    "plain": PlainViews(),
    "crop": CropViews(),
    # BEiT's (Bao et al. 2022), which the first data2vec was trained with
    "data2vec": CropViews(scale=(0.08, 1.0), jitter=(0.4, 0.4, 0.4, 0.0)),
    "crop_small": CropViews(size=32, evaluation_crop=1.0),
    "capi": CropViews(scale=(0.6, 1.0)),
    "capi_small": CropViews(size=32, scale=(0.6, 1.0), evaluation_crop=1.0),
    "dmjd": CropViews(scale=(0.5, 1.0)),
    "leap": CropViews(scale=(0.14, 1.0), jitter=(0.4, 0.4, 0.2, 0.1), jitter_prob=0.8, grey_prob=0.2),
    "pcd": DINOViews(global_scale=(0.08, 1.0), local_count=0),
    "supervised": CropViews(scale=(0.35, 1.0)),
    "clip": ClipViews(),
    # one view, as the data is: what masks alone make different
    "clip_crop": ClipViews(
        global_count=1,
        global_scale=(0.44, 1.0),
        local_count=0,
        flip=0.0,
        jitter_prob=0.0,
        grey_prob=0.0,
        blur_prob=(0.0, 0.0),
        evaluation_crop=1.0,
    ),
    "speech": SoundViews(),
    "utterance": SoundViews(
        global_count=1, global_length_s=None, local_count=0, gain_db=(0.0, 0.0), noise_prob=0.0, normalize=True
    ),
    "unfused": SoundViews(
        global_count=1,
        global_length_s=0.95,
        local_count=0,
        gain_db=(0.0, 0.0),
        noise_prob=0.0,
        mix_share=0.4,
        resize=(0.6, 1.5),
    ),
}


def views_named(views: str | Views) -> Views:
    """The recipe of that name; views that are spelled out already come back as they are.

    Raises UserError for an unknown name, listing the choices.
    """
    if isinstance(views, Views):
        return views
    if not isinstance(views, str) or views not in RECIPES:
        raise UserError(
            f"views is {views!r}, which names no recipe. Choose one of {', '.join(sorted(RECIPES))}, "
            "or spell the settings out with class_path ssd.views.recipes.DINOViews."
        )
    return RECIPES[views]
