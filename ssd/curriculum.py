"""Which part of a teacher is the target, in a course that the student sets itself."""

from typing import Any

from torch import nn

from ssd.errors import UserError


class Curriculum(nn.Module):
    """A target block that moves on, one block at a time, when the student is near enough to it or has had its time.

    Its memory is plain numbers in the state dict: the block decides how far a teacher runs, which is settled on the host.

    Args:
        num_blocks: of the teacher; the last is where it ends.
        threshold: likeness at which the next block becomes the target, in (0, 1].
        smoothing: share of the newest likeness in the running mean that is compared; 1 compares each by itself.

    Attributes:
        block: number of the target block from 1; 0 until `begin`.
        since: steps of the run that were done when it became the target.
        likeness: the running mean since then, from 0.
    """

    def __init__(self, num_blocks: int, threshold: float, smoothing: float):
        super().__init__()
        if not 0 < threshold <= 1:
            raise UserError(f"cka_threshold: {threshold} is not in (0, 1]. Published are 0.8 and 0.85.")
        if not 0 < smoothing <= 1:
            raise UserError(f"cka_smoothing: {smoothing} is not a share above 0 and at most 1. 1 does not smooth.")
        self.num_blocks = num_blocks
        self.threshold = threshold
        self.smoothing = smoothing
        self.block = 0
        self.since = 0
        self.likeness = 0.0

    def begin(self, block: int, step: int) -> None:
        """Makes a block the target from step `step` on."""
        self.block, self.since, self.likeness = block, step, 0.0

    def update(self, likeness: float | None, steps_done: int, limit: int | None) -> None:
        """At most one block further, never past the last.

        Args:
            likeness: of student and target in the last step, None where it was not measured.
            limit: steps after which the next block's turn comes whatever the likeness.
        """
        if likeness is not None:
            self.likeness += self.smoothing * (likeness - self.likeness)
        passed = likeness is not None and self.likeness >= self.threshold
        late = limit is not None and steps_done - self.since >= limit
        if self.block < self.num_blocks and (passed or late):
            self.begin(self.block + 1, steps_done)

    def get_extra_state(self) -> dict[str, Any]:
        return {"block": self.block, "since": self.since, "likeness": self.likeness}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.block, self.since = int(state["block"]), int(state["since"])
        self.likeness = float(state["likeness"])
