"""What a view is: the settings of one look at a picture, and of all the looks that make a sample."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ssd.errors import UserError

WHOLE_SOUND = (16_000,)
"""Samples of an input that stands for sounds of any length."""


@dataclass(frozen=True)
class View:
    """How one view is drawn and coloured; pixel values in [0, 255] throughout.

    Args:
        size: side of the square view, px.
        scale: smallest and largest share of the picture's area that the crop covers, in (0, 1].
        ratio: narrowest and widest crop, width / height.
        flip: probability of a left-right flip.
        jitter: how far brightness, contrast, saturation and hue move: a factor of 1 +- the value for
            the first three, a shift of +- the value (at most 0.5, in turns of the colour circle) for hue.
        jitter_prob: probability that a view is jittered at all.
        grey_prob: probability that a view loses its colour.
        blur_prob: probability of a Gaussian blur.
        blur_radius: smallest and largest standard deviation of the blur, px of the view. Pillow calls it radius.
        solarize_prob: probability of solarisation.
        solarize_threshold: pixel values from here on are inverted, 0 to 255.
        rotate: largest rotation either way, degrees; what it brings in from outside repeats the edge.
        shear: largest slant either way: how far a row is moved sideways, as a share of its height above the centre.
        twin: place of the view, counted through all kinds, whose crop, flip and warp this one repeats; null = its own.
    """

    size: int
    scale: Sequence[float] = (1.0, 1.0)
    ratio: Sequence[float] = (3 / 4, 4 / 3)
    flip: float = 0.0
    jitter: Sequence[float] = (0.0, 0.0, 0.0, 0.0)
    jitter_prob: float = 0.0
    grey_prob: float = 0.0
    blur_prob: float = 0.0
    blur_radius: Sequence[float] = (0.1, 2.0)
    solarize_prob: float = 0.0
    solarize_threshold: float = 128
    rotate: float = 0.0
    shear: float = 0.0
    twin: int | None = None

    def __post_init__(self):
        keep_as_tuples(self, "scale", "ratio", "jitter", "blur_radius")
        check_size("size", self.size)
        check_scale("scale", self.scale)
        check_range("ratio", self.ratio, above=0, up_to=math.inf)
        check_range("blur_radius", self.blur_radius, above=0, up_to=math.inf)
        check_jitter("jitter", self.jitter)
        check_between("solarize_threshold", self.solarize_threshold, 0, 255)
        check_between("rotate", self.rotate, 0, 180)
        check_between("shear", self.shear, 0, 1)
        for name in ("flip", "jitter_prob", "grey_prob", "blur_prob", "solarize_prob"):
            check_between(name, getattr(self, name), 0, 1)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Of the axes that a network lays its tokens over: (height, width) in px, with the frames before them for clips."""
        return (self.size, self.size)


@dataclass(frozen=True, kw_only=True)
class Views:
    """All views of a sample, by kind, and how a sample is looked at when it is evaluated.

    Base of the recipes of every modality. Derive from one of them to make a recipe: its settings are fields and
    `kinds` turns them into views.
    """

    def kinds(self) -> Mapping[str, tuple[Any, ...]]:
        """Name of the kind -> its views, one size a kind; a kind without views is absent."""
        raise NotImplementedError(f"{type(self).__name__} does not say which views it has: define `kinds`.")

    @property
    def evaluation_lengths(self) -> tuple[int, ...] | None:
        """`View.lengths` of the evaluation look; None where each sample is as long as it is."""
        raise NotImplementedError(f"{type(self).__name__} does not say how long an evaluation look is")

    @property
    def alters_spectra(self) -> bool:
        """Whether something is done to the spectrograms of sounds, which a method has to apply."""
        return False

    @property
    def equal_lengths(self) -> bool:
        """Whether the views of a kind are as long as one another in a batch, without padding."""
        return True

    def all_of_a_run(self) -> tuple["Views", ...]:
        """The recipes that steps of a run take; more than one where they differ from step to step."""
        return (self,)

    def at(self, seed: int, step: int) -> "Views":
        """The recipe of one step, the same for all its samples, a function of (seed, step)."""
        return self


