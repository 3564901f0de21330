"""DINO on CIFAR-10 beside lightly's DINO example: same network, batch, prototypes, view sizes, precision and workers.

    python -m tests.benchmarks.cifar10_against_lightly speed FOLDER --json speed.json
    python -m tests.benchmarks.cifar10_against_lightly train FOLDER --minutes 20 --json train.json

FOLDER holds cifar10-train.parquet and cifar10-test.parquet. `speed` runs short stretches of both in turn and prints
images per second, the ratio of each pair and its spread. `train` gives each side the same time on 10,000 pictures and
probes the teachers beside raw pixels and the untrained network; with `--cpu-time` the time is that of the processor, in
one thread without workers, so that what else the machine does counts for neither.
"""

import argparse
import copy
import io
import json
import math
import multiprocessing
import statistics
import time
from pathlib import Path

import torch
from lightly.loss import DINOLoss
from lightly.models.modules import DINOProjectionHead
from lightly.models.utils import deactivate_requires_grad, update_momentum
from lightly.transforms.dino_transform import DINOTransform
from lightly.utils.scheduler import cosine_schedule
from PIL import Image
from rich.console import Console
from torch import nn

from datamodules.images import Images
from lightning_modules.dino import DINO
from ssd.backbones.convnet import ConvNet
from ssd.data.sources import limited, open_source
from ssd.evaluation.features import extract, pixels
from ssd.evaluation.suite import few_label_report, report_table
from ssd.memory import keep_freed_memory
from ssd.optim import Clip
from ssd.schedules import Cosine
from ssd.summary import write_json
from ssd.views.recipes import DINOViews

PICTURES, BATCH, PROTOTYPES, HIDDEN, BOTTLENECK, MOMENTUM, LR = 10_000, 64, 256, 512, 64, 0.95, 1e-3
NETWORK = {
    "layers": [1, 1, 1, 1],
    "channels": [16, 32, 64, 128],
    "stem_width": 8,
    "avg_down": True,
    "zero_init_last": False,
}
VIEWS = DINOViews(
    global_size=32,
    global_scale=(0.25, 1.0),
    local_count=2,
    local_size=16,
    local_scale=(0.1, 0.4),
    blur_prob=(0.0, 0.0, 0.0),
    solarize_prob=(0.0, 0.0, 0.0),
    evaluation_crop=1.0,
)


def backbone(seed: int) -> ConvNet:
    torch.manual_seed(seed)
    return ConvNet("resnet18", small_stem=True, arguments=NETWORK)


class Ours:
    """The project's DINO, stepped outside a trainer."""

    def __init__(self, folder: Path, workers: int, seed: int):
        self.data = Images(
            folder / "cifar10-train.parquet",
            folder / "cifar10-test.parquet",
            batch_size=BATCH,
            num_workers=workers,
            limit=PICTURES,
            seed=seed,
        )
        self.data.prepare(VIEWS)
        self.module = DINO(
            backbone(seed),
            views=VIEWS,
            num_prototypes=PROTOTYPES,
            teacher_temperature=0.04,
            momentum=Cosine(MOMENTUM, 1.0),
            target_rule="sinkhorn",
            head_hidden_dim=HIDDEN,
            head_bottleneck_dim=BOTTLENECK,
            head_batch_norm=True,
            lr=Cosine(LR, 1e-5, warmup=0.05),
            lr_rule="none",
            weight_decay=0.02,
            clip=Clip(3.0),
            freeze_last_layer=0.0,
        ).train()
        self.per_epoch = PICTURES // BATCH
        self.optimizers = self.module.build_optimizers()
        self.batches = self.endless()

    def plan(self, steps: int) -> None:
        self.module.begin(steps, self.per_epoch)

    def endless(self):
        loader = self.data.train_dataloader()
        loader.batch_sampler.steps_done = lambda: self.module.step
        while True:
            yield from loader

    def step(self) -> None:
        batch = next(self.batches)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            self.module.take_step(batch, self.optimizers)

    def teacher(self) -> nn.Module:
        return self.module.eval().evaluated_backbone


