"""The gateway's second port: the Open Inference Protocol over gRPC, with grpc.aio in the loop that also serves HTTP. No jax.

`codec.py` translates between messages and the requests and replies of HTTP, so checks, errors and documents are the same.
`service.py` has the calls, `standard.py` the services that every gRPC server has: health and reflection.
`methods.py` makes methods from functions. `taking.py` takes calls from grpc's core.
`calls.py` runs a call: token, limits of time and memory, and access log. `statuses.py` maps errors to statuses.
`port.py` opens the port and drains it. `wire.py` counts the fields of a message before it is parsed.
`messages.py` makes the classes of messages from `protos/`, which holds the published definitions.
"""
