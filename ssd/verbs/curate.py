"""`ssd curate NETWORK --data ... --out FILE.npz`: clusters of a data set, to draw from them evenly."""

import argparse
import sys
import time
from typing import Any

import numpy as np
import torch
from rich.table import Table

from ssd.data.clusters import Clusters, check_levels, cluster, gini, write_clusters
from ssd.data.sampling import Balanced, BalancedDraws
from ssd.errors import UserError
from ssd.evaluation.features import extract
from ssd.evaluation.protocol import check_finite
from ssd.summary import check_json, check_writable, console, print_facts, shown, write_json
from ssd.verbs.arguments import Parser, split_data
from ssd.verbs.extraction import add_extraction, check_device
from ssd.verbs.loading import load_data
from ssd.verbs.networks import load_network


def run(argv: list[str]) -> int:
    parser = Parser(
        prog="ssd curate",
        description="Clusters the features of every picture by hierarchical k-means (Vo et al. 2024) and writes who belongs "
        "where. A run draws from all clusters alike with --data.sampling Balanced --data.sampling.file FILE.npz",
        epilog="--data takes a path, a class name or a data config, and --data.KEY VALUE its settings, as in ssd fit; "
        "without it a checkpoint's own data is clustered. Features are pooled, and scaled to length 1.",
    )
    parser.add_argument(
        "network", metavar="NETWORK", help="checkpoint that ssd fit wrote, exported folder, or timm:NAME.TAG"
    )
    parser.add_argument("--out", required=True, metavar="FILE.npz", help="file to write")
    parser.add_argument(
        "--clusters",
        type=levels,
        default=None,
        metavar="N,N,...",
        help="clusters on each level, the finest first, such as 1000,100; default: one for every 50 pictures, and a tenth",
    )
    parser.add_argument("--seed", type=int, default=0, help="of k-means; default: 0")
    add_extraction(parser)
    parser.add_argument("--json", metavar="FILE", help="also write the numbers as JSON")
    own, chosen = split_data(argv)
    arguments = parser.parse_args(own)
    if not arguments.out.endswith(".npz"):
        raise UserError(
            f"--out {arguments.out} does not end in .npz. Give the name of a NumPy file, such as clusters.npz."
        )
    check_json(arguments.json)
    check_writable("--out", arguments.out)
    check_device(arguments.device)

    backbone, about = load_network(arguments.network)
    backbone = backbone.to(arguments.device)
    data = load_data(chosen, about, "curate")
    start = time.perf_counter()
    found = extract(
        lambda pictures: backbone(pictures).pooled(),
        data.predict_dataloader(),
        device=arguments.device,
        precision=arguments.precision,
        progress="features" if sys.stdout.isatty() else None,
    )
    check_finite(pictures=found.features)
    seconds = {"features": time.perf_counter() - start}

    source = data.everything
    numbers = arguments.clusters or default_levels(len(found.index))
    start = time.perf_counter()
    features = torch.nn.functional.normalize(found.features, dim=1).numpy()
    own_leaf, parents = cluster(features, numbers, arguments.seed)
    seconds["k-means"] = time.perf_counter() - start
    leaf = np.full(len(source), -1, np.int32)  # a broken picture has no cluster
    leaf[found.index.numpy()] = own_leaf
    clusters = Clusters(leaf, parents, int(own_leaf.max()) + 1)
    name = str(data.path) if hasattr(data, "path") else type(data).__name__
    write_clusters(arguments.out, clusters, data=name, fingerprint=source.fingerprint())

    content = report(clusters, seconds) | {"file": arguments.out, "network": arguments.network, "data": name}
    write_json(arguments.json, content)
    tell(content, clusters)
    return 0


def levels(text: str) -> list[int]:
    """'1000,100', for the `type` of an option."""
    try:
        numbers = [int(part) for part in text.split(",")]
        check_levels(numbers)
    except ValueError as error:
        reason = str(error) if isinstance(error, UserError) else f"'{text}' is not a list such as 1000,100"
        raise argparse.ArgumentTypeError(reason) from None
    return numbers


def default_levels(pictures: int) -> list[int]:
    """About 50 pictures a cluster, and clusters of about ten of these where there are enough for it to matter."""
    finest = max(2, min(pictures, round(pictures / 50)))
    return [finest, finest // 10] if finest >= 20 else [finest]


def report(clusters: Clusters, seconds: dict[str, float]) -> dict[str, Any]:
    """Sizes level by level, and what balanced draws change: the share of an epoch's draws that go to another sample
    than where every sample is drawn once."""
    rows = []
    sizes = clusters.sizes()
    for level in range(len(clusters.parents) + 1):
        rows.append(
            {
                "level": level,
                "clusters": len(sizes),
                "smallest": int(sizes.min()),
                "median": float(np.median(sizes)),
                "largest": int(sizes.max()),
                "gini": gini(sizes),
            }
        )
        if level < len(clusters.parents):
            parent = clusters.parents[level]
            sizes = np.bincount(parent, sizes, int(parent.max()) + 1).astype(np.int64)
    with_cluster = int(np.count_nonzero(clusters.leaf >= 0))
    draws = BalancedDraws(clusters, with_cluster, Balanced.max_repeats)
    times = np.bincount(draws.rows(0, 0), minlength=len(clusters.leaf))[clusters.leaf >= 0]
    return {
        "levels": rows,
        "pictures": len(clusters.leaf),
        "without_cluster": len(clusters.leaf) - with_cluster,
        "changed_draws": float(np.maximum(times - 1, 0).sum() / with_cluster),
        "seconds": seconds,
        "draws": str(draws),
    }


def tell(content: dict[str, Any], clusters: Clusters) -> None:
    out = console()
    table = Table(
        "level", "clusters", "smallest", "median", "largest", "Gini", title=f"pictures in clusters of {content['data']}"
    )
    for row in content["levels"]:
        sizes = (f"{row['smallest']:,}", f"{row['median']:,.0f}", f"{row['largest']:,}")
        table.add_row(str(row["level"]), f"{row['clusters']:,}", *sizes, f"{row['gini']:.2f}")
    out.print(table)
    file = shown(content["file"])
    facts = {
        "pictures": f"{content['pictures']:,}, {content['without_cluster']:,} of them broken and without a cluster",
        "draws": content["draws"],
        "changed": f"{content['changed_draws']:.1%} of the draws go to another picture than if each were drawn once",
        "time": ", ".join(f"{name} {value:.1f} s" for name, value in content["seconds"].items()),
        "draw by it": f"ssd fit ... --data.sampling Balanced --data.sampling.file {file}",
    }
    print_facts(out, facts)
