"""The threaded server: queries in, futures out. No jax.

Start with the page at the top of `server.py`: a query's path, the threads, the locks, and the rules about them. Then read
`pool.py` (the state that a server's threads share), `worker.py` (one engine and its thread), `flight.py` (one batch) and
`backlog.py` (the waiting queries). `failures.py` says what follows when an engine fails, with `retries.py`, `blame.py` and
`lost.py`. `threads.py` has the outbox and the watchdog. `futures.py` has the future that a client gets, and `options.py` lists
the options of a server. `makers.py` makes engines from an export. `prometheus.py` needs the package prometheus-client.
"""

from superserve_jax.serving.futures import Future, Query, Reply
from superserve_jax.serving.options import ServerOptions
from superserve_jax.serving.pool import Pool
from superserve_jax.serving.server import Server

__all__ = ["Future", "Pool", "Query", "Reply", "Server", "ServerOptions"]
