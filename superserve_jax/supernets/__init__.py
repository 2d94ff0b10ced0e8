"""SuperNets: the interface of a family, the three programs of its forward function, and the model with its weights.

Read `family.py` first, then `programs.py`. Call `check` to verify a family that you wrote.
"""

from superserve_jax.supernets.checking import check
from superserve_jax.supernets.family import FamilyConfig, RewirableConfig, SequenceConfig, UnitAxis, Units
from superserve_jax.supernets.programs import Program
from superserve_jax.supernets.supernet import SuperNet

__all__ = ["FamilyConfig", "Program", "RewirableConfig", "SequenceConfig", "SuperNet", "UnitAxis", "Units", "check"]
