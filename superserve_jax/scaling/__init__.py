"""Scaling: when a server gets more workers, and when it gives some back. No jax.

Degrade first, scale second. SlackFit answers a burst within milliseconds, with less accurate subnets. A new node takes
minutes. So the signal is the served accuracy, not the utilisation: under SlackFit all workers are busy at any load.

| to learn about | read |
|---|---|
| the rule, on any clock | `controller.py` |
| recent arrivals, from a counter | `recent.py` |
| which accuracy other numbers of workers would have reached on recent traffic | `what_if.py` |
| what users write: it watches a server, and adds and removes workers | `autoscaler.py` |
| a simulated day, with nodes that take minutes to start | `day.py` |
"""

from superserve_jax.scaling.autoscaler import Autoscaler
from superserve_jax.scaling.controller import Controller, Goal
from superserve_jax.scaling.day import Day, simulate_day

__all__ = ["Autoscaler", "Controller", "Day", "Goal", "simulate_day"]
