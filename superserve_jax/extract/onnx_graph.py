"""A small builder of ONNX graphs, on top of the helpers of the package onnx."""

import json
from typing import Any

import numpy as np

import superserve_jax
from superserve_jax.extract.extraction import CONTRACT_KEY

# The oldest versions that have all operators which the graphs use, so that older runtimes can read them.
_OPSET, _IR_VERSION = 17, 8


class Graph:
    """Nodes and constants of a network. Each node has one output, which has the node's name."""

    def __init__(self):
        self._nodes: list[dict[str, Any]] = []
        self._constants: dict[str, np.ndarray] = {}

    def constant(self, name: str, value: np.ndarray) -> str:
        """Adds a constant, and returns its name. Constants of one name must have one value."""
        value = np.asarray(value, order="C")  # not ascontiguousarray, which adds an axis to a scalar
        known = self._constants.setdefault(name, value)
        assert known is value or np.array_equal(known, value), f"two values of the constant {name}"
        return name

    def add(self, name: str, operator: str, *inputs: str, **attributes: Any) -> str:
        """Adds a node, and returns its name."""
        self._nodes.append({"op_type": operator, "inputs": inputs, "outputs": [name], "name": name, **attributes})
        return name

    def serialize(self, contract: dict[str, Any]) -> bytes:
        """The bytes of the whole model. The contract gives its input and output, and becomes part of its metadata."""
        import onnx  # pyright: ignore[reportMissingImports]
        from onnx import helper, numpy_helper  # pyright: ignore[reportMissingImports]

        def value(described: dict[str, Any]) -> Any:
            dtype = helper.np_dtype_to_tensor_dtype(np.dtype(described["dtype"]))
            return helper.make_tensor_value_info(described["name"], dtype, described["shape"])

        graph = helper.make_graph(
            [helper.make_node(**node) for node in self._nodes],
            contract["family"],
            [value(contract["input"])],
            [value(contract["output"])],
            [numpy_helper.from_array(array, name) for name, array in self._constants.items()],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", _OPSET)], ir_version=_IR_VERSION)
        del graph  # the model has a copy, and weights may be large
        model.producer_name, model.producer_version = "superserve-jax", superserve_jax.__version__
        helper.set_model_props(model, {CONTRACT_KEY: json.dumps(contract)})
        content = model.SerializeToString()
        onnx.checker.check_model(content, full_check=True)
        return content
