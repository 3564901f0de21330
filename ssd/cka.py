"""How alike two sets of features are, whatever bases they are written in."""

import torch
from torch import Tensor

from ssd.distributed import sum_of_rows, sum_over_ranks, world_size


@torch.no_grad()
def linear_cka(x: Tensor, y: Tensor, *, unbiased: bool = True) -> Tensor:
    """Linear centred kernel alignment of two sets of features of the same samples, over the rows of all ranks.

    (n, D), (n, E) -> (), float32 and the same on every rank: HSIC(X, Y) / sqrt(HSIC(X, X) HSIC(Y, Y)), which rotations and
    scalings of either side do not change. 0 where one of them is constant. Kornblith et al. 2019, arXiv 1905.00414.

    Args:
        unbiased: HSIC by the estimator of Song et al. 2012, of which unrelated features have 0 on average whatever n, and
            which may be below 0. Plain, HSIC is |X^T Y|^2, of which unrelated features of 384 dimensions have a CKA of
            .85 at n = 64 and .27 at n = 1,024. Needs four rows.
    """
    if unbiased and len(x) * world_size() < 4:
        raise ValueError(
            f"{len(x)} rows on each of {world_size()} processes are too few for an unbiased estimate of CKA."
        )
    with torch.autocast(x.device.type, enabled=False):
        (x, count), (y, _) = centred(x), centred(y)
        pairs = [(x, y), (x, x), (y, y)]
        lengths = [rows.square().sum(-1) for rows in (x, y)]
        products = [(one.T @ other).flatten() for one, other in pairs]
        p, q = lengths
        sums = torch.stack([(p * q).sum(), p.square().sum(), q.square().sum(), p.sum(), q.sum()])
        total = sum_over_ranks(torch.cat([*products, sums]))
        *squares, (pq, pp, qq, p, q) = total.split([*(len(product) for product in products), len(sums)])
        hsic = torch.stack([square.square().sum() for square in squares])
        if unbiased:
            # rows are centred, so that sums of the kernels are sums over their diagonals, which the estimator leaves out
            diagonals, apart = torch.stack([pq, pp, qq]), torch.stack([p * q, p * p, q * q])
            hsic = hsic - diagonals * count / (count - 2) + apart / ((count - 1) * (count - 2))
        return torch.where(hsic[1:].amin() <= 0, 0.0, hsic[0] / hsic[1:].prod().sqrt())


def centred(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (n, D) less the mean over the rows of all ranks, float32, and the number of those."""
    total, count = sum_of_rows(rows.float())
    return rows.float() - total / count, count
