"""Serves an export over the network, by the Open Inference Protocol over HTTP and gRPC.

    python serve/gateway.py runs/digits_resnet/export --port 8000 --grpc-port 8001 --slo-ms 36

The same as `superserve serve`. superserve_jax/commands/serve.py holds the workflow, and explains it.
"""

from superserve_jax import cli
from superserve_jax.commands.serve import main

if __name__ == "__main__":
    cli.run(main)
