"""The structures that everything passes: what data gives (`Batch`, `Masks`), what a backbone answers
(`Tokens`), what a head answers (`Scores`), what the teacher side hands to the student side (`Targets`).
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


def map_tensors(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """`function` on every tensor inside dicts, lists and our own structures."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        return {key: map_tensors(item, function) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map_tensors(item, function) for item in value)
    if isinstance(value, Masks | Batch):
        changed = {f.name: map_tensors(getattr(value, f.name), function) for f in dataclasses.fields(value)}
        return dataclasses.replace(value, **changed)
    return value


@dataclass
class Masks:
    """Which tokens of each masked view the student does not see.

    V counts masks of a sample: its views, or, where a method asks for several masks of each, all views under their first
    mask, then under their second. `boolean` (V, B, N) is True where masked. With equal counts everywhere, `masked` (V, B, M) and
    `visible` (V, B, N - M) hold sorted token indices. With varying counts, `flat` (G, U) holds, for
    each of G equal slices of the batch, the masked places of that slice as indices into its own
    (V, B / G, N) tokens, padded to U with index 0 and `weight` (G, U) 0, so that every slice has
    the same shape. `predicted` (V, B, P) holds those of `masked` that are asked for, where it is not all.
    """

    boolean: Tensor
    masked: Tensor | None = None
    visible: Tensor | None = None
    flat: Tensor | None = None
    weight: Tensor | None = None
    predicted: Tensor | None = None

    def part(self, number: int, of: int) -> "Masks":
        """Slice `number` of `of` equal slices along B; where `flat` is used, they are its G slices."""
        if self.flat is not None and self.flat.shape[0] != of and of != 1:
            raise ValueError(f"masks were drawn for {self.flat.shape[0]} slices and cannot be cut into {of}.")

        def cut(tensor: Tensor | None, dim: int) -> Tensor | None:
            return None if tensor is None else rows(tensor, number, of, dim)

        return Masks(
            rows(self.boolean, number, of, dim=1),
            cut(self.masked, 1),
            cut(self.visible, 1),
            cut(self.flat, 0),
            cut(self.weight, 0),
            cut(self.predicted, 1),
        )

    def lifted(self) -> "Masks":
        """The same shapes and places, with no token masked: for steps before a method begins to mask."""
        weight = None if self.weight is None else torch.zeros_like(self.weight)
        return dataclasses.replace(self, boolean=torch.zeros_like(self.boolean), weight=weight)

    def token_weight(self) -> Tensor:
        """`weight` of all slices in the order of `flat_in_whole`. (G * U,)"""
        assert self.weight is not None, "masks with varying counts have weights"
        return self.weight.flatten()

    def places(self) -> tuple[Tensor, Tensor]:
        """(R,) masked places as indices into the V * B * N tokens, and (R,) True where one is not padding; slice after slice
        where counts vary."""
        if self.masked is None:
            return self.flat_in_whole(), self.token_weight() > 0
        views, batch, tokens = self.boolean.shape
        first = torch.arange(views * batch, device=self.masked.device).unflatten(0, (views, batch)) * tokens
        flat = (self.masked + first[..., None]).flatten()
        return flat, torch.ones_like(flat, dtype=torch.bool)

    def flat_in_whole(self) -> Tensor:
        """`flat` as indices into the (V, B, N) tokens of all slices together. (G * U,)"""
        assert self.flat is not None, "masks with varying counts have flat indices"
        groups = self.flat.shape[0]
        _, batch, tokens = self.boolean.shape
        slice_batch = batch // groups
        view, rest = self.flat // (slice_batch * tokens), self.flat % (slice_batch * tokens)
        first = torch.arange(groups, device=self.flat.device)[:, None] * slice_batch * tokens
        return (view * batch * tokens + first + rest).flatten()


