"""The options of XLA's compiler for fast inference."""

import os
import re
from collections.abc import Mapping
from typing import Any

# First option: by default, XLA's CPU backend slices all weights before the first layer and holds all slices at once. The
# memory-optimised order takes less temporary memory and is as fast. Second option: by default, convolutions and matrix
# products run in YNN, a library of fused kernels. XLA's own code was faster for both (OFA-ResNet50 and DynaBERT, two cores
# with AVX-512).
# On a GPU, XLA by default does not record convolutions or branches in command buffers (CUDA graphs). Then the host launches
# each kernel by itself, and waits for the device at each branch. With this list, a call is one command buffer, as
# `serve/bench/gpu_compile.py` shows.
_COMMAND_BUFFERS = "xla_gpu_enable_command_buffer"
_COMPILER_OPTIONS: Mapping[str, dict[str, Any]] = {
    "cpu": {
        "xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED",
        "xla_cpu_experimental_ynn_fusion_type": "",
    },
    "gpu": {
        _COMMAND_BUFFERS: "FUSION,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL,CONVOLUTION,CONDITIONAL",
    },
}


def options(platform: str, *, command_buffers: bool = True) -> dict[str, Any]:
    """XLA's options for fast inference on devices of a platform such as "cpu", as `jax.jit` takes them.

    Options that the user has set in XLA_FLAGS are left out. `command_buffers=False` turns command buffers of GPUs off.
    """
    chosen = dict(_COMPILER_OPTIONS.get(platform, {}))
    if not command_buffers and _COMMAND_BUFFERS in chosen:
        chosen[_COMMAND_BUFFERS] = ""
    given = re.findall(r"--(\w+)", os.environ.get("XLA_FLAGS", ""))
    return {name: value for name, value in chosen.items() if name not in given}
