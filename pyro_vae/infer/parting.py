"""A graph parted: what is known before a run, and what depends on the run itself."""

import operator
from collections import defaultdict
from typing import Any, cast

import torch
from torch._ops import OpOverload
from torch.fx import Graph, GraphModule, Node

from pyro_vae.infer.tracing import written


def split_looks(graph: GraphModule, num_results: int) -> tuple[GraphModule, GraphModule | None, list[int], list[int]]:
    """The looks that can be known before a run, as a graph of their own, taken from those that a run itself gives.

    Args:
        graph: its outputs after the first ``num_results`` are looks.

    Returns:
        the graph with the results, and the looks that depend on what is drawn or changed in place; the graph of the
        others, None if there are none; the indices of the others, and of those that depend.
    """
    output = next(iter(reversed(graph.graph.nodes)))
    outputs = list(cast(Any, output.args[0]))
    results, looks = outputs[:num_results], outputs[num_results:]
    ancestors = _ancestors(graph) if looks else {}
    roots = _roots(graph)
    unforeseen = set()
    for node in graph.graph.nodes:
        target = node.target
        if isinstance(target, OpOverload) and (
            torch.Tag.nondeterministic_seeded in target.tags
            or any(roots[each].op == "placeholder" for each in _changed(node))
        ):
            unforeseen.add(node)
    before = [i for i, node in enumerate(looks) if unforeseen.isdisjoint(ancestors[node])]
    after = [i for i in range(len(looks)) if i not in set(before)]
    first = _part(graph, [looks[i] for i in before], ancestors) if before else None
    output.args = ((*results, *(looks[i] for i in after)),)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph, first, before, after


def _changed(node: Node) -> list[Node]:
    """The arguments that a node changes in place."""
    return list(written(node.target, node.args, node.kwargs, Node)) if isinstance(node.target, OpOverload) else []


def _roots(graph: GraphModule) -> dict[Node, Node]:
    """For each node the one whose memory it may share."""
    roots: dict[Node, Node] = {}
    for node in graph.graph.nodes:
        aliases = isinstance(node.target, OpOverload) and any(r.alias_info for r in node.target._schema.returns)
        aliases = aliases or node.target is operator.getitem
        roots[node] = roots[node.all_input_nodes[0]] if aliases and node.all_input_nodes else node
    return roots


def _ancestors(graph: GraphModule) -> dict[Node, set[Node]]:
    """For each node those that it needs: its inputs, and what has changed them in place before."""
    ancestors: dict[Node, set[Node]] = {}
    roots = _roots(graph)
    changes: dict[Node, set[Node]] = defaultdict(set)
    for node in graph.graph.nodes:
        needed = {node}
        for each in node.all_input_nodes:
            needed |= ancestors[each] | changes[roots[each]]
        ancestors[node] = needed
        for each in _changed(node):
            changes[roots[each]] |= needed
    return ancestors


def _part(graph: GraphModule, outputs: list[Node], ancestors: dict[Node, set[Node]]) -> GraphModule:
    """The graph of some nodes alone, with the same inputs."""
    needed = set().union(*(ancestors[node] for node in outputs))
    part, copies = Graph(), {}
    for node in graph.graph.nodes:
        if node.op == "placeholder" or node in needed:
            copies[node] = part.node_copy(node, copies.__getitem__)
    part.output(tuple(copies[node] for node in outputs))
    return GraphModule(graph, part)
