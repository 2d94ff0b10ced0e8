"""Writes one served subnet as a file of its own, for ONNX Runtime, plain jax, or as weights only.

    from superserve_jax import extract

    extract.write("largest.onnx", ss.load("digits"), -1)

`extraction.py` cuts the weights and describes the inputs. `formats.py` makes the files, and `checking.py` runs them. No other
package but `commands` imports this one.
"""

from superserve_jax.extract.checking import Check
from superserve_jax.extract.extraction import Extraction, take
from superserve_jax.extract.formats import FORMATS, Format, content, format_of
from superserve_jax.extract.writing import Written, write

__all__ = ["FORMATS", "Check", "Extraction", "Format", "Written", "content", "format_of", "take", "write"]
