"""Scheduling: which queries a free worker takes, and on which subnet it runs them. No jax.

Read `dispatch.next_batch` first. It asks one of the `policies` and takes a batch from a `queue` (`length_queue` with several
length buckets). The policy's state comes from the queue, the arrival meter in `arrivals`, and the worker speeds in `speeds`.
`admission` refuses queries on arrival. The server and the simulator run this same code.
"""

from superserve_jax.scheduling.admission import Admission
from superserve_jax.scheduling.arrivals import ArrivalMeter
from superserve_jax.scheduling.dispatch import Turn
from superserve_jax.scheduling.policies import Decision, Policy, State
from superserve_jax.scheduling.queue import Queue
from superserve_jax.scheduling.speeds import Fleet

__all__ = ["Admission", "ArrivalMeter", "Decision", "Fleet", "Policy", "Queue", "State", "Turn"]
