"""Plain Flax NNX models, as users write them, and small networks of the same code.

| file | model |
|---|---|
| `case.py` | what a case is, and how a small network takes the parameters of a subnet |
| `mlp.py` | linear layers in an `nnx.Sequential`, on uint8 images |
| `cnn.py` | convolutions, BatchNorm, pooling, Dropout, and a flatten with hard-coded sizes |
| `resnet.py` | stages of residual blocks, with strides and projections |
| `vit.py` | patches, a class token, `nnx.MultiHeadAttention` and GELU |
| `gpt.py` | causal attention with one fused or three separate projections, and tied embeddings |
| `llama.py` | einsum, rotary positions, grouped queries, SwiGLU and an RMSNorm of its own |
| `decoder.py` | the Llama of `docs/examples/listops_llama.py`, on texts with padding |
| `mobilenet.py` | inverted residuals with depthwise convolutions, and squeeze-and-excite |
| `branches.py` | branches that are concatenated and merged, as in Inception and in DenseNet |
| `scanned.py` | a `jax.lax.scan` over stacked layers |
"""

from models import branches, cnn, decoder, gpt, llama, mlp, mobilenet, resnet, scanned, vit
from models.case import Case

CASES = {
    case.name: case
    for case in (
        mlp.CASE,
        cnn.CASE,
        resnet.CASE,
        vit.CASE,
        gpt.FUSED,
        gpt.SEPARATE,
        llama.CASE,
        decoder.CASE,
        mobilenet.CASE,
        branches.CASE,
        scanned.CASE,
    )
}

__all__ = ["CASES", "Case"]
