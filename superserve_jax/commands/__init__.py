"""The command `superserve`: one subcommand for each workflow, in the module of the same name.

    superserve train configs/digits_resnet.py
    superserve replay runs/digits_resnet/export

The programs in train/ and serve/ of the repository are the same workflows. Each module has `main()`, which parses the command
line. A subcommand's module is imported when it is called, so `superserve --help` does not load jax.
"""

import importlib
import sys

import superserve_jax
from superserve_jax import cli, errors

COMMANDS = {
    "prepare": "prepare the dataset mnist or fashion_mnist, without TensorFlow",
    "train": "train a SuperNet from a config, then search, calibrate, evaluate and export it",
    "convert": "make a run from published weights instead",
    "search": "choose the subnets of a run to serve",
    "calibrate": "compute the SubnetNorm statistics of these subnets",
    "evaluate": "measure their test accuracies",
    "standalone": "train some subnets on their own, to compare",
    "export": "write an evaluated run as one directory to serve",
    "extract": "write one served subnet on its own, as ONNX, StableHLO or safetensors",
    "measure": "measure the latency profile of an export on this machine",
    "replay": "replay bursty traffic on the real server, policy by policy",
    "serve": "serve an export over the network, by the Open Inference Protocol",
    "compare": "compare policies in the simulator, in the paper's experiments",
    "cache": "show or clear the cache of compiled executables",
}


def main() -> None:
    """The console script `superserve`."""
    cli.run(_main)


def _main() -> None:
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        print("usage: superserve COMMAND [OPTIONS]\n\n" + "\n".join(f"  {n:<12}{about}" for n, about in COMMANDS.items()))
        print("\n`superserve COMMAND --help` explains a command and its options.")
        print("`--import MODULE` makes a family of your own known to any command.")
    elif name == "--version":
        print(f"superserve-jax {superserve_jax.__version__}")
    else:
        errors.check_name("command", name, COMMANDS)
        sys.argv = [f"superserve {name}", *arguments]
        importlib.import_module(f"superserve_jax.commands.{name}").main()