class LightlyNetwork(nn.Module):
    """The module of lightly's example: a backbone and its projection head."""

    def __init__(self, backbone: nn.Module, freeze_last_layer: int = -1):
        super().__init__()
        self.backbone = backbone
        self.head = DINOProjectionHead(
            128, HIDDEN, BOTTLENECK, PROTOTYPES, batch_norm=True, freeze_last_layer=freeze_last_layer
        )

    def forward(self, x):
        return self.head(self.backbone(x))


class Transformed(torch.utils.data.Dataset):
    def __init__(self, folder: Path):
        self.source = limited(open_source(folder / "cifar10-train.parquet"), PICTURES)
        self.transform = DINOTransform(
            global_crop_size=32,
            global_crop_scale=(0.25, 1.0),
            local_crop_size=16,
            local_crop_scale=(0.1, 0.4),
            n_local_views=2,
            gaussian_blur=(0.0, 0.0, 0.0),
            solarization_prob=0.0,
        )

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index):
        return self.transform(Image.open(io.BytesIO(self.source.open(index))))


class Lightly:
    """lightly's DINO example: one forward per view, its head, loss, transform and momentum update, AdamW."""

    half = True  # the precision that ours has; the example itself trains in float32

    def __init__(self, folder: Path, workers: int, seed: int):
        self.student = LightlyNetwork(backbone(seed).model, freeze_last_layer=0)
        self.teacher_network = LightlyNetwork(copy.deepcopy(self.student.backbone))
        self.teacher_network.head.load_state_dict(self.student.head.state_dict())
        deactivate_requires_grad(self.teacher_network)
        self.criterion = DINOLoss(output_dim=PROTOTYPES, warmup_teacher_temp_epochs=1)
        self.optimizer = torch.optim.AdamW(self.student.parameters(), lr=LR, weight_decay=0.02)
        self.loader = torch.utils.data.DataLoader(
            Transformed(folder), batch_size=BATCH, shuffle=True, drop_last=True, num_workers=workers
        )
        self.batches = self.endless()
        self.steps_done, self.steps = 0, 1000

    def plan(self, steps: int) -> None:
        self.steps = steps

    def endless(self):
        while True:
            yield from self.loader

    def step(self) -> None:
        views = next(self.batches)
        warmup = 0.05 * self.steps
        done = self.steps_done
        rate = (
            done / warmup if done < warmup else 0.5 * (1 + math.cos(math.pi * (done - warmup) / (self.steps - warmup)))
        )
        self.optimizer.param_groups[0]["lr"] = max(LR * rate, 1e-5)
        momentum = cosine_schedule(done, max(self.steps, done + 1), MOMENTUM, 1.0)
        update_momentum(self.student.backbone, self.teacher_network.backbone, m=momentum)
        update_momentum(self.student.head, self.teacher_network.head, m=momentum)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.half):
            with torch.no_grad():
                teacher_out = [self.teacher_network(view) for view in views[:2]]
            student_out = [self.student(view) for view in views]
            loss = self.criterion(teacher_out, student_out, epoch=1)
        self.optimizer.zero_grad()
        loss.backward()
        self.student.head.cancel_last_layer_gradients(current_epoch=1)
        self.optimizer.step()
        self.steps_done += 1

    def teacher(self) -> nn.Module:
        return self.teacher_network.eval().backbone


def stretch(side, steps: int, clock=time.perf_counter) -> float:
    """Images per second over so many steps."""
    start = clock()
    for _ in range(steps):
        side.step()
    return steps * BATCH / (clock() - start)


def serve(pipe, name: str, folder: Path, workers: int, threads: int, half: bool) -> None:
    """A side in a process of its own, as it would be used: what one does with memory does not help the other."""
    torch.set_num_threads(threads)
    Lightly.half = half
    if name == "ours":
        keep_freed_memory()  # as a fit does
    side = {"ours": Ours, "lightly": Lightly}[name](folder, workers, 0)
    side.plan(100_000)
    stretch(side, 10)
    pipe.send(None)
    while (steps := pipe.recv()) is not None:
        pipe.send(stretch(side, steps))