def require_globals(views: Views, least: int, by: str) -> None:
    """Raises UserError unless there are so many "global" views for the method named `by`, and another to predict."""
    kinds = {kind: len(found) for kind, found in views.kinds().items()}
    if kinds.get("global", 0) < least or sum(kinds.values()) < 2:
        several = "a 'global' view" if least == 1 else f"at least {least} 'global' views"
        raise UserError(
            f"views: this recipe gives {kinds}, but {by} needs {several} and two views in all, so that one can be told from "
            "another. Use the recipe 'dino'."
        )


@dataclass(frozen=True, kw_only=True)
class PictureViews(Views):
    """Views that are pictures, or pictures over time.

    Args:
        evaluation_size: side of the square evaluation picture, px; None = `image_size`. It is settled when
            the recipe is built: `dataclasses.replace` needs it again along with another view size.
        evaluation_crop: share of the resized picture's short side that the evaluation picture keeps:
            the short side becomes evaluation_size / evaluation_crop before the centre is cut out.
    """

    evaluation_size: int | None = None
    evaluation_crop: float = 0.875

    def __post_init__(self):
        if self.evaluation_size is None:
            object.__setattr__(self, "evaluation_size", self.image_size)
        check_size("evaluation_size", self.evaluation_size)
        if not is_number(self.evaluation_crop) or not 0 < self.evaluation_crop <= 1:
            raise UserError(f"evaluation_crop is {self.evaluation_crop!r}. Give a number above 0 and at most 1.")
        for kind, views in self.kinds().items():
            if len({view.size for view in views}) != 1:
                raise UserError(
                    f"views of kind '{kind}' have sizes {[view.size for view in views]} px. "
                    "A kind is one tensor: give it one or more views of one size."
                )

    @property
    def evaluation_lengths(self) -> tuple[int, ...]:
        assert self.evaluation_size is not None, "settled when the recipe was built"
        return (self.evaluation_size, self.evaluation_size)

    @property
    def image_size(self) -> int:
        """Side of the largest view, px."""
        return max(view.size for views in self.kinds().values() for view in views)


def keep_as_tuples(settings: View | Views, *names: str) -> None:
    """Lists from a config become tuples, so that equal settings are equal and hashable."""
    for name in names:
        value = getattr(settings, name)
        if not isinstance(value, list | tuple):
            raise UserError(f"{name} is {value!r}. Give a list of numbers.")
        object.__setattr__(settings, name, tuple(value))


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value)


def check_size(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UserError(f"{name} is {value!r}. Give a whole number of pixels, 1 or more.")


def check_count(name: str, value: int, least: int = 1) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise UserError(f"{name} is {value!r}. Give a whole number, {least} or more.")


def check_between(name: str, value: float, low: float, high: float) -> None:
    if not is_number(value) or not low <= value <= high:
        raise UserError(f"{name} is {value!r}. Give a number from {low} to {high}.")


def check_range(name: str, value: Sequence[float], above: float, up_to: float) -> None:
    if len(value) != 2 or not all(map(is_number, value)) or not above < value[0] <= value[1] <= up_to:
        limit = f"above {above}" + (f" and at most {up_to}" if math.isfinite(up_to) else "")
        raise UserError(f"{name} is {list(value)}. Give a smallest and a largest number, in this order, {limit}.")


def check_scale(name: str, value: Sequence[float]) -> None:
    check_range(name, value, above=0, up_to=1)


def check_jitter(name: str, value: Sequence[float]) -> None:
    if len(value) != 4 or not all(map(is_number, value)) or min(value) < 0 or value[3] > 0.5:
        raise UserError(
            f"{name} is {list(value)}. Give four numbers of at least 0: brightness, contrast, saturation, "
            "and hue of at most 0.5."
        )
