"""The views that a network is trained on with labels: those of its checkpoint where they show the same thing, cropped."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ssd.errors import UserError
from ssd.evaluation.finetune import Recipe
from ssd.record import build
from ssd.views.clips import ClipViews
from ssd.views.recipes import CropViews, PlainViews
from ssd.views.sound import SoundViews
from ssd.views.view import PictureViews, View, Views

CROP = 0.35


def supervised_views(
    about: Mapping[str, Any], crop: float | None = None, flip: float | None = None, jitter: float | None = None
) -> Views:
    """One view of each sample, at the network's own size.

    Args:
        about: what is known of a network, with its "views".
        crop: smallest share of a picture in a view; None = .35.
        flip: probability; None = the checkpoint's, .5 where none is known.
        jitter: of brightness, contrast and saturation; None = 0.

    Raises UserError for what sounds do not have.
    """
    own = build(about["views"])
    if isinstance(own, SoundViews):
        refuse_of_sounds(crop=crop, flip=flip, jitter=jitter)
        # spectrograms are altered by methods that know of it
        return replace(own, global_count=1, local_count=0, mix_share=0.0, resize=None)
    least = CROP if crop is None else crop
    colours = (jitter or 0.0, jitter or 0.0, jitter or 0.0, 0.0)
    if isinstance(own, ClipViews):
        return replace(
            own,
            global_count=1,
            global_scale=(least, 1.0),
            local_count=0,
            flip=own.flip if flip is None else flip,
            jitter=colours,
            jitter_prob=1.0,
            grey_prob=0.0,
            blur_prob=(0.0, 0.0),
        )
    if not isinstance(own, PictureViews):
        raise UserError(f"nothing is known of how {type(own).__name__} is cut for labels. Use ssd probe.")
    # what a network is given to look at alone says nothing of what shows the same
    same = View(own.size, flip=0.5) if isinstance(own, PlainViews) else own.kinds()["global"][0]
    return CropViews(
        size=own.evaluation_lengths[0],
        evaluation_size=own.evaluation_size,
        evaluation_crop=own.evaluation_crop,
        scale=(least, 1.0),
        flip=same.flip if flip is None else flip,
        jitter=colours,
        rotate=same.rotate,
        shear=same.shear,
    )


def check_mixing(recipe: Recipe, views: Views) -> None:
    """Raises UserError where samples cannot be mixed as the recipe says."""
    if isinstance(views, SoundViews) and recipe.mixes:
        raise UserError("--mixup and --cutmix mix pictures, and these are sounds. Leave them out.")
    if isinstance(views, ClipViews) and recipe.cutmix > 0:
        raise UserError("--cutmix cuts pictures, and these are clips. Use --mixup, which mixes clips too.")


def refuse_of_sounds(**given: float | None) -> None:
    typed = [f"--{name}" for name, value in given.items() if value is not None]
    if typed:
        raise UserError(
            f"{', '.join(typed)}: sounds have no such thing; their views are the checkpoint's. Leave it out."
        )
