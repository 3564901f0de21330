"""`ssd cache --config ... --data ... --out DIR`: what a frozen teacher says of fixed views, stored for runs that read it."""

import argparse
import re
import tempfile
from collections.abc import Iterator
from typing import Any

from rich.progress import Progress

from ssd.cached_targets.forms import DTYPES, Form
from ssd.cli import command_class, run_lightning
from ssd.summary import check_json, console, print_facts, shown, write_json
from ssd.verbs.arguments import Parser, at_least_one


def run(argv: list[str]) -> int:
    arguments, words = options().parse_known_args(argv)
    check_json(arguments.json)
    caching: Any = command_class()

    class Caching(caching):
        """Instead of a fit."""

        def __init__(self, verb: str, argv: list[str]):
            super().__init__("fit", argv)

        def before_instantiate_classes(self) -> None:
            trainer = self.settings.trainer
            trainer.default_root_dir = folder
            super().before_instantiate_classes()
            for name, value in {"devices": 1, "num_nodes": 1, "strategy": "auto", "logger": False}.items():
                trainer[name] = value
            trainer.callbacks = trainer.plugins = None
            self.settings.model.init_args.cached_targets = None

        def fit(self, **settings: Any) -> None:
            self.load()
            fill(self.model, self.datamodule, self.trainer, arguments)

        def after_fit(self) -> None:
            """Nothing was learned."""

    with tempfile.TemporaryDirectory(prefix="ssd-cache-") as folder:
        run_lightning("cache", words, lambda: Caching)
    return 0


