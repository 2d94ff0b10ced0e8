"""A load generator for network APIs of servers, and the servers that it loads. Helpers of serve/bench/gateway*.py. No jax.

`open_loop` plays a trace: it sends requests when they are due, however late the answers are. `http1` and `http2` are its
connections. `messages` makes the requests and checks the answers. `children` starts servers in processes of their own, and
counts CPU time. `child` is this project's server behind a gateway, `peer_*` are servers of other projects. `cases` has what is
measured and its bounds, `report` the table and the plot.
"""
