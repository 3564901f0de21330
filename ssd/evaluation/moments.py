"""When a run is evaluated."""

from collections.abc import Sequence

from ssd.errors import UserError


def check_times(times: int | Sequence[float] | None) -> int | list[float] | None:
    """Raises UserError for a count that is none and for shares outside of a run."""
    if times is None or (isinstance(times, int) and times > 0):
        return times
    if isinstance(times, Sequence) and times and all(0 < share <= 1 for share in times):
        return list(times)
    raise UserError(
        f"evaluation.times: {times} is neither a count of evaluations nor shares of the run. Use 10 for ten of them, "
        "[0.01, 0.1, 1] for those shares, or null to evaluate as the trainer says."
    )


def steps_of(times: int | Sequence[float], total_steps: int) -> set[int]:
    """After how many steps of a run an evaluation is due; a share that is less than a step is one step."""
    shares = [(number + 1) / times for number in range(times)] if isinstance(times, int) else times
    return {max(1, round(share * total_steps)) for share in shares}
