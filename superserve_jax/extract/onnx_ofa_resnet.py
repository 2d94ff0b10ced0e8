"""The ONNX graph of an OFA-ResNet subnet. It takes the server's inputs, (B, H, W, C), and computes in (B, C, H, W)."""

import numpy as np

from superserve_jax.extract.extraction import INPUTS, LOGITS, Extraction
from superserve_jax.extract.onnx_graph import Graph
from superserve_jax.families import ofa_resnet
from superserve_jax.families.ofa_resnet import OFAResNetConfig

_MAX_PIXEL = 255.0


def build(graph: Graph, subnet: Extraction) -> None:
    """Adds the nodes of a subnet. `subnet.config` must be an OFAResNetConfig."""
    config, sizes = subnet.config, subnet.program.limits
    assert isinstance(config, OFAResNetConfig)

    def conv(x: str, path: str, *, stride: int = 1, relu: bool = True) -> str:
        kernel, bias = subnet.params[f"{path}.conv.kernel"], subnet.params[f"{path}.norm.bias"]
        size = kernel.shape[0]
        weights = (
            graph.constant(f"{path}.conv.kernel", kernel.transpose(3, 2, 0, 1)),
            graph.constant(subnet.names[f"{path}.norm.bias"], bias),
        )
        shape = {"kernel_shape": [size, size], "strides": [stride, stride], "pads": [size // 2] * 4}
        x = graph.add(f"{path}/conv", "Conv", x, *weights, **shape)
        return graph.add(f"{path}/relu", "Relu", x) if relu else x

    side = config.image_size  # of the current activation, in pixels

    def shrink(stride: int) -> int:
        return -(-side // stride)

    x = _normalised(graph, config)
    x, side = conv(x, "stem.0", stride=config.stem_stride), shrink(config.stem_stride)
    if sizes["stem.gate"]:
        x = graph.add("stem.1/add", "Add", x, conv(x, "stem.1"))
    x = conv(x, "stem.2")
    if config.stem_pool:
        x, side = graph.add("stem/pool", "MaxPool", x, kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4), shrink(2)
    for _, b, stride, has_shortcut in ofa_resnet.each_block(config):
        if not sizes[f"block{b}.gate"]:
            continue
        strides = (1, stride, 1) if config.block == "bottleneck" else (stride, 1)
        path, y, last = f"blocks.{b}", x, len(strides) - 1
        for i, s in enumerate(strides):
            y = conv(y, f"{path}.convs.{i}", stride=s, relu=i < last)
        if has_shortcut and stride > 1:
            pads = [0, 0, -side % stride, -side % stride]  # a window at the edge averages only the pixels inside
            window = {"kernel_shape": [stride, stride], "strides": [stride, stride], "pads": pads, "count_include_pad": 0}
            x = graph.add(f"{path}/pool", "AveragePool", x, **window)
        if has_shortcut:
            x = conv(x, f"{path}.shortcut", relu=False)
        x, side = graph.add(f"{path}/relu", "Relu", graph.add(f"{path}/add", "Add", x, y)), shrink(stride)
    x = graph.add("mean", "Flatten", graph.add("pool", "GlobalAveragePool", x), axis=1)
    classifier = [graph.constant(name, subnet.params[name]) for name in ("classifier.kernel", "classifier.bias")]
    graph.add(LOGITS, "Gemm", x, *classifier)


def _normalised(graph: Graph, config: OFAResNetConfig) -> str:
    """Images in (B, C, H, W), normalised: (x - 255 mean) / (255 std) for raw pixels."""
    x = graph.add("channels_first", "Transpose", INPUTS, perm=[0, 3, 1, 2])
    if config.input_dtype != "uint8":
        return x
    per_channel = (1, config.channels, 1, 1)
    mean = graph.constant("pixels.mean", (_MAX_PIXEL * np.array(config.mean)).astype(np.float32).reshape(per_channel))
    scale = graph.constant("pixels.scale", (1 / (_MAX_PIXEL * np.array(config.std))).astype(np.float32).reshape(per_channel))
    x = graph.add("pixels", "Cast", x, to=1)  # 1 is onnx.TensorProto.FLOAT
    return graph.add("normalised", "Mul", graph.add("centred", "Sub", x, mean), scale)