def speed(arguments) -> dict:
    context, pipes = multiprocessing.get_context("spawn"), {}
    settings = (arguments.folder, arguments.workers, torch.get_num_threads(), Lightly.half)
    for name in ("ours", "lightly"):
        pipes[name], theirs = context.Pipe()
        context.Process(target=serve, args=(theirs, name, *settings)).start()
        pipes[name].recv()

    def asked(name: str) -> float:
        pipes[name].send(arguments.steps)
        return pipes[name].recv()

    pairs = []
    for _ in range(arguments.rounds):
        pairs.append((asked("ours"), asked("lightly")))
        print(f"ours {pairs[-1][0]:.0f} images/s, lightly {pairs[-1][1]:.0f} images/s", flush=True)
    ratios = [a / b for a, b in pairs]
    row = {
        "case": f"CIFAR-10 DINO, batch {BATCH}, {arguments.workers} workers, {torch.get_num_threads()} threads, "
        f"bf16 against {'bf16' if Lightly.half else 'float32, as the example is'}",
        "ours": statistics.median(a for a, _ in pairs),
        "baseline": statistics.median(b for _, b in pairs),
        "ratio": statistics.median(ratios),
        "low": min(ratios),
        "high": max(ratios),
        "unit": "images/s",
    }
    for pipe in pipes.values():
        pipe.send(None)
    print(json.dumps(row))
    return row


def train(arguments) -> dict:
    evaluation = Images(
        arguments.folder / "cifar10-train.parquet",
        arguments.folder / "cifar10-test.parquet",
        batch_size=250,
        num_workers=0,
        limit=PICTURES,
        evaluation_limit=None,
    )
    evaluation.prepare(VIEWS)
    bank, queries = evaluation.test_dataloader()
    raw = pixels(bank), pixels(queries)
    rows, facts = {"pixels": (raw[0].features, raw[1].features)}, {}
    clock = time.process_time if arguments.cpu_time else time.perf_counter

    def embed(name: str, network: nn.Module) -> None:
        def pooled(x):
            answer = network(x)
            return answer if isinstance(answer, torch.Tensor) else answer.pooled()

        rows[name] = tuple(extract(pooled, loader).features for loader in (bank, queries))

    embed("untrained", backbone(arguments.seed).eval())
    for name, side in (("lightly", Lightly), ("ours", Ours)):
        if name not in arguments.sides:
            continue
        run = side(arguments.folder, arguments.workers, arguments.seed)
        run.plan(100_000)
        stretch(run, 5)
        rate = stretch(run, 60, clock)
        run = side(arguments.folder, arguments.workers, arguments.seed)
        steps = int(arguments.minutes * 60 * rate / BATCH)
        run.plan(steps)
        start = clock()
        for done in range(steps):
            run.step()
            if done % 500 == 0:
                print(f"{name}: step {done}/{steps}, {clock() - start:.0f} s", flush=True)
            if clock() - start > arguments.minutes * 60 * 1.05:
                print(f"{name}: out of time at step {done}", flush=True)
                break
        seconds = clock() - start
        facts[name] = {
            "seconds": seconds,
            "images": (done + 1) * BATCH,
            "images_per_second": (done + 1) * BATCH / seconds,
        }
        embed(name, run.teacher())
    report = few_label_report(rows, raw[0].labels, raw[1].labels, draws=arguments.draws)
    Console(width=120).print(report_table(report))
    print(json.dumps(facts))
    return {"rows": {row: {k: vars(n) for k, n in numbers.items()} for row, numbers in report.items()}, "runs": facts}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["speed", "train"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=40, help="of each stretch of `speed`")
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--sides", nargs="+", default=["lightly", "ours"])
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--float32", action="store_true", help="lightly in float32, as its example is")
    parser.add_argument("--cpu-time", action="store_true", help="budget of `train` in processor time")
    parser.add_argument("--json")
    arguments = parser.parse_args()
    Lightly.half = not arguments.float32
    if arguments.cpu_time:
        arguments.threads, arguments.workers = 1, 0
    torch.set_num_threads(arguments.threads)
    write_json(arguments.json, {"speed": speed, "train": train}[arguments.what](arguments))


if __name__ == "__main__":
    main()
