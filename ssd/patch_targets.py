"""What a logged step tells of targets for masked patches, alike in all methods that have `patch_probs`."""

from torch import Tensor

from ssd.batch import Targets
from ssd.losses.prototype import entropy
from ssd.step_report import StepReport


def patch_measures(targets: Targets) -> dict[str, Tensor]:
    """Share of crops with masks, and the entropy of patches' targets summed as the loss sums them.

    Reads `probs` (V, B, K), `patch_probs` (U, K) and `patch_weight` (U,), which sums to 1 over a masked crop.
    """
    crops = targets.probs.shape[:2].numel()
    weight = targets.patch_weight
    return {
        "masked_crops": weight.sum() / crops,
        "ibot_entropy": (weight * entropy(targets.patch_probs)).sum() / crops,
    }


def patch_diagnostics(report: StepReport, dino: float) -> dict[str, float]:
    """Divergences of both losses, from the loss between views `dino` and the term "ibot"; of patches per masked crop: the
    loss counts crops without masks, so it is about half as large."""
    if report.teacher_entropy is None:
        return {}
    masked, patch_entropy = report.measures["masked_crops"], report.measures["ibot_entropy"]
    numbers = {
        "train/teacher/kl": dino - report.teacher_entropy,
        "train/masks/masked_crops": masked,
    }
    if masked > 0:
        numbers["train/teacher/patch_entropy"] = patch_entropy / masked
        numbers["train/teacher/patch_kl"] = (report.terms["ibot"] - patch_entropy) / masked
    return numbers
