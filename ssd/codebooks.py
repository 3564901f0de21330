"""Online codebooks: codes that are running averages of what was assigned to them, never trained by gradient."""

import torch
from torch import Tensor, nn

from ssd.distributed import from_first_rank, sum_over_ranks
from ssd.errors import UserError


class Codebooks(nn.Module):
    """Several codebooks side by side (Liu et al., "DinoSR", NeurIPS 2023, section 3.2). Everything in float32.

    Each code keeps a sum s and a count n, and its centroid is s / n. After a step in which it was hit, s <- m s + (1 - m)
    (sum of its hits) and n <- m n + (1 - m) (number of hits); a code without hits stays as it was.

    Args:
        number: K codebooks.
        codes: V in each.
        dim: D.
        momentum: m.
        revive_after: updates without a hit after which a code begins anew at a random target of the step; null = never.
    """

    sums: Tensor
    counts: Tensor
    idle: Tensor

    def __init__(self, number: int, codes: int, dim: int, momentum: float = 0.9, revive_after: int | None = None):
        super().__init__()
        if min(number, codes, dim) < 1:
            raise UserError(f"{number} codebooks of {codes} codes of {dim} numbers cannot be. Use 1 or more of each.")
        if not 0 <= momentum < 1:
            raise UserError(f"codebook_momentum: {momentum} is not a share of at least 0 and below 1.")
        if revive_after is not None and revive_after < 1:
            raise UserError(f"revive_after: {revive_after} is not a positive count. Use null to revive no code.")
        self.momentum = momentum
        self.revive_after = revive_after
        drawn = torch.randn(number, codes, dim)
        if codes > 1:
            variance, mean = torch.var_mean(drawn, dim=1, correction=0, keepdim=True)
            drawn = (drawn - mean) / (variance + 1e-5).sqrt()
        self.register_buffer("sums", drawn)
        self.register_buffer("counts", torch.ones(number, codes))
        self.register_buffer("idle", torch.zeros(number, codes, dtype=torch.int64))

    def _apply(self, fn, recurse: bool = True):
        """Moves to another device, never to another precision: sums of thousands of frames would stop to grow."""
        kept = {name: buffer for name, buffer in self.named_buffers(recurse=False) if buffer.is_floating_point()}
        super()._apply(fn, recurse)
        for name, buffer in kept.items():
            self._buffers[name] = buffer.to(self._buffers[name].device)  # type: ignore[union-attr]
        return self

    def same_on_all_ranks(self) -> None:
        """Every process takes the codes of the first, whatever each of them drew."""
        for buffer in (self.sums, self.counts, self.idle):
            buffer.copy_(from_first_rank(buffer))

    @property
    def centroids(self) -> Tensor:
        """(K, V, D)"""
        return self.sums / self.counts[..., None]

    def forward(self, features: Tensor) -> Tensor:
        """The nearest code of each codebook by Euclidean distance, the first of several. (K, R, D) -> (K, R) int64"""
        with torch.autocast(features.device.type, enabled=False):
            centroids = self.centroids
            # |t|^2 is the same for all codes
            distances = centroids.square().sum(-1)[:, None] - 2 * features.float() @ centroids.mT  # (K, R, V)
            return distances.argmin(-1)

    def hits(self, features: Tensor, codes: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
        """What was assigned to each code by all ranks together: its sum (K, V, D) and number (K, V).

        Args:
            features: (K, R, D)
            codes: (K, R)
            real: (R,) False where a row is padding, which counts for nothing.
        """
        with torch.autocast(features.device.type, enabled=False):
            numbers = torch.arange(self.counts.shape[1], device=codes.device)
            which = ((codes[..., None] == numbers) & real[:, None]).float()  # (K, R, V)
            kept = torch.where(real[:, None], features.float(), 0)
            both = torch.cat([which.mT @ kept, which.sum(1)[..., None]], dim=-1)
        both = sum_over_ranks(both)
        return both[..., :-1], both[..., -1]

    def candidates(self, features: Tensor, real: Tensor) -> Tensor | None:
        """A random target for each code, (K, V, D), the same on all ranks; None where no code is revived."""
        if self.revive_after is None:
            return None
        number, codes = self.counts.shape
        weight = real.float()
        drawn = torch.multinomial(torch.where(weight.sum() > 0, weight, 1), number * codes, replacement=True)
        rows = drawn.view(number, codes)[..., None].expand(-1, -1, features.shape[-1])
        return from_first_rank(features.float().gather(1, rows))

    @torch.no_grad()
    def update(self, sums: Tensor, counts: Tensor, candidates: Tensor | None = None) -> None:
        """Takes in what `hits` found. Codes that were idle for too long begin anew at their `candidates`."""
        hit = counts > 0
        self.sums.copy_(torch.where(hit[..., None], torch.lerp(sums, self.sums, self.momentum), self.sums))
        self.counts.copy_(torch.where(hit, torch.lerp(counts, self.counts, self.momentum), self.counts))
        self.idle.copy_(torch.where(hit, 0, self.idle + 1))
        if candidates is not None and self.revive_after is not None:
            revived = self.idle >= self.revive_after
            self.sums.copy_(torch.where(revived[..., None], candidates, self.sums))
            self.counts.masked_fill_(revived, 1.0)
            self.idle.masked_fill_(revived, 0)


def perplexity(mass: Tensor) -> Tensor:
    """exp of the entropy of shares: how many codes are in use, 1 to V. Mass of any sum (..., V) -> (...)"""
    shares = mass / mass.sum(-1, keepdim=True).clamp_min(torch.finfo(mass.dtype).tiny)
    return torch.special.entr(shares).sum(-1).exp()
