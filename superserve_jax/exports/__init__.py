"""The export directory: training writes it, the server reads it. It holds data only; nothing in it is executed.

`directory.py` shows what an export consists of, and has `export` and `load`. `model.py` is a loaded export. `statistics.py`
is the file of SubnetNorm statistics, which runs use as well. `superserve_jax/manifest.py` checks the files.
"""

from superserve_jax.exports.directory import export, load, profile_path
from superserve_jax.exports.model import Model, Served

__all__ = ["Model", "Served", "export", "load", "profile_path"]
