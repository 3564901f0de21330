"""Our values of PCD: heads carried over to maps, places that two views share, the queue, and twenty steps of each pairing."""

from typing import Any

import torch
from torch import nn

from ssd.backbones.vit import ViT
from ssd.batch import Batch
from ssd.losses.contrastive import queue_contrast
from ssd.parity.frozen_teachers import hold_positions
from ssd.parity.inputs import BOXES, fill, numbers, pictures
from ssd.parity.masked_trajectories import vit
from ssd.parity.parts import Outputs, leaf, with_gradients
from ssd.parity.trajectories import SAMPLES, SIZE, run
from ssd.projection import Projection
from ssd.queue import Queue
from ssd.schedules import Cosine
from ssd.spatial import MapAttention, PixelHead, spatial_adaptor
from ssd.views.overlap import sampled, shared_places
from ssd.views.recipes import CropViews, DINOViews

# ---------------------------------------------------------------------- parts


def filled_head(*widths: int) -> Projection:
    """A projector with statistics that are not those it is built with."""
    head = Projection(widths)
    fill(head)
    norms = [layer for layer in head if isinstance(layer, nn.BatchNorm1d)]
    for number, norm in enumerate(norms):
        assert norm.running_mean is not None and norm.running_var is not None
        norm.running_mean.copy_(numbers(f"mean {number}", norm.num_features))
        norm.running_var.copy_(1 + numbers(f"variance {number}", norm.num_features) / 2)
    return head


def adaptor(device: torch.device) -> Outputs:
    """A projector at every place; what it answers, pooled, beside what it answers to the pooled map."""
    head, maps = filled_head(6, 9, 5).to(device), numbers("maps", 3, 6, 4, 2).to(device)
    answer = spatial_adaptor(head)(maps)
    return {"maps": answer, "pooled": answer.mean((2, 3)), "of pooled": head(maps.mean((2, 3)))}


def pixel_heads(device: torch.device) -> Outputs:
    """Attention over places and the student's head, in training, with batch normalisation and without."""
    values: Outputs = {}
    for norm, name in ((True, "normalised, "), (False, "")):
        network = nn.Sequential(MapAttention(8, 2), PixelHead(8, 6, 5, norm)).to(device)
        fill(network)
        maps = leaf("maps", 3, 8, 2, 3, device=device)
        values |= with_gradients(f"{name}answer", network(maps), maps=maps, **dict(network.named_parameters()))
    return values


def contrast(device: torch.device) -> Outputs:
    """Of 6 places and 7 negatives of which 5 count."""
    student = leaf("places", 6, 4, device=device)
    target, negatives = numbers("targets", 6, 4).to(device), numbers("negatives", 7, 4).to(device)
    valid = torch.tensor([True, True, False, True, True, False, True], device=device)
    loss = queue_contrast(student, target, negatives, 0.2, valid=valid, chunk=4)
    alike = queue_contrast(target, target, negatives, 0.2)
    return with_gradients("some", loss, student=student) | {"all": alike}


def queue(device: torch.device) -> Outputs:
    """Of 7 vectors, 3 at a time."""
    memory = Queue(7, 2).to(device)
    values: Outputs = {}
    for number in range(4):
        memory.update(numbers(f"vectors {number}", 3, 2).to(device))
        values |= {f"behind {number}": memory.vectors.clone(), f"there behind {number}": memory.valid.clone()}
    return values


def shared(device: torch.device) -> Outputs:
    boxes = torch.tensor(BOXES, device=device).transpose(0, 1)  # (2, B, 5)
    mine, theirs, enough = shared_places(boxes[0], boxes[1], (3, 2))
    maps = sampled(numbers("maps", 8, 3, 4, 5).to(device), theirs)
    return {
        "places of one": mine[enough],
        "places of the other": theirs[enough],
        "enough in common": enough,
        "values": maps[enough],
    }


# ---------------------------------------------------------------------- twenty steps


def pcd(device: torch.device) -> Outputs:
    """The same place of the same view, by the teacher's projector; a queue of 20, which goes round."""
    return of_maps(device, views=CropViews(size=32), teacher_head=filled_head(32, 20, 6))


def pcd_boxes(device: torch.device) -> Outputs:
    return of_maps(device, views=TWO, pairing="boxes", head_batch_norm=False)


def pcd_index(device: torch.device) -> Outputs:
    """Of the published pairing, without attention."""
    return of_maps(device, views=TWO, pairing="index", attention_heads=0)


TWO = DINOViews(global_size=32, local_count=0)


def of_maps(device: torch.device, **settings: Any) -> Outputs:
    from lightning_modules.pcd import PCD

    arguments = SIZE | {"embed_dim": 32, "patch_size": 4}
    module = PCD(
        vit(),
        ViT("vit_tiny_patch16_224", img_size=32, fixed_positions=True, arguments=arguments),
        queue_size=20,
        head_hidden_dim=12,
        lr=Cosine(0.5, 0.0, warmup="1 epochs"),
        lr_reference_batch=16,
        weight_decay=0.1,
        **({"attention_heads": 2} | settings),
    )
    views = len(module.views.kinds()["global"])

    def batch(step: int) -> Batch:
        boxes = torch.tensor(BOXES).roll(step, 0).transpose(0, 1)
        view = pictures("global", step, views, SAMPLES, 3, 32, 32)
        return Batch({"global": view}, torch.arange(SAMPLES), SAMPLES, boxes={"global": boxes} if views == 2 else {})

    memory = {"queue.vectors": "queue"}
    return run(module, device, after_filling=lambda: hold_positions(module), batches=batch, memory=memory)
