"""Forms in which a teacher's answers are stored: whole and in half precision, or a sample of them with which the loss comes out
the same on average.

Keeping the largest probabilities alone is biased; classes that are drawn by their probability are not (Anshumann et al.,
"Sparse Logit Sampling", ACL 2025, arXiv 2503.16870). Nor are tokens that are drawn evenly, for a loss that is a mean over them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ssd.data.randomness import uniforms_of_many
from ssd.errors import UserError

PLACES, CLASSES, ENTROPY = "places", "classes", "entropy"
"""Names of what stands beside or in place of answers of which a sample is stored."""
TOKENS_DRAWN, CLASSES_DRAWN = -13, -14  # stand behind the place of use in keys of what is drawn
DTYPES = ("float16", "float32")


@dataclass(frozen=True)
class Sampled:
    """Which of a method's answers may be stored in part, because its losses take them so.

    Args:
        tokens: name -> the axis of its tokens, all of as many.
        logits: names of logits (V, B, K).
    """

    tokens: Mapping[str, int] = field(default_factory=dict)
    logits: Sequence[str] = ()


@dataclass(frozen=True)
class Form:
    """How answers are stored.

    Args:
        dtype: "float16", which rounds a number by 1/2048 of it at most (bfloat16, by 1/256, has a range that features of unit
            size or variance do not need), or "float32".
        tokens: number of tokens of each view that are kept, drawn evenly; None = all.
        classes: number of draws from each distribution that are kept, in place of its K logits; None = the logits.
    """

    dtype: str = "float16"
    tokens: int | None = None
    classes: int | None = None

    def record(self) -> dict[str, Any]:
        return asdict(self)

    def stored(
        self, answers: Mapping[str, Tensor], sampled: Sampled, looks: Sequence[tuple[int, ...]]
    ) -> dict[str, Any]:
        """Answers (V, B, ...) as arrays (B, V, ...) of the types that are stored.

        Args:
            looks: (seed, variant, index) of each of the B samples, by which is drawn.

        Raises UserError for a form that the answers cannot take, and for numbers beyond what the type holds.
        """
        found = {name: value.float() for name, value in answers.items()}
        if self.tokens is not None:
            found |= self._some_tokens(found, sampled, looks)
        if self.classes is not None:
            found |= self._some_classes(found, sampled, looks)
            found = {name: value for name, value in found.items() if name not in sampled.logits}
        arrays = {name: value.transpose(0, 1).contiguous().cpu().numpy() for name, value in found.items()}
        return {name: self._cast(name, value) for name, value in arrays.items()}

    def _some_tokens(self, answers: Mapping[str, Tensor], sampled: Sampled, looks: Sequence[Any]) -> dict[str, Tensor]:
        if not sampled.tokens:
            raise UserError(
                f"--tokens {self.tokens}: this method's loss needs all of its teacher's tokens. Leave --tokens out."
            )
        counts = {answers[name].shape[axis] for name, axis in sampled.tokens.items()}
        views, count = len(next(iter(answers.values()))), min(counts)
        assert len(counts) == 1 and self.tokens is not None, "a method's answers have as many tokens"
        if not 1 <= self.tokens < count:
            raise UserError(
                f"--tokens {self.tokens} of {count} tokens cannot be kept. Use 1 to {count - 1}, or leave it out."
            )
        noise = uniforms_of_many((views, count), [(*look, TOKENS_DRAWN) for look in looks])  # (B, V, N)
        drawn = np.sort(np.argpartition(noise, self.tokens, axis=-1)[..., : self.tokens], axis=-1)
        device = next(iter(answers.values())).device
        places = torch.from_numpy(drawn).transpose(0, 1).to(device)  # (V, B, n)
        return {PLACES: places} | {name: picked(answers[name], places, axis) for name, axis in sampled.tokens.items()}

    def _some_classes(self, answers: Mapping[str, Tensor], sampled: Sampled, looks: Sequence[Any]) -> dict[str, Tensor]:
        if not sampled.logits:
            raise UserError(
                f"--classes {self.classes}: this method's teacher gives no distribution over classes to draw from. Leave "
                "--classes out."
            )
        (name,) = sampled.logits
        logits = answers[name]
        start = uniforms_of_many((len(logits),), [(*look, CLASSES_DRAWN) for look in looks])  # (B, V)
        assert self.classes is not None
        drawn = drawn_classes(logits, self.classes, torch.from_numpy(start).T.to(logits.device))
        log_probs = torch.log_softmax(logits, dim=-1)
        return {CLASSES: drawn, ENTROPY: -(log_probs.exp() * log_probs).sum(-1)}

    def _cast(self, name: str, values: np.ndarray) -> np.ndarray:
        if values.dtype.kind == "i":
            return values.astype(np.int32)
        if name == ENTROPY:  # one number, from which cross-entropies are taken
            return values
        largest, most = float(np.abs(values).max(initial=0)), float(np.finfo(self.dtype).max)
        if not np.isfinite(values).all():
            raise UserError(
                f"the teacher's {name} are not all finite. Try trainer.precision: 32-true, or other weights."
            )
        if largest > most:
            raise UserError(
                f"--dtype {self.dtype} ends at {most:g}, and the teacher's {name} reach {largest:.3g}. Use float32."
            )
        return values.astype(self.dtype)


def drawn_classes(logits: Tensor, draws: int, start: Tensor) -> Tensor:
    """`draws` classes of each distribution softmax(logits), by systematic sampling: (..., K), (...) in [0, 1) -> (..., draws)

    Class j is drawn either floor or ceil of `draws` p_j times and `draws` p_j times on average over `start`, so that a mean
    over the draws is an unbiased estimate of the mean under the distribution, and what is likely is hardly left to chance.
    """
    bounds = torch.softmax(logits.double(), dim=-1).cumsum(-1)
    at = (torch.arange(draws, device=logits.device) + start[..., None]) / draws  # (..., draws)
    return torch.searchsorted(bounds / bounds[..., -1:], at, right=True).clamp_max(logits.shape[-1] - 1)


def picked(tokens: Tensor, places: Tensor | None, axis: int = 2) -> Tensor:
    """Of tokens (V, B, ..., N, ...) along `axis` those at `places` (V, B, n); None = all."""
    if places is None:
        return tokens
    shape = [*places.shape[:2], *[1] * (tokens.ndim - 2)]
    shape[axis] = places.shape[2]
    index = places.view(shape).expand(*[size if at != axis else -1 for at, size in enumerate(tokens.shape)])
    return tokens.gather(axis, index)
