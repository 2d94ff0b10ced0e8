"""The dtypes in which a network computes while it is served. No jax.

Training, calibration and stored weights are always float32. A server can compute in bfloat16, which has the range of float32
and 8 bits of precision. Then matrices, activations and products are bfloat16. Vectors, statistics and logits stay float32,
except biases into which an engine has folded statistics.
"""

from typing import Literal, get_args

from superserve_jax import errors

ComputeDtype = Literal["float32", "bfloat16"]


def check(compute_dtype: object) -> None:
    """Raises UnknownNameError unless the argument is a `ComputeDtype`."""
    errors.check_name("compute_dtype", compute_dtype, get_args(ComputeDtype))
