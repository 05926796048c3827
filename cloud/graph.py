"""The part of a server half behind the recovery, as an ONNX graph: three classifiers and the decision fusion.

Built from the torch modules themselves, so that there is one definition of the network. Batch normalisation is
folded into the convolution before it, and where a few released values are expanded by a linear layer, the attacked
stream's first convolution is folded into that layer: both are linear, and one product takes their place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

if TYPE_CHECKING:
    from torch import Tensor, nn

    from splitward.method.halves import ServerHalf

OPSET = 17
IR_VERSION = 8


class UnsupportedError(Exception):
    """The graph has no node for this module: torch has to run it."""


class _Builder:
    """Nodes and weights, gathered module by module."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.weights: list[TensorProto] = []

    def weight(self, value: Tensor | NDArray[np.generic]) -> str:
        name = f"w{len(self.weights)}"
        array = value if isinstance(value, np.ndarray) else value.detach().cpu().numpy()
        self.weights.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name

    def node(self, kind: str, inputs: list[str], **attributes: object) -> str:
        name = f"n{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [name], **attributes))
        return name

    def convolution(self, x: str, weight: Tensor, bias: Tensor, like: nn.Conv2d) -> str:
        pads = [*like.padding, *like.padding]
        return self.node(
            "Conv", [x, self.weight(weight), self.weight(bias)], strides=list(like.stride), pads=pads
        )

    def add(self, module: nn.Module, x: str) -> str:
        """The nodes of `module` after `x`; `UnsupportedError` when it is of a kind not known here."""
        from torch import nn

        from splitward.method.halves import ResidualBlock

        if isinstance(module, nn.Sequential):
            return self._add_sequence(list(module), x)
        if isinstance(module, ResidualBlock):
            return self.node(
                "Relu", [self.node("Add", [self.add(module.body, x), self.add(module.shortcut, x)])]
            )
        if isinstance(module, nn.Conv2d):
            return self.convolution(x, module.weight, _bias(module), module)
        if isinstance(module, nn.Linear):
            return self.node("Gemm", [x, self.weight(module.weight), self.weight(module.bias)], transB=1)
        if isinstance(module, nn.AdaptiveAvgPool2d) and module.output_size == 1:
            return self.node("GlobalAveragePool", [x])
        if isinstance(module, nn.ReLU):
            return self.node("Relu", [x])
        if isinstance(module, nn.Flatten):
            return self.node("Flatten", [x])
        if isinstance(module, nn.Identity):
            return x
        raise UnsupportedError(type(module).__name__)

    def _add_sequence(self, modules: list[nn.Module], x: str) -> str:
        from torch import nn

        while modules:
            module = modules.pop(0)
            if isinstance(module, nn.Conv2d) and modules and isinstance(modules[0], nn.BatchNorm2d):
                weight, bias = _fold_norm(module, modules.pop(0))
                x = self.convolution(x, weight, bias, module)
            else:
                x = self.add(module, x)
        return x


def build_expansion(expand: nn.Module) -> bytes:
    """Model that takes `released` [B, values] to `u` [B, K * h * w]."""
    build = _Builder()
    u = build.add(expand, "released")
    weight = expand.get_parameter("weight")
    return _finish(build, {"released": (weight.shape[1],)}, {"u": (u, TensorProto.FLOAT, weight.shape[0])})


