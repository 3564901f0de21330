"""The next stage of a recipe: networks and centres of a checkpoint under new settings."""

from ssd.distributed import whole
from ssd.errors import UserError
from ssd.step import Step
from ssd.weights.checkpoint import read_checkpoint, strict_load


def start_stage(module: Step, file: str) -> None:
    """Load the networks and centres of a checkpoint of the same method, and none of its counts.

    Only what the method says comes with later stages may be missing or left over. Raises UserError for a checkpoint of
    another method, and for keys or shapes that do not fit, which it lists.
    """
    checkpoint = read_checkpoint(file)
    method = checkpoint["ssd"]["method"]["class_path"].rpartition(".")[2]
    if method != type(module).__name__:
        raise UserError(
            f"start_from: {file} was made by {method}, and this run is {type(module).__name__}. Give a checkpoint of the "
            "same method, or start from its backbone alone (backbone.weights)."
        )
    later = (*module.added_later, "_extra_state")
    own = {key: whole(value) for key, value in module.state_dict().items() if key.startswith(later)}
    state = {key: value for key, value in checkpoint["state_dict"].items() if not key.startswith(later)}
    strict_load(module, state | own, f"start_from '{file}'")