def options() -> argparse.ArgumentParser:
    parser = Parser(
        prog="ssd cache",
        usage="ssd cache [settings of ssd fit] --data.view_variants M --out DIR [--dtype float16|float32] [--tokens N] "
        "[--classes N] [--part I/N] [--check] [--json FILE]",
        description="Stores what a method's frozen teacher says of M fixed looks at every training sample, for runs with "
        "model.cached_targets: DIR, which read it instead of running the teacher. It takes what ssd fit takes, or the "
        "--ckpt_path of a run whose last stage is to go on. It writes shard by shard: the same command goes on after a stop, "
        "with what is missing. A run with another teacher, other views or other data refuses the folder.",
        epilog="For instance: ssd cache --config method/dmae_small --data FOLDER --model.teacher.weights FILE "
        "--data.view_variants 4 --out DIR, then ssd fit with the same settings and --model.cached_targets DIR.",
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write into, or to go on in")
    parser.add_argument("--dtype", default="float16", choices=DTYPES, help="of what is stored; default: float16")
    parser.add_argument(
        "--tokens", type=at_least_one, metavar="N", help="store so many tokens of each view, drawn evenly; default: all"
    )
    parser.add_argument(
        "--classes",
        type=at_least_one,
        metavar="N",
        help="store so many draws from each distribution over classes; default: all logits",
    )
    parser.add_argument(
        "--part",
        type=part_of,
        default=(0, 1),
        metavar="I/N",
        help="make every N-th shard from the I-th on, beside others",
    )
    parser.add_argument("--shard", type=at_least_one, metavar="N", help="samples of a shard; default: those of 256 MiB")
    parser.add_argument("--check", action="store_true", help="read what is there and compare hashes, not lengths alone")
    parser.add_argument("--json", metavar="FILE", help="also write what was made as JSON")
    return parser


def part_of(text: str) -> tuple[int, int]:
    """1/4 -> (0, 4)"""
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise argparse.ArgumentTypeError(f"{text} is no part, such as 1/4 to 4/4")
    return int(found[1]) - 1, int(found[2])


def fill(module: Any, data: Any, trainer: Any, arguments: argparse.Namespace) -> None:
    """Stores the answers that are missing in a folder, a shard after the other."""
    import timm
    import torch

    from ssd.cached_targets.folder import Layout, ShardWriter, TargetFolder
    from ssd.cached_targets.identity import check_storable, identity_of
    from ssd.cached_targets.use import answers_of
    from ssd.resume import code_version
    from ssd.weights.stages import start_stage

    data.trainer = trainer
    data.prepare(module.views, module.mask_plans())
    if module.step == 0:
        if module.start_from is not None:
            start_stage(module, module.start_from)
        module.begin_fresh()
    check_storable(module, data)
    form = Form(arguments.dtype, arguments.tokens, arguments.classes)
    device = trainer.strategy.root_device
    identity = identity_of(module, data)
    module.to(device).train()

    def answers(batch: Any) -> dict[str, Any]:
        with trainer.precision_plugin.forward_context():
            return answers_of(module, data.on_after_batch_transfer(batch.to(device), 0), data.seed, form)

    example = answers(data.batch_of_looks([(0, 0)]))
    layout = Layout.of(example, len(data.source), data.view_variants, arguments.shard)
    versions = {"ssd": code_version(), "torch": torch.__version__, "timm": timm.__version__}
    made = {**versions, "device": device.type, "precision": str(trainer.precision)}
    folder = TargetFolder.begin(arguments.out, identity, form.record(), layout, made)
    layout = folder.layout
    part, of = arguments.part
    mine = range(part, layout.shards, of)
    shards = list(folder.missing(part, of, arguments.check))

    out = console()
    progress = Progress(console=out, disable=not out.is_terminal, transient=True)
    batches = [
        batch for shard in shards for batch in looks_of(layout.samples_of(shard), layout.variants, data.batch_size)
    ]
    loader = iter(data.looks_dataloader(batches)) if batches else iter(())
    asked = iter(batches)
    broken: set[int] = set()
    with progress:
        task = progress.add_task("storing targets", total=sum(map(len, batches)))
        for shard in shards:
            with ShardWriter(folder, shard) as writer:
                left = len(writer.samples) * layout.variants
                while left:
                    looks, batch = next(asked), next(loader)
                    index = batch.index.tolist()
                    arrays = answers(batch)
                    for row, (variant, sample) in enumerate(looks):
                        if index[row] != sample:  # another stands in its place
                            writer.missing.add(sample)
                        else:
                            writer.put(sample, variant, row, arrays)
                    left -= len(looks)
                    progress.advance(task, len(looks))
                writer.finish()
                broken |= writer.missing
    del loader
    tell(folder, arguments, made=len(shards), kept=len(mine) - len(shards), broken=sorted(broken))


def looks_of(samples: range, variants: int, size: int) -> Iterator[list[tuple[int, int]]]:
    """Batches of (variant, sample), all looks at a sample one after the other."""
    looks = [(variant, sample) for sample in samples for variant in range(variants)]
    for first in range(0, len(looks), size):
        yield looks[first : first + size]


def tell(folder: Any, arguments: argparse.Namespace, *, made: int, kept: int, broken: list[int]) -> None:
    layout, out = folder.layout, str(folder.path)
    left = sum(1 for _ in folder.missing())
    total = layout.bytes_per_look * layout.samples * layout.variants
    content = {
        "folder": out,
        "samples": layout.samples,
        "variants": layout.variants,
        "bytes_per_look": layout.bytes_per_look,
        "bytes": total,
        "shards": layout.shards,
        "made": made,
        "kept": kept,
        "left": left,
        "broken": broken,
        "form": folder.form,
    }
    write_json(arguments.json, content)
    rows = ", ".join(
        f"{name} {' x '.join(map(str, shape)) or 'one'} {dtype}" for name, (shape, dtype) in layout.rows.items()
    )
    facts = {
        "targets": f"{layout.samples:,} samples x {layout.variants} looks in {shown(out)}: {rows}",
        "size": f"{layout.bytes_per_look:,} bytes a look, {total / 2**30:.3g} GiB in all",
        "shards": f"{made} made, {kept} were there" + (f", {left} of {layout.shards} still missing" if left else ""),
    }
    if broken:
        facts["broken"] = f"{len(broken):,} samples could not be read and are left out"
    if not left:
        facts["use them with"] = f"--model.cached_targets {shown(out)} --data.view_variants {layout.variants}"
    print_facts(console(), facts)
