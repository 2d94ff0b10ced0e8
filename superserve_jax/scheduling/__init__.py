"""Scheduling: which queries a free worker takes, and on which subnet it runs them. No jax.

Read `dispatch.next_batch` first. It asks one of the `policies` and takes a batch from a `queue`, or from a `length_queue` if
there are several length buckets. The policy decides by the state of the queue, the arrival meter in `arrivals`, and the worker
speeds in `speeds`. `admission` refuses queries on arrival. Server and simulator run the same code.
"""

from superserve_jax.scheduling.admission import Admission
from superserve_jax.scheduling.arrivals import ArrivalMeter
from superserve_jax.scheduling.dispatch import Turn
from superserve_jax.scheduling.length_queue import Queue
from superserve_jax.scheduling.policies import Decision, Policy, State
from superserve_jax.scheduling.speeds import Fleet

__all__ = ["Admission", "ArrivalMeter", "Decision", "Fleet", "Policy", "Queue", "State", "Turn"]
