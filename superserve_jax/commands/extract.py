"""Writes one served subnet of an export as a file of its own, for programs that do not use this package.

    superserve extract digits                                       # lists the served subnets
    superserve extract digits --out largest.onnx
    superserve extract digits --subnet 0 --out smallest.stablehlo
    superserve extract digits --subnet 2 --format onnx              # subnet2.onnx

The file has the weights of this subnet alone, with its normalisation statistics folded in, and the contract of its inputs.
A network takes the same raw inputs as the server. The formats:

- onnx: a graph for ONNX Runtime, OpenVINO and others. Families ofa_resnet and dynabert only.
- stablehlo: a program for plain jax (`jax.export`), on CPUs, GPUs and TPUs. The contract is in a second file, PATH.json.
- safetensors: only the weights.

Batches of 1 or more, texts up to the longest length. An onnx or stablehlo file is run before it is written, and its logits
are compared with the server's. ONNX needs the package onnxruntime for that. An older file is replaced atomically.
docs/extract.md describes the contract.
`pip install 'superserve-jax[extract]'` installs what the formats need. Library: extract.write.
"""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Annotated

import tyro

import superserve_jax as ss
from superserve_jax import cli, errors, extract
from superserve_jax.exports import Served
from superserve_jax.extract import Format, Written, formats, writing


@dataclasses.dataclass(frozen=True)
class Options:
    """Options.

    Args:
      export: the export's directory.
      subnet: the index in the list of served subnets, which ascends in FLOPs. -1 is the largest.
      format: the format; if left out, the ending of --out decides.
      out: the file to write; if left out, subnetINDEX.FORMAT in this folder. Without --format, too, the command only lists the
        served subnets.
      json: also write the results and the contract to this file.
    """

    export: Annotated[pathlib.Path, tyro.conf.Positional]
    subnet: int = -1
    format: Format | None = None
    out: pathlib.Path | None = None
    json: pathlib.Path | None = None


def main() -> None:
    """The command."""
    options = cli.parse(Options, __doc__)
    if options.out is None and options.format is not None:
        options = dataclasses.replace(options, out=pathlib.Path(f"subnet{options.subnet}.{options.format}"))
    cli.refuse_without(options, "out", "subnet", "json")
    if options.out is not None:  # refused before the export is loaded
        refuse_clash(options.json, writing.paths_of(options.out, formats.format_of(options.out, options.format)))
    model = ss.load(options.export)
    if options.out is None:
        list_subnets(model.served)
        print(f"choose one: superserve extract {options.export} --subnet INDEX --out FILE.onnx, .stablehlo or .safetensors")
        return
    report(extract.write(options.out, model, options.subnet, format=options.format), options)


def refuse_clash(json: pathlib.Path | None, paths: Sequence[pathlib.Path]) -> None:
    """Raises ConfigError if the results would replace a file that was just written."""
    if json is not None and json.resolve() in [path.resolve() for path in paths]:
        raise errors.ConfigError(f"--json {json} would replace the extracted file; give another name")


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
    contract, check = written.contract, written.check
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
    print(f"measured: {contract['measured']}\ninput: {contract['input']['about']}")
    if check.not_checked is not None:
        print(f"not checked: {check.not_checked}")
    else:
        print(
            f"checked with {check.ran_with}: logits differ from the server's by at most {check.difference:.1e} of the largest"
        )
    print(f"run it, without superserve-jax:\n\n{formats.snippet(written.paths[0], written.format, contract)}\n")
    values = {"paths": list(map(str, written.paths)), "format": written.format, "bytes": written.size}
    cli.write_results(options.json, {**values, "check": dataclasses.asdict(check), "contract": contract})
