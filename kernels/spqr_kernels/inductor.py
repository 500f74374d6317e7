"""What torch.compile makes of our operators: products of one x with several matrices become one launch.

The pass sees a graph without mutation, where equal inputs are one node, so it cannot take two x for one."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._inductor import config
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.fx import Graph, Node

from .dispatch import TOGETHER, kind
from .ops import layout_of


class MergeProducts(CustomGraphPass):
    """`spqr::linear_forward` of one x with up to `TOGETHER` matrices that are alike to one `spqr::linears`."""

    def __init__(self, before: Sequence[Callable[[Graph], None]]) -> None:
        """before: the passes that stood in the same place, which run first."""
        self.before = tuple(before)

    def __call__(self, graph: Graph) -> None:
        """Changes the graph."""
        for other in self.before:
            other(graph)
        for nodes in _of_one_x(graph):
            for begin in range(0, len(nodes), TOGETHER):
                if len(nodes[begin : begin + TOGETHER]) > 1:
                    _merge(graph, nodes[begin : begin + TOGETHER])

    def uuid(self) -> Any | None:
        """Of this file and the passes before, for inductor's cache: None, which is never cached, where one of them has none."""
        theirs = [other.uuid() if isinstance(other, CustomGraphPass) else None for other in self.before]
        return None if None in theirs else (get_hash_for_files((__file__,)), *theirs)


def install() -> None:
    """Puts the pass where inductor finds it, behind the one that is there."""
    there: Any = config.post_grad_custom_pre_pass  # several, from torch 2.13 on
    passes = [] if there is None else list(there) if isinstance(there, (list, tuple)) else [there]
    if not any(isinstance(other, MergeProducts) for other in passes):
        config.post_grad_custom_pre_pass = MergeProducts(passes)


def _of_one_x(graph: Graph) -> list[list[Node]]:
    """Products with joined matrices, those of one x that one kernel can do together in a list."""
    found: dict[Any, list[Node]] = {}
    for node in graph.find_nodes(op="call_function", target=torch.ops.spqr.linear_forward.default):
        arguments: tuple[Any, ...] = node.args
        x, bias, stored, *matrix = arguments
        given = [tensor for tensor in (bias, *stored) if tensor is not None]
        if len(stored) == 1 and all(tensor.op in ("placeholder", "get_attr") for tensor in given):
            layout = layout_of(*matrix)
            if not layout.permuted:
                dtype = None if bias is None else bias.meta["val"].dtype
                found.setdefault((x, kind(layout), dtype), []).append(node)
    return list(found.values())


def _merge(graph: Graph, nodes: list[Node]) -> None:
    arguments: list[tuple[Any, ...]] = [node.args for node in nodes]
    x, bias = arguments[0][:2]
    biases = [] if bias is None else [its[1] for its in arguments]
    stored = [its[2][0] for its in arguments]
    geometry = [int(number) for its in arguments for number in its[3:]]
    for tensor in (*stored, *biases):
        if tensor.op == "get_attr":  # of no input, so that it may stand anywhere
            nodes[0].prepend(tensor)
    with graph.inserting_before(nodes[0]):
        whole = graph.call_function(torch.ops.spqr.linears.default, (x, biases, stored, geometry))
        whole.meta["val"] = [node.meta["val"] for node in nodes]
        for index, node in enumerate(nodes):
            part = graph.call_function(operator.getitem, (whole, index))
            part.meta["val"] = node.meta["val"]
            node.replace_all_uses_with(part)
    for node in nodes:
        graph.erase_node(node)
