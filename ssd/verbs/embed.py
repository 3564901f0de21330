"""`ssd embed FILE --data ... --out DIR`: what a network makes of every sample, as files that other tools read."""

import hashlib
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from rich.progress import Progress
from torch import Tensor

from ssd.batch import network_input
from ssd.errors import UserError
from ssd.evaluation.embeddings import (
    INDEX,
    Folder,
    Identity,
    import_pyarrow,
    parquet_table,
    part_of_samples,
)
from ssd.evaluation.features import AUTOCAST
from ssd.evaluation.outputs import output_of
from ssd.summary import check_json, console, print_facts, shown, write_json
from ssd.verbs.arguments import Parser, at_least_one, split_data
from ssd.verbs.extraction import add_extraction, check_device
from ssd.verbs.loading import load_data
from ssd.verbs.networks import load_network
from ssd.views.view import WHOLE_SOUND
from ssd.weights.fingerprint import weights_fingerprint


def run(argv: list[str]) -> int:
    parser = Parser(
        prog="ssd embed",
        description="Writes the frozen features of every sample of a folder, or of any data that ssd fit takes, as NumPy or "
        "Parquet files with an index of names and labels. It writes part by part: the same command goes on after a stop, "
        "with what is missing. Views and normalisation are the network's own. Samples that cannot be read are in the index, "
        "marked as broken.",
        epilog="--data takes a path, a class name or a data config, and --data.KEY VALUE its settings, as in ssd fit; "
        "without it a checkpoint's own data is embedded, held-out parts of the same path included.",
    )
    parser.add_argument(
        "network", metavar="FILE", help="checkpoint that ssd fit wrote, exported folder, or timm:NAME.TAG"
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write into, or to go on in")
    parser.add_argument(
        "--output",
        default="pooled",
        metavar="NAME",
        help="which output of the network: pooled, patches, or one of those that ssd probe compares, such as mean_patch or "
        "last4_cls+mean_patch; default: pooled",
    )
    parser.add_argument("--format", default="npy", choices=["npy", "parquet"], help="default: npy")
    parser.add_argument("--dtype", default="float32", choices=["float32", "float16"], help="default: float32")
    parser.add_argument(
        "--part", type=at_least_one, metavar="N", help="samples of a file; default: 10,000, fewer where they are large"
    )
    add_extraction(parser)
    parser.add_argument("--json", metavar="FILE", help="also write where everything lies as JSON")
    own, chosen = split_data(argv)
    arguments = parser.parse_args(own)
    check_json(arguments.json)
    check_device(arguments.device)
    if arguments.format == "parquet":
        import_pyarrow()

    backbone, about = load_network(arguments.network)
    data = load_data(chosen, about, "embed")
    lengths = data.views.evaluation_lengths
    if lengths is None and arguments.output == "patches":
        raise UserError(
            "--output patches of whole sounds are tables of different lengths. Choose another output, or give the network's "
            "views an evaluation_length_s."
        )
    data.max_broken_share = 1.0  # they are listed
    embed = embedder(backbone.to(arguments.device), arguments.output, arguments.device, arguments.precision)
    shape = tuple(embed(backbone.example(lengths or WHOLE_SOUND, torch.Generator())).shape[1:])
    source = data.everything
    looks = {name: about.get(name) for name in ("views", "mean", "std", "channels", "value_range")}
    identity = Identity(
        weights=weights_fingerprint(backbone.state_dict()),
        data=source.fingerprint(),
        looks=hashlib.sha256(json.dumps(looks, sort_keys=True).encode()).hexdigest(),
        samples=len(source),
        output=arguments.output,
        format=arguments.format,
        dtype=arguments.dtype,
        precision=arguments.precision,
        shape=shape,
        part=arguments.part or part_of_samples(shape, arguments.dtype),
    )
    folder = Folder(arguments.out, identity)
    left = list(folder.missing())
    write_parts(folder, left, embed, data)
    if arguments.format == "npy":
        folder.write_index(source)
    tell(folder, left, arguments.json)
    return 0


def embedder(backbone: Any, output: str, device: str, precision: str) -> Callable[[Tensor], np.ndarray]:
    """Pictures (B, C, H, W) -> the output of that name, float32 on the CPU."""
    kind, dtype = torch.device(device).type, AUTOCAST[precision]

    def embed(pictures: Tensor) -> np.ndarray:
        with torch.inference_mode(), torch.autocast(kind, dtype, enabled=dtype is not None):
            return output_of(backbone, pictures.to(device, non_blocking=True), output).float().cpu().numpy()

    return embed


def write_parts(folder: Folder, numbers: list[int], embed: Callable[[Tensor], np.ndarray], data: Any) -> None:
    """Embeds what is missing, a part after the other. Raises UserError for features beyond what the type holds."""
    out, identity = console(), folder.identity
    progress = Progress(console=out, disable=not out.is_terminal, transient=True)
    with progress:
        task = progress.add_task("embedding", total=sum(len(folder.rows(number)) for number in numbers))
        for number in numbers:
            rows = folder.rows(number)
            features = np.full((len(rows), *identity.shape), np.nan, identity.dtype)
            there = np.zeros(len(rows), bool)
            for batch in data.rows_dataloader(rows):
                if len(batch["index"]):
                    places = batch["index"].numpy() - rows.start
                    found = embed(network_input(batch))
                    check_range(found, identity.dtype)
                    features[places], there[places] = found, True
                progress.advance(task, len(batch["index"]))
            broken = [rows[place] for place in np.flatnonzero(~there)]
            table = parquet_table(features, rows, broken, data.everything) if identity.format == "parquet" else None
            folder.write(number, features, broken, table)


def check_range(features: np.ndarray, dtype: str) -> None:
    """Raises UserError for features that would become infinite."""
    largest, most = float(np.abs(features[np.isfinite(features)]).max(initial=0)), float(np.finfo(dtype).max)
    if largest > most:
        raise UserError(f"--dtype {dtype} holds numbers up to {most:g}, and a feature is {largest:g}. Use float32.")


def tell(folder: Folder, made: list[int], json_file: str | None) -> None:
    identity, out = folder.identity, str(folder.path)
    files = [part["file"] for _, part in sorted(folder.parts.items())]
    content = {
        "folder": out,
        "index": INDEX if identity.format == "npy" else None,
        "files": files,
        "samples": identity.samples,
        "shape": list(identity.shape),
        "broken": folder.broken,
        "made": len(made),
        "kept": len(folder) - len(made),
    }
    write_json(json_file, content)
    each = " x ".join(map(str, identity.shape))
    facts = {"embeddings": f"{identity.samples:,} x {each}, {identity.output}, {identity.dtype}, in {shown(out)}"}
    if content["kept"]:
        facts["parts"] = f"{content['made']} made, {content['kept']} were there"
    if folder.broken:
        what = "null" if identity.format == "parquet" else f"not a number: column broken of {INDEX}"
        facts["broken"] = f"{len(folder.broken):,} samples, whose features are {what}"
    if identity.format == "npy":
        load = f"numpy.concatenate([numpy.load(file) for file in sorted(glob.glob({shown(out) + '/*.npy'!r}))])"
        facts["load them with"] = f"{load}, line by line those of {INDEX}"
    else:
        facts["load them with"] = f"pyarrow.parquet.read_table({shown(out)!r})"
    print_facts(console(), facts)