def build_tail(network: ServerHalf) -> bytes:
    """Model that takes `released` [B, *release_shape], `u` and `v` [B, K, h, w] to `decision` [B, classes] and
    `streams`, int64 [B, 3]: the class of the attacked, the recovered and the fused stream.

    Raises
    ------
    UnsupportedError
        The network holds a module that is not known here.
    """
    build = _Builder()
    u, v = "u", "v"
    both = build.node("Concat", [u, v], axis=1)
    mixed = build.node("Add", [build.add(network.fusion.convolution, both), u])
    logits = [_add_attacked(build, network), build.add(network.recovered, v), build.add(network.fused, mixed)]
    scores = [build.node("Softmax", [one], axis=1) for one in logits]
    weights = network.get_buffer("weights").cpu().numpy().astype(np.float32)
    sure = [
        build.node(
            "Mul",
            [build.node("ReduceMax", [one], axes=[1], keepdims=1), build.weight(weights[index].reshape(1, 1))],
        )
        for index, one in enumerate(scores)
    ]
    together = build.node("Add", [build.node("Add", [sure[0], sure[1]]), sure[2]])
    shares = [
        build.node("Mul", [build.node("Div", [part, together]), one])
        for part, one in zip(sure, scores, strict=True)
    ]
    decision = build.node("Add", [build.node("Add", [shares[0], shares[1]]), shares[2]])
    chosen = build.node("Concat", [build.node("ArgMax", [one], axis=1, keepdims=1) for one in logits], axis=1)
    settings = network.settings
    inputs = {"released": settings.release_shape, "u": settings.server_shape, "v": settings.server_shape}
    outputs = {
        "decision": (decision, TensorProto.FLOAT, settings.classes),
        "streams": (chosen, TensorProto.INT64, 3),
    }
    return _finish(build, inputs, outputs)


def _add_attacked(build: _Builder, network: ServerHalf) -> str:
    """The attacked stream from `u`, or from `released` where that is less work."""
    import torch
    from torch import nn

    stream, expand = network.attacked, network.expand
    first = stream[0]
    if not (isinstance(expand, nn.Linear) and isinstance(first, nn.Conv2d)):
        return build.add(stream, "u")
    channels = network.settings.server_shape[0]
    if network.settings.size != "small" or expand.in_features >= 9 * channels:
        return build.add(stream, "u")
    with torch.no_grad():
        shape = (-1, *network.settings.server_shape)
        columns = nn.functional.conv2d(
            expand.weight.T.double().reshape(shape), first.weight.double(), None, first.stride, first.padding
        ).flatten(1)
        bias = nn.functional.conv2d(
            expand.bias.double().reshape(shape), first.weight.double(), _bias(first).double(), first.stride,
            first.padding,
        ).flatten()  # fmt: skip
    hidden = build.node("Gemm", ["released", build.weight(columns.float()), build.weight(bias.float())])
    return build.add(
        nn.Sequential(*[part for part in list(stream)[1:] if not isinstance(part, nn.Flatten)]), hidden
    )


def _finish(
    build: _Builder, inputs: Mapping[str, Sequence[int]], outputs: Mapping[str, tuple[str, int, int]]
) -> bytes:
    """Model of the gathered nodes; only the inputs that some node reads. `outputs`: node, type, width."""
    nodes = [
        *build.nodes,
        *(helper.make_node("Identity", [node], [name]) for name, (node, *_) in outputs.items()),
    ]
    read = {name for node in nodes for name in node.input}
    model = helper.make_model(
        helper.make_graph(
            nodes,
            "server",
            [
                helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", *shape])
                for name, shape in inputs.items()
                if name in read
            ],
            [
                helper.make_tensor_value_info(name, kind, ["n", width])
                for name, (_, kind, width) in outputs.items()
            ],
            build.weights,
        ),
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
    )
    return bytes(model.SerializeToString())


def _bias(module: nn.Conv2d) -> Tensor:
    import torch

    return torch.zeros(module.out_channels) if module.bias is None else module.bias


def _fold_norm(module: nn.Conv2d, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Weight and bias of the convolution with the batch normalisation behind it folded in, by float64."""
    from torch import nn

    assert isinstance(norm, nn.BatchNorm2d)  # noqa: S101  # the caller looked
    assert norm.running_var is not None  # noqa: S101  # it tracks them by default
    assert norm.running_mean is not None  # noqa: S101  # it tracks them by default
    scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    weight = module.weight.double() * scale.view(-1, 1, 1, 1)
    bias = norm.bias.double() + (_bias(module).double() - norm.running_mean.double()) * scale
    return weight.float(), bias.float()