@dataclass
class Batch:
    """What one rank sees in one step. Views come first, then the batch.

    Args:
        views: name -> (V, B, C, H, W) pictures, (V, B, C, T, H, W) clips or (V, B, S) sound. uint8
            while `photometry` waits to be applied, float and normalised afterwards.
        index: (B,) place of each sample in its source.
        total: samples in the whole step, over all slices and ranks; what losses divide by.
        label: (B,) class or -1, None where the source has none.
        masks: name of the view -> its masks over the token grid.
        boxes: name -> (V, B, 5): left, top, width, height in source pixels, and 1 where flipped;
            of clips (V, B, 7): also the times of the first and the last frame, s.
        photometry: name -> (V, B, P) drawn colour settings that are not applied yet.
        valid: name -> (V, B, S) True where sound is not padding.
        spectra: name -> (V, B, 5) what is to be done to the spectrograms of sounds, as `ssd.views.spectra.draw_spectra` draws it.
        normalisation: (2, C) mean and standard deviation, of values in [0, 1], that are taken out of each channel of all
            views; None where the data does not say.
        variant: (B,) number of each sample's look, where samples have fixed looks; else None.
        taught: name -> (V, B, ...) what a frozen teacher says of these views, where that was stored.
    """

    views: dict[str, Tensor]
    index: Tensor
    total: int
    label: Tensor | None = None
    masks: dict[str, Masks] = field(default_factory=dict)
    boxes: dict[str, Tensor] = field(default_factory=dict)
    photometry: dict[str, Tensor] = field(default_factory=dict)
    valid: dict[str, Tensor] = field(default_factory=dict)
    spectra: dict[str, Tensor] = field(default_factory=dict)
    normalisation: Tensor | None = None
    variant: Tensor | None = None
    taught: dict[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        """Samples on this rank in this slice, B."""
        return len(self.index)

    def seen(self, kind: str, number: int = 0) -> Any:
        """One view of each sample as a backbone takes it: a tensor (B, ...), or sounds with what is padding."""
        view = self.views[kind][number]
        return Padded(view, self.valid[kind][number]) if kind in self.valid else view

    def part(self, number: int, of: int) -> "Batch":
        """Slice `number` of `of` equal slices along B; `total` stays that of the whole step."""
        if of == 1:
            return self

        def view_major(table: dict[str, Tensor]) -> dict[str, Tensor]:
            return {name: rows(tensor, number, of, dim=1) for name, tensor in table.items()}

        return Batch(
            views=view_major(self.views),
            index=rows(self.index, number, of, dim=0),
            total=self.total,
            label=None if self.label is None else rows(self.label, number, of, dim=0),
            masks={name: masks.part(number, of) for name, masks in self.masks.items()},
            boxes=view_major(self.boxes),
            photometry=view_major(self.photometry),
            valid=view_major(self.valid),
            spectra=view_major(self.spectra),
            normalisation=self.normalisation,
            variant=None if self.variant is None else rows(self.variant, number, of, dim=0),
            taught=view_major(self.taught),
        )

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        return map_tensors(self, lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "Batch":
        return map_tensors(self, lambda tensor: tensor.pin_memory())


def rows(tensor: Tensor, number: int, of: int, dim: int) -> Tensor:
    size, left = divmod(tensor.shape[dim], of)
    if left:
        raise ValueError(f"{tensor.shape[dim]} rows do not divide into {of} equal slices.")
    return tensor.narrow(dim, number * size, size)


@dataclass
class Padded:
    """Sounds of several lengths as one tensor, what a backbone for sounds takes where some are shorter than others.

    Args:
        samples: (B, S)
        valid: (B, S) True where there is sound; what follows is 0.
    """

    samples: Tensor
    valid: Tensor

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, where: Any) -> "Padded":
        return Padded(self.samples[where], self.valid[where])

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Padded":
        return Padded(*(part.to(device, non_blocking=non_blocking) for part in (self.samples, self.valid)))


def network_input(batch: Mapping[str, Tensor]) -> Any:
    """What of an evaluation batch a backbone takes: its samples (B, ...), sounds with what is padding."""
    return Padded(batch["sample"], batch["valid"]) if "valid" in batch else batch["sample"]


@dataclass
class Tokens:
    """What a backbone answers. B counts all pictures that went in together.

    Args:
        cls: (B, D) class token, None for backbones without one.
        registers: (B, R, D) or None.
        patches: (B, N, D), row-major over `grid`; only the visible ones where only they were encoded.
        grid: (h, w), (t, h, w) or (t,) of the whole input.
        summary: (B, D) the backbone's own pooled output where it has one (a convnet's average pool).
        valid: (B, N) False where a patch is padding, or None.
        taps: intermediate outputs that were asked for, by name.
        kept: number of a block, 0 for what enters the first -> (B, n) sorted places of the patches that went on behind it,
            where others were dropped.
    """

    patches: Tensor
    grid: tuple[int, ...]
    cls: Tensor | None = None
    registers: Tensor | None = None
    summary: Tensor | None = None
    valid: Tensor | None = None
    taps: dict[str, Tensor] = field(default_factory=dict)
    kept: dict[int, Tensor] = field(default_factory=dict)

    def places_in(self, block: int) -> Tensor | None:
        """(B, n) places of the patches that passed the block of this number, from 1; None where all did."""
        before = [number for number in self.kept if number < block]
        return self.kept[max(before)] if before else None

    def pooled(self) -> Tensor:
        """The one vector that a head or probe uses: class token, else own pooling, else mean patch. (B, D)"""
        if self.cls is not None:
            return self.cls
        if self.summary is not None:
            return self.summary
        if self.valid is None:
            return self.patches.mean(1)
        share = self.valid.to(self.patches.dtype)
        return (self.patches * share[..., None]).sum(1) / share.sum(1, keepdim=True).clamp_min(1)


@dataclass
class Scores:
    """What a prototype head answers: features and the prototypes to compare them with, not yet compared.

    `features` (..., d) have unit length, `prototypes` (K, d) carry their gain; logits are their
    products, (..., K), which for large K are the largest tensor of a step. Losses take Scores and
    work through them in chunks.
    """

    features: Tensor
    prototypes: Tensor

    def logits(self) -> Tensor:
        """(..., K)"""
        return self.features @ self.prototypes.T.to(self.features.dtype)

    def __getitem__(self, where: Any) -> "Scores":
        return Scores(self.features[where], self.prototypes)

    def flatten(self, first: int, last: int) -> "Scores":
        return Scores(self.features.flatten(first, last), self.prototypes)

    def unflatten(self, dim: int, sizes: tuple[int, ...]) -> "Scores":
        return Scores(self.features.unflatten(dim, sizes), self.prototypes)


@dataclass
class Rows:
    """A target tensor with one row per sample or per masked token along dim 0."""

    tensor: Tensor


@dataclass
class Whole:
    """A target tensor that every slice of the batch gets as it is."""

    tensor: Tensor


class Targets:
    """Named tensors from the teacher side. Plain ones are view-major, (V, B, ...), and are cut along B;
    wrap others as `Rows` (cut along dim 0) or `Whole` (never cut). Read them as attributes, bare.
    """

    def __init__(self, **tensors: Tensor | Rows | Whole):
        self._tensors = tensors

    def __getattr__(self, name: str) -> Tensor:
        try:
            value = self.__dict__["_tensors"][name]
        except KeyError:
            raise AttributeError(f"these targets have no '{name}'") from None
        return value.tensor if isinstance(value, Rows | Whole) else value

    def part(self, number: int, of: int) -> "Targets":
        if of == 1:
            return self
        cut: dict[str, Tensor | Rows | Whole] = {}
        for name, value in self._tensors.items():
            if isinstance(value, Rows):
                cut[name] = Rows(rows(value.tensor, number, of, dim=0))
            elif isinstance(value, Whole):
                cut[name] = value
            else:
                cut[name] = rows(value, number, of, dim=1)
        return Targets(**cut)
