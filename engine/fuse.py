"""Rewrites of the graph, each exact in real arithmetic and a function of its own; `fuse` applies them.

    drop_identity     dropout, clone, .to(same dtype) in eval mode  ->  nothing
    fold_batch_norm   conv, BN                                      ->  conv with other weights and a bias
    fuse_residual     conv, add                                     ->  conv with a residual
    fuse_activation   conv or linear, ReLU                          ->  conv or linear with an activation
    fuse_tail         global average pool, flatten                  ->  pool that writes [N, C]

A rewrite happens only if nobody else reads what disappears. Each function returns how often it was applied.
"""

from __future__ import annotations

from collections.abc import Callable

from .graph import Graph, Node
from .weights import Norm


def fuse(graph: Graph) -> dict[str, int]:
    """Apply every rewrite; returns how often each one fitted."""
    graph.drop_unused()
    counts = {rewrite.__name__: rewrite(graph) for rewrite in REWRITES}
    graph.drop_unused()
    return counts


def drop_identity(graph: Graph) -> int:
    """One stays when the caller receives both it and its source: clone() gives a second tensor."""
    count = 0
    for node in [n for n in graph.nodes if n.op == "identity"]:
        source = node.inputs[0]
        if node in graph.outputs:
            if source.op == "input" or source in graph.outputs:
                node.op = "aten"
                continue
            source.stride = node.stride
        graph.replace(node, source)
        count += 1
    return count


def fold_batch_norm(graph: Graph) -> int:
    """Only the recipe is recorded here; weights.fold computes scale and bias in float64."""
    return _absorb(graph, "batch_norm", _accepts_norm, _take_norm)


def _accepts_norm(conv: Node) -> bool:
    return conv.op == "conv2d" and conv.attrs["activation"] == "none" and not conv.attrs["residual"]


def _take_norm(conv: Node, norm: Node) -> None:
    names = {key: live.name if live is not None else None for key, live in norm.attrs.items() if key != "eps"}
    conv.attrs["norms"] += (Norm(eps=norm.attrs["eps"], **names),)


def fuse_activation(graph: Graph) -> int:
    return _absorb(graph, "relu", _accepts_activation, _take_activation)


def _accepts_activation(node: Node) -> bool:
    return node.op in ("conv2d", "linear") and node.attrs["activation"] == "none"


def _take_activation(node: Node, relu: Node) -> None:
    node.attrs["activation"] = "relu"


def fuse_tail(graph: Graph) -> int:
    def take(pool: Node, flatten: Node) -> None:
        pool.shape = flatten.shape

    return _absorb(graph, "flatten", lambda node: node.op == "global_avg_pool", take)


def fuse_residual(graph: Graph) -> int:
    """conv + other -> conv(residual=other), where `conv` is a convolution that nobody but the sum reads.

    When both terms are such convolutions (the first block of a stage), the later one takes the earlier one as
    its residual, so that no step has to move.
    """
    count = 0
    for node in [n for n in graph.nodes if n.op == "add"]:
        users = graph.users()
        host = _residual_host(graph, node, users)
        if host is None:
            continue
        left, right = node.inputs
        host.inputs.append(right if host is left else left)
        host.attrs["residual"] = True
        host.stride = node.stride
        host.fused.append(node.name or "add")
        graph.nodes.remove(host)  # it may read the residual only once that is there: run where the sum stood
        graph.nodes.insert(graph.nodes.index(node), host)
        graph.replace(node, host)
        count += 1
    return count


def _residual_host(graph: Graph, node: Node, users: dict[Node, list[Node | None]]) -> Node | None:
    free = [
        term
        for term in node.inputs
        if term.op == "conv2d"
        and not term.attrs["residual"]
        and term.attrs["activation"] == "none"
        and users[term] == [node]
    ]
    return max(free, key=graph.nodes.index, default=None)


REWRITES = (drop_identity, fold_batch_norm, fuse_residual, fuse_activation, fuse_tail)


def _absorb(
    graph: Graph, op: str, accepts: Callable[[Node], bool], take: Callable[[Node, Node], None]
) -> int:
    """Let each node `op` disappear into its only input, where that accepts it and nobody else reads it."""
    count = 0
    users = graph.users()
    for node in [n for n in graph.nodes if n.op == op]:
        host = node.inputs[0]
        if users[host] != [node] or not accepts(host):
            continue
        take(host, node)
        host.stride = node.stride
        host.fused.append(node.name or op)
        graph.replace(node, host)
        users[host] = users.pop(node)
        count += 1
    return count
