"""What a run needs to go on from a checkpoint as if it had never stopped."""

from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

from ssd.distributed import rank, world_size
from ssd.errors import UserError


def refuse_another_length(before: tuple[int, int], now: tuple[int, int]) -> None:
    """Raises UserError where steps in all and steps an epoch are not those of the checkpoint."""
    if before != now:
        raise UserError(
            f"the checkpoint belongs to a run of {before[0]} steps, {before[1]} an epoch; this run has {now[0]}, {now[1]} an "
            "epoch. Schedules depend on the length: resume with the same data, batch size and length, or start a new run "
            "from its weights (backbone.weights)."
        )


def place_in_run(step: int, steps_per_epoch: int) -> dict[str, Any]:
    """Lightning's own account of a run after `step` steps, to be put into its loop state.

    Lightning takes an epoch for done when its loop ends, also where a run was stopped within it, and would then
    leave out the rest. Within an epoch this is the state at `on_train_batch_end`, where a batch is processed and
    not yet completed; at its end nothing is open.
    """
    epochs, batches = divmod(step, steps_per_epoch)
    open_ = int(batches > 0)

    def count(begun: int, processed: int, completed: int) -> dict[str, int]:
        return {"ready": begun, "started": begun, "processed": processed, "completed": completed}

    epoch, none = count(epochs + open_, epochs, epochs), count(0, 0, 0)
    return {
        "epoch_progress": {"total": epoch, "current": epoch.copy()},
        "epoch_loop.batch_progress": {
            "total": count(step, step, step - open_),
            "current": count(batches, batches, batches - open_),
            "is_last_batch": False,
        },
        "epoch_loop.val_loop.batch_progress": {"total": none, "current": none.copy(), "is_last_batch": False},
        "epoch_loop.state_dict": {"_batches_that_stepped": step - open_},
    }


def generator_states() -> dict[str, Tensor]:
    """This rank's random state, for layers that draw from the global generators."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def restore_generators(states: dict[str, Tensor]) -> None:
    torch.set_rng_state(states["cpu"].cpu())
    if torch.cuda.is_available() and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"].cpu())


def spread_generators(step: int) -> None:
    """A seed for each rank and step, derived from the global one: else all ranks would drop the same paths."""
    torch.manual_seed(torch.initial_seed() + step * world_size() + rank())


def code_version() -> str:
    try:
        return version("ssd")
    except PackageNotFoundError:
        return "unknown"
