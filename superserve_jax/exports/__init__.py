"""The export directory: training writes it, the server reads it. It holds only data. Nothing in it is executed.

`directory.py` describes the contents of an export, and defines `export` and `load`. `model.py` defines a loaded export.
`statistics.py` reads and writes the file of SubnetNorm statistics, for runs as well. `superserve_jax/manifest.py` checks the
files.
"""

from superserve_jax.exports.directory import export, load, profile_path
from superserve_jax.exports.model import Model, Served

__all__ = ["Model", "Served", "export", "load", "profile_path"]
