"""The ONNX graph of a DynaBERT subnet. It takes the server's inputs: token ids, and token types beside them if there are two.

Axis letters in comments: B batch, T tokens, D hidden size, N attention heads, H channels of a head.
"""

import math

import numpy as np

from superserve_jax.extract.extraction import INPUTS, LOGITS, Extraction
from superserve_jax.extract.onnx_graph import Graph
from superserve_jax.families.dynabert import DynaBERTConfig

_MASKED = -0.7 * np.finfo(np.float32).max
"""The value in `jax.nn.dot_product_attention`. So a sequence of only padding also gives equal logits."""


def build(graph: Graph, subnet: Extraction) -> None:
    """Adds the nodes of a subnet. `subnet.config` must be a DynaBERTConfig."""
    config, sizes = subnet.config, subnet.program.limits
    assert isinstance(config, DynaBERTConfig)

    def parameter(path: str) -> str:
        return graph.constant(path, subnet.params[path])

    def linear(x: str, path: str) -> str:
        x = graph.add(f"{path}/product", "MatMul", x, parameter(f"{path}.kernel"))
        return graph.add(f"{path}/add", "Add", x, parameter(f"{path}.bias"))

    def norm(x: str, path: str) -> str:
        weights = parameter(f"{path}.scale"), parameter(f"{path}.bias")
        return graph.add(path, "LayerNormalization", x, *weights, axis=-1, epsilon=config.eps)

    ids, x = _embeddings(graph, subnet, config)
    x, keep = norm(x, "embeddings.norm"), _keep(graph, ids, config)
    masked = graph.constant("masked", np.array(_MASKED, np.float32))
    root = graph.constant("root_of_head_size", np.array(math.sqrt(config.head_size), np.float32))
    for i in range(config.num_layers):
        if not sizes[f"layer{i}.gate"]:
            continue
        path, attention = f"layers.{i}", sizes[f"layer{i}.attention"]
        split = graph.constant(f"{path}.split", np.array([0, 0, -1, config.head_size]))  # 0 keeps the size of an axis
        joined = graph.constant(f"{path}.joined", np.array([0, 0, attention]))
        heads = {}
        for name, order in (("query", [0, 2, 1, 3]), ("key", [0, 2, 3, 1]), ("value", [0, 2, 1, 3])):  # (B, N, T, H)
            y = graph.add(f"{path}.{name}/split", "Reshape", linear(x, f"{path}.{name}"), split)
            heads[name] = graph.add(f"{path}.{name}/heads", "Transpose", y, perm=order)
        y = graph.add(f"{path}/scores", "MatMul", heads["query"], heads["key"])
        y = graph.add(f"{path}/masked", "Where", keep, graph.add(f"{path}/scaled", "Div", y, root), masked)
        y = graph.add(f"{path}/context", "MatMul", graph.add(f"{path}/softmax", "Softmax", y, axis=-1), heads["value"])
        y = graph.add(f"{path}/joined", "Reshape", graph.add(f"{path}/tokens", "Transpose", y, perm=[0, 2, 1, 3]), joined)
        x = norm(graph.add(f"{path}/add1", "Add", x, linear(y, f"{path}.attention_out")), f"{path}.attention_norm")
        y = linear(_gelu(graph, linear(x, f"{path}.ffn_in"), path), f"{path}.ffn_out")
        x = norm(graph.add(f"{path}/add2", "Add", x, y), f"{path}.ffn_norm")
    first = graph.add("first_token", "Gather", x, graph.constant("zero", np.array(0)), axis=1)
    pooled = graph.add("pooler/tanh", "Tanh", linear(first, "pooler"))
    graph.add(LOGITS, "Gemm", pooled, parameter("classifier.kernel"), parameter("classifier.bias"))


def _embeddings(graph: Graph, subnet: Extraction, config: DynaBERTConfig) -> tuple[str, str]:
    """Token ids (B, T), and the sum of word, position and type embeddings (B, T, D)."""
    ids, types = INPUTS, None
    if config.token_types > 1:
        ids = graph.add("ids", "Gather", INPUTS, graph.constant("zero", np.array(0)), axis=2)
        types = graph.add("types", "Gather", INPUTS, graph.constant("one", np.array(1)), axis=2)
    x = _look_up(graph, "embeddings.words", subnet, ids)
    start, axis = (graph.constant(f"{name}_of_slice", np.array([0])) for name in ("start", "axis"))
    length = graph.add("length", "Shape", ids, start=1, end=2)
    positions = graph.constant("embeddings.positions", subnet.params["embeddings.positions"])
    x = graph.add("embeddings/add1", "Add", x, graph.add("positions", "Slice", positions, start, length, axis))
    if types is None:
        kinds = graph.constant("embeddings.types", subnet.params["embeddings.types"][0])
    else:
        kinds = _look_up(graph, "embeddings.types", subnet, types)
    return ids, graph.add("embeddings/add2", "Add", x, kinds)


def _look_up(graph: Graph, path: str, subnet: Extraction, ids: str) -> str:
    """Rows of a table. An unknown id gives NaN, as in the server. So the table gets one more row, of NaN."""
    table = subnet.params[path]
    rows = graph.constant(path, np.concatenate([table, np.full_like(table[:1], np.nan)]))
    unknown, zero = (
        graph.constant(f"{path}.unknown", np.array(len(table), np.int32)),
        graph.constant("id0", np.array(0, np.int32)),
    )
    known = graph.add(f"{path}/at_most", "Min", ids, unknown)
    known = graph.add(f"{path}/ids", "Where", graph.add(f"{path}/negative", "Less", ids, zero), unknown, known)
    return graph.add(f"{path}/rows", "Gather", rows, known, axis=0)


def _keep(graph: Graph, ids: str, config: DynaBERTConfig) -> str:
    """False at padding, of shape (B, 1, 1, T)."""
    pad = graph.constant("pad_id", np.array(config.pad_id, np.int32))
    keep = graph.add("keep", "Not", graph.add("padding", "Equal", ids, pad))
    return graph.add("mask", "Unsqueeze", keep, graph.constant("mask.axes", np.array([1, 2])))


def _gelu(graph: Graph, x: str, path: str) -> str:
    """x (1 + erf(x / sqrt(2))) / 2, in the form that runtimes fuse into one kernel."""
    constants = {"gelu.root": math.sqrt(2), "gelu.one": 1.0, "gelu.half": 0.5}
    root, one, half = (graph.constant(name, np.array(value, np.float32)) for name, value in constants.items())
    y = graph.add(f"{path}/erf", "Erf", graph.add(f"{path}/over_root", "Div", x, root))
    return graph.add(
        f"{path}/gelu", "Mul", graph.add(f"{path}/gate", "Mul", x, graph.add(f"{path}/plus", "Add", y, one)), half
    )
