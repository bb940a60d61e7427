"""Orders of features that bring what is stored together: `sp.permuted(p, q=…, k=…)` over weights, and how to find them.

    y = W x,  p holds of W[q][:, k]  ->  x' = x[k],  y' = W' x',  y[q] = y'

Where a layer of a model permutes its hidden features nothing is moved at run time: rows of one weight and columns of
the next are stored in the same order.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from spgen.errors import DataError, ShapeError
from spgen.patterns import Pattern, part
from spgen.weights.select import scores_of, tiled_scores

_EDGES = 200_000  # of the graph whose communities are found
_SEED = 0


class Orders(NamedTuple):
    """Features by rank: outputs `q` [N] and inputs `k` [K], int64; None: as they are."""

    q: Tensor | None = None
    k: Tensor | None = None

    def applied(self, weight: Tensor) -> Tensor:
        """The weight [N, K] with its rows and columns by rank."""
        weight = weight if self.q is None else weight[self.q]
        return weight if self.k is None else weight[:, self.k]


def orders_of(pattern: Pattern, shape: tuple[int, ...]) -> tuple[Pattern, Orders]:
    """What an outermost `permuted` holds, and its orders; any other pattern as it is.

    Raises ShapeError for orders of another length than the weight's sides, DataError for such as are no permutations.
    """
    node = pattern.node
    if node.kind != "permuted":
        return pattern, Orders()
    found = {}
    for name, side in (("q", shape[0]), ("k", shape[1])):
        if node[name] is None:
            continue
        order = pattern.data[node[name].index].long()
        if order.numel() != side:
            raise ShapeError(f"permuted: {name}", given=f"shape {list(order.shape)}", allowed=f"[{side}]")
        order = order.reshape(side)
        if not torch.equal(order.sort().values, torch.arange(side, device=order.device)):
            raise DataError(f"permuted: {name}", given="an order that leaves features out", allowed="a permutation")
        found[name] = order
    return part(pattern, node.operands[0]), Orders(**found)


def concentrated(weight: Tensor, rows: int, cols: int | None = None, density: float = 0.1) -> Orders:
    """Orders of a weight [N, K] in which few blocks of `rows` x `cols` hold more of its magnitude.

    Features that large weights connect are brought together: communities (Blondel et al. 2008) of the graph of outputs
    and inputs whose edges are the `density` of weights of the largest magnitude (at most 200,000). Where that is not
    better for the blocks that `density` keeps, the orders are as the weight is. For

        q, k = sp.concentrated(w, 32)
        layer = sp.linear(w, sp.permuted(sp.block(32, density=0.1), q=q, k=k))
    """
    import networkx as nx

    cols = rows if cols is None else cols
    n, k = weight.shape
    scores = scores_of(weight).cpu()
    count = max(1, min(_EDGES, int(density * scores.numel())))
    chosen = scores.flatten().topk(count).indices
    graph = nx.Graph()
    graph.add_nodes_from(range(n + k))
    ends = zip((chosen // k).tolist(), (n + chosen % k).tolist(), scores.flatten()[chosen].tolist(), strict=True)
    graph.add_weighted_edges_from(ends)
    groups = nx.community.louvain_communities(graph, seed=_SEED)
    outputs, inputs = [], []
    for group in sorted(groups, key=lambda group: (-len(group), min(group))):
        q = torch.tensor(sorted(feature for feature in group if feature < n), dtype=torch.int64)
        columns = torch.tensor(sorted(feature - n for feature in group if feature >= n), dtype=torch.int64)
        within = scores[q][:, columns].square()
        outputs.append(q[within.sum(1).argsort(descending=True, stable=True)])
        inputs.append(columns[within.sum(0).argsort(descending=True, stable=True)])
    found = Orders(_whole(outputs, rows).to(weight.device), _whole(inputs, cols).to(weight.device))
    if _kept(found.applied(weight), rows, cols, density) > _kept(weight, rows, cols, density):
        return found
    return Orders(torch.arange(n, device=weight.device), torch.arange(k, device=weight.device))


def _whole(groups: list[Tensor], size: int) -> Tensor:
    """Groups one after the other, each from a multiple of `size` on: what is left over of them fills the gaps."""
    bins, left = [], []
    for group in groups:
        parts = list(group.split(size))
        if parts and len(parts[-1]) * 2 < size:
            left.append(parts.pop())
        bins += parts
    loose = torch.cat([*left, groups[0][:0]])
    ranked = []
    for one in sorted(bins, key=len, reverse=True):
        gap = size - len(one)
        ranked.append(torch.cat((one, loose[:gap])))
        loose = loose[gap:]
    return torch.cat([*ranked, loose])


def _kept(weight: Tensor, rows: int, cols: int, density: float) -> float:
    """The share of squared magnitude in the blocks that a density keeps."""
    norms = tiled_scores(scores_of(weight), rows, cols).flatten().square()
    return float(norms.topk(max(1, int(density * norms.numel()))).values.sum() / norms.sum().clamp(min=1e-30))
