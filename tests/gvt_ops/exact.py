"""What the tests of this folder share: exact results to compare with, and who can run oneDNN."""

import pytest
import torch

from gvt_ops import onednn

needs_onednn = pytest.mark.skipif(not onednn.AVAILABLE, reason="no oneDNN with AVX-512 on this machine")


def doubled(*tensors):
    return [None if x is None else x.detach().double().requires_grad_(x.requires_grad) for x in tensors]


def rms_error(value, exact):
    return (value.double() - exact).square().mean().sqrt()


def compiled_graphs(function, *inputs):
    """-> the result of torch.compile(function) without breaks, and the graphs that the compiler was given."""
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph

    return torch.compile(function, fullgraph=True, dynamic=False, backend=keep)(*inputs), graphs


def calls(graph, *targets):
    return sum(node.op == "call_function" and node.target in targets for node in graph.graph.nodes)
