"""Traces a function once and runs it at other sizes, so that any network becomes a SuperNet.

    traced = tracing.trace(function, params, inputs)
    traced.groups                                               # axes of parameters that change together
    traced.evaluate(params, inputs, {"fc1.kernel[1]": 64})      # with the first 64 channels of that axis

The function's jaxpr names every operation. A rule for each primitive tells which axes are the same. What remains are groups
of axes that change together. To run at other sizes, the same operations are evaluated on smaller or masked arrays.

`ss.elastic` (in `elastic.py`) does this to a Flax NNX module, and makes a family of SuperNets of it.

| to learn about | read |
|---|---|
| `ss.elastic`: the API, and a family's config | `elastic.py`, `family.py`, `options.py` |
| a module as a function; its blocks, which may be left out | `modules.py`, `blocks.py` |
| the check of new running statistics | `statistics.py` |
| the search space, the programs and the costs of a traced module | `network.py`, `products.py`, `units.py` |
| what was found: kinds of axes, stages, the report | `found.py`, `kinds.py`, `listing.py` |
| the patterns by which users name axes and stages | `patterns.py` |
| the comparison with the module's own code | `agreement.py` |
| symbolic lengths of axes: leaves, products, sums | `dims.py` |
| a program as data, and how a jaxpr becomes one | `graph.py`, `jaxprs.py` |
| what each primitive says about axes, and how it runs at other sizes | `rules/` |
| which axes are the same; what can change, and what cannot and why | `relations.py`, `groups.py`, `traced.py`, `traces.py` |
| sizes, masks and cuts | `sizes.py` |
| running sliced, bucketed or masked | `evaluation.py`, `infinities.py` |
| kernels of several sizes | `kernels.py` |
| norms that engines fold into convolutions | `folding.py` |
| means, whose divisor follows the sizes; numbers that may come from a size | `means.py`, `suspects.py` |
| file and line in error messages and reasons | `places.py` |
"""

from superserve_jax.tracing.groups import Fixed, Group, Place
from superserve_jax.tracing.suspects import Suspect
from superserve_jax.tracing.traced import Traced, trace
from superserve_jax.tracing.traces import Traces

__all__ = ["Fixed", "Group", "Place", "Suspect", "Traced", "Traces", "trace"]
