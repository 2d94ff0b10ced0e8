"""Engines. An engine is one device that holds a SuperNet and runs any of its served subnets.

Start with `base.py`, the protocol that the server relies on. `device.py` implements it with jax, and `fake.py` without a
model. `prepare.py` makes the engines and latency profiles for an export. It uses `executables.py` and `cache.py` to compile,
`subnet_buckets.py` to choose the subnets that share an executable, and `measuring.py` to measure latencies.
The public names are listed in `__init__.pyi`. Each one is imported at its first use. So importing the package does not import
jax.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
