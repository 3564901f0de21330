"""The masks of a step, as the boolean form and as indices, for one rank and its slices."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ssd.batch import Masks
from ssd.data.randomness import generator, key
from ssd.errors import UserError
from ssd.frames import Frames
from ssd.masking.counts import SPREAD, floor
from ssd.masking.recipes import MASKS, Masking
from ssd.masking.shapes import lowest

ROUND = 64  # padded lengths are multiples of it, so that few shapes occur
PREDICTED = -9  # stands where the index of a sample stands in keys of per-sample randomness


@dataclass(frozen=True)
class MaskPlan:
    """What is to be masked in each batch.

    Args:
        recipe: how.
        views: of each sample.
        grid: tokens of a view, (h, w), (t, h, w) or (t,); of a sound of any length, those of one second.
        slices: equal parts in which the batch of a rank passes the student.
        other_grids: of views whose size is not the same in every step: ((side in px, grid), ...)
        masks_per_view: of each view, all views under their first mask, then under their second.
        predicted: share of the masked tokens that are asked for, int(M predicted) of them and 1 at least; null = all.
        frames: of sounds, how many tokens a length gives.
        equal_lengths: whether all samples of a batch are as long as one another.
        of_looks: where samples have fixed looks, whether each look has a mask of its own for the whole run, and not another
            in each step: a teacher that sees what is visible then says the same of it each time.
    """

    recipe: Masking
    views: int
    grid: tuple[int, ...]
    slices: int = 1
    other_grids: tuple[tuple[int, tuple[int, ...]], ...] = ()
    masks_per_view: int = 1
    predicted: float | None = None
    frames: Frames | None = None
    equal_lengths: bool = True
    of_looks: bool = False

    @property
    def masks(self) -> int:
        """Of each sample."""
        return self.views * self.masks_per_view

    def draw(self, batch: int, *place: int, rank: int = 0, world: int = 1, side: int | None = None) -> Masks:
        """The masks of this rank's `batch` samples; `place` is (seed, step) and whatever tells plans apart.

        `side` is that of the step's views, px; of sounds that all have as many samples, their number.
        """
        grid = next((other for px, other in self.other_grids if px == side), self.grid)
        if self.frames is not None and side is not None:
            grid = (self.frames.count(side), *self.grid[1:])
        masks = masks_for(self.recipe, self.masks, batch, grid, *place, rank=rank, world=world, slices=self.slices)
        if self.predicted is not None:
            masks.predicted = predicted_places(masks, self.predicted, *place, rank=rank, world=world)
        return masks

    def draw_each(self, places: Sequence[tuple[int, ...]]) -> Masks:
        """Masks that are each a function of a place of its sample's own, whatever lies beside it in the batch.

        Raises UserError for a recipe that hides another number in each sample.
        """
        if not self.recipe.exact or self.predicted is not None:
            raise UserError(
                f"masks: {type(self.recipe).__name__} hides numbers of tokens that follow from the whole batch, and with fixed "
                "views (data.view_variants) each sample has a mask of its own. Use RandomMasks."
            )
        each = [self.recipe.draw(self.masks, 1, self.grid, *place) for place in places]
        return of_equal_counts(np.concatenate(each, axis=1))

    def draw_padded(self, lengths: np.ndarray, padded: int, *place: int, rank: int = 0, world: int = 1) -> Masks:
        """The masks of sounds of `lengths` (V, B) samples that were padded to `padded`.

        Each sound's are a function of its place in the step and its own length, whatever lies beside it. Raises UserError
        for a sound that is shorter than a token, or a batch that `slices` does not divide.
        """
        assert self.frames is not None, "sounds have frames"
        views, batch = lengths.shape
        check_slices(self.slices, batch)
        if len(self.grid) != 1:
            raise UserError(
                f"masks: sounds of their own lengths are masked over time, and the tokens lie on a grid of {self.grid}. Give "
                "the views crop_to_shortest, or a backbone that answers one token for each moment."
            )
        counts = self.frames.counts(lengths)
        if counts.min() < 1:
            raise UserError(
                f"a sound of {lengths.min()} samples is shorter than a token, which sees {self.frames.receptive_field}. Leave "
                "such files out (data.shortest_s)."
            )
        rows = [(*place, MASKS, view, rank * batch + row) for view in range(views) for row in range(batch)]
        keys = np.array([key(*row) for row in rows], dtype=np.uint64)
        boolean = self.recipe.draw_each(counts.flatten(), self.frames.count(padded), keys).reshape(views, batch, -1)
        per_slice = boolean.sum((0, 2)).reshape(self.slices, -1).sum(1).max()
        return packed(boolean, self.slices, max(-(-int(per_slice) // ROUND) * ROUND, 1))


def masks_for(
    recipe: Masking,
    views: int,
    batch: int,
    grid: tuple[int, ...],
    *place: int,
    rank: int = 0,
    world: int = 1,
    slices: int = 1,
) -> Masks:
    """The masks of one rank's `batch` samples, cut from those of the whole step of `batch` x `world`.

    Raises UserError where `slices` does not divide `batch`.
    """
    check_slices(slices, batch)
    everywhere = recipe.draw(views, batch * world, grid, *place)
    boolean = everywhere[:, rank * batch : (rank + 1) * batch]
    if recipe.exact:
        return of_equal_counts(boolean)
    tokens = boolean.shape[2]
    most = recipe.most(views, batch * world, tokens)
    per_slice = batch // slices
    if most is None:
        length = everywhere.sum(2).sum(0).reshape(-1, per_slice).sum(1).max()
        length = -(-int(length) // ROUND) * ROUND
    else:
        length = padded_length(most, per_slice)
    return packed(boolean, slices, max(length, 1))


def check_slices(slices: int, batch: int) -> None:
    if batch % slices:
        raise UserError(f"micro_batches: {slices} does not divide the batch of {batch}. Use a divisor.")


def predicted_places(masks: Masks, share: float, *place: int, rank: int = 0, world: int = 1) -> torch.Tensor:
    """Of equal numbers M of masked tokens max(int(M share), 1), drawn for the whole step as the masks are: (V, B, P) sorted.

    Raises UserError for masks that hide another number in each sample.
    """
    if masks.masked is None:
        raise UserError(
            "masks: this recipe hides another number of tokens in each sample, of which no fixed number can be predicted. Use "
            "one with a fixed count, such as InverseBlockMasks with a single ratio."
        )
    views, batch, masked = masks.masked.shape
    noise = generator(*place, PREDICTED).random((views, batch * world, masked))[:, rank * batch : (rank + 1) * batch]
    chosen = lowest(noise.reshape(-1, masked), max(floor(masked * share), 1)).reshape(noise.shape)
    return masks.masked.gather(2, ordered(chosen))


def padded_length(most: np.ndarray, per_slice: int) -> int:
    """Of flat indices: no slice of `per_slice` samples has more masked tokens, however they lie in their groups."""
    if per_slice % SPREAD == 0:
        return math.ceil(most.reshape(-1, per_slice).sum(1).max() - 1e-6)
    # a slice that cuts a group may get the whole of it
    first = np.arange(0, len(most), per_slice)
    groups = np.add.reduceat(most, np.arange(0, len(most), SPREAD))
    return max(math.ceil(groups[at // SPREAD : -(-(at + per_slice) // SPREAD)].sum() - 1e-6) for at in first.tolist())


def packed(boolean: np.ndarray, slices: int, length: int) -> Masks:
    """Flat places of masked tokens, each slice padded to `length`, with 1 / (masked tokens of the crop) as weight.

    What pads is the same places again, at weight 0: batch normalisation of a head then sees masked tokens alone.
    """
    views, batch, tokens = boolean.shape
    flat = np.zeros((slices, length), dtype=np.int64)
    weight = np.zeros((slices, length), dtype=np.float32)
    per_slice = batch // slices
    for number in range(slices):
        part = boolean[:, number * per_slice : (number + 1) * per_slice].reshape(views * per_slice, tokens)
        places = np.flatnonzero(part)
        if len(places):
            flat[number] = np.resize(places, length)
        counts = part.sum(1)
        weight[number, : len(places)] = np.repeat(1 / np.maximum(counts, 1), counts)
    return Masks(
        torch.from_numpy(np.ascontiguousarray(boolean)), flat=torch.from_numpy(flat), weight=torch.from_numpy(weight)
    )


def of_equal_counts(boolean: np.ndarray) -> Masks:
    whole = torch.from_numpy(np.ascontiguousarray(boolean))
    return Masks(whole, masked=ordered(boolean), visible=ordered(~boolean))


def ordered(chosen: np.ndarray) -> torch.Tensor:
    """(V, B, N) with equal counts -> (V, B, M) sorted indices of the True ones."""
    return torch.from_numpy(chosen.nonzero()[2].reshape(*chosen.shape[:2], -1))
