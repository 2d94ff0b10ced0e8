"""The threaded server: queries in, futures out. No jax.

Start with the page at the top of `server.py`: a query's path, the threads, the locks, and the rules about them. Then read
`pool.py` (what the threads of a server share), `worker.py` (one engine and its thread) and `backlog.py` (what waits).
`futures.py` is what a client holds, and `options.py` lists the options of a server. `prometheus.py` needs an extra package.
"""

from superserve_jax.serving.futures import Future, Query, Reply
from superserve_jax.serving.options import ServerOptions
from superserve_jax.serving.pool import Pool
from superserve_jax.serving.server import Server

__all__ = ["Future", "Pool", "Query", "Reply", "Server", "ServerOptions"]
