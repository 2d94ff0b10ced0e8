"""Writes one served subnet of an export as a file of its own, for programs that do not use this package.

    superserve extract digits                                       # lists the served subnets
    superserve extract digits --out largest.onnx
    superserve extract digits --subnet 0 --out smallest.stablehlo

The file has the weights of this subnet alone, with its normalisation statistics folded in, and the contract of its inputs.
It takes the same raw inputs as the server. The formats:

- onnx: a graph for ONNX Runtime, OpenVINO and others. Families ofa_resnet and dynabert only.
- stablehlo: a program for plain jax (`jax.export`), on CPUs, GPUs and TPUs. The contract is in a second file, PATH.json.
- safetensors: only the weights.

All batch sizes and lengths work. Before a file is written, it is run, and its logits are compared with the server's. ONNX
needs the package onnxruntime for that. An older file is replaced atomically. docs/extract.md describes the contract.
`pip install 'superserve-jax[extract]'` installs what the formats need. Library: extract.write.
"""

import dataclasses
import pathlib
from typing import Annotated

import tyro

import superserve_jax as ss
from superserve_jax import cli, extract
from superserve_jax.exports import Served
from superserve_jax.extract import Format, Written, formats


@dataclasses.dataclass(frozen=True)
class Options:
    """Options.

    Args:
      export: the export's directory.
      subnet: the index in the list of served subnets, which ascends in FLOPs. -1 is the largest.
      format: the format; if left out, the ending of --out tells it.
      out: the file to write; if left out, the command only lists the served subnets.
      json: also write what was done, with the contract, to this file.
    """

    export: Annotated[pathlib.Path, tyro.conf.Positional]
    subnet: int = -1
    format: Format | None = None
    out: pathlib.Path | None = None
    json: pathlib.Path | None = None


def main() -> None:
    """The command."""
    options = cli.parse(Options, __doc__)
    cli.refuse_without(options, "out", "subnet", "format", "json")
    if options.out is not None:
        formats.format_of(options.out, options.format)  # before the export is loaded
    model = ss.load(options.export)
    if options.out is None:
        list_subnets(model.served)
        print(f"choose one: superserve extract {options.export} --subnet INDEX --out FILE.onnx, .stablehlo or .safetensors")
        return
    report(extract.write(options.out, model, options.subnet, kind=options.format), options)


def list_subnets(served: tuple[Served, ...]) -> None:
    """Prints the served subnets with their indices."""
    columns = {
        "subnet": lambda pair: str(pair[0]),
        "MFLOPs": lambda pair: f"{pair[1].flops / 1e6:.2f}",
        "parameters": lambda pair: f"{pair[1].params:,}",
        "accuracy": lambda pair: accuracy(pair[1].accuracy),
    }
    cli.print_columns(columns, enumerate(served), left=0)


def accuracy(value: float | None) -> str:
    """An accuracy for a person to read."""
    return "unknown" if value is None else f"{100 * value:.2f} %"


def report(written: Written, options: Options) -> None:
    """Prints what was written, and how to run it."""
    contract, check = written.subnet.contract, written.check
    arrays = written.subnet.weights
    for path in written.paths:
        size = path.stat().st_size
        print(f"{path}: {f'{size / 2**20:.1f} MiB' if size >= 2**20 else f'{size / 2**10:.1f} KiB'}")
    cli.print_table(
        [
            ("subnet", "MFLOPs", "parameters", "weights", "accuracy"),
            (
                f"{contract['index']} of 0 to {contract['served_subnets'] - 1}",
                f"{contract['flops'] / 1e6:.2f}",
                f"{contract['params']:,}",
                f"{sum(value.nbytes for value in arrays.values()) / 2**20:.2f} MiB in {len(arrays)} arrays",
                accuracy(contract["accuracy"]),
            ),
        ]
    )
    print(f"accuracy: {contract['measured']}\ninput: {contract['input']['about']}")
    if check is not None:
        print(
            f"checked with {check.ran_with}: logits differ from the server's by at most {check.difference:.1e} of the largest"
        )
    elif written.kind == "onnx":
        print("not checked, because onnxruntime is missing: pip install onnxruntime")
    print(f"run it, without superserve-jax:\n\n{formats.snippet(written.paths[0], written.kind, contract)}\n")
    compared = dataclasses.asdict(check) if check else None
    values = {"paths": list(map(str, written.paths)), "format": written.kind, "bytes": written.size, "check": compared}
    cli.write_results(options.json, {**values, "contract": contract})
