"""Lets everything around a server misbehave at random, and checks its guarantees. The exit status is 1 if one is broken.

    python serve/bench/storm.py --minutes 10 --json runs/storm.json
    python serve/bench/storm.py --queries 1000000

The server is real, and its engines are fake. Batches fail and hang, and some subnets give NaN. Done-callbacks raise, block and
close servers. The policy raises, hangs, or decides nonsense. Signal handlers, finalizers and log handlers call the server,
even while it holds its lock. Workers come and go. Beside it, a second server swaps to an export with random weights while
other threads replace it.

What clients and engines saw decides, not what the server counts (see loadtest.recorder). The guarantees are:
- Every query has exactly one outcome, and it is the right answer or a documented error (see loadtest.checker).
- No thread, no file descriptor and no setting of the process is left.
- Neither the resident memory nor the number of memory blocks of Python grows.
If nothing resolves for a minute, the stacks of all threads are printed, and the exit status is 1.

With --queries, no other code misbehaves, and clients submit as fast as the server takes it.
Library: loadtest.storm, loadtest.agents, loadtest.checker, loadtest.leftovers, serving.server.
"""

import contextlib
import dataclasses
import functools
import gc
import logging
import math
import os
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from guarantees import Guarantee, end, in_words

from superserve_jax import cli, exports, machine
from superserve_jax.exports import Served
from superserve_jax.families.ofa_resnet import OFAResNetConfig
from superserve_jax.loadtest import agents, endurance
from superserve_jax.loadtest.acts import ReplacedExport
from superserve_jax.loadtest.storm import Storm, StormResult, run_storm
from superserve_jax.profile import Profile, Row
from superserve_jax.serving.server import Server
from superserve_jax.supernets.supernet import SuperNet

CHANCE = 0.01  # growth with a p-value of this or more counts as chance
WARM_UP = 0.2  # memory in this share of the run, at its start, does not count
REPEATS = 5  # calls that measure what other libraries leak
SMALL = OFAResNetConfig(
    num_classes=3,
    image_size=9,
    channels=1,
    block="basic",
    stem_width=8,
    stem_pool=False,
    stem_depths=(1,),
    stage_widths=(8,),
    strides=(2,),
    depths=((1,),),
    expand_ratios=(1.0,),
    width_mults=(1.0,),
    divisor=4,
    mean=(0.4,),
    std=(0.3,),
)
"""The network of the export that is replaced."""


@dataclasses.dataclass(frozen=True)
class Options:
    """Options.

    Args:
      minutes: length of the traffic.
      rate: the mean number of queries that clients submit in a second.
      queries: submit so many queries as fast as possible instead, without agents. None for --minutes.
      agents: what misbehaves; by default everything, see loadtest.agents.
      workers: the number of workers.
      expire: whether the server drops queries that can no longer meet their deadline.
      growth: how much resident memory and the number of memory blocks may grow, as a fraction.
      hung_s: after so many seconds in which nothing resolves, the program gives up.
      seed: the seed of all random choices.
      json: write the results to this file.
    """

    minutes: float = 10.0
    rate: float = 1_000.0
    queries: int | None = None
    agents: tuple[str, ...] = agents.ALL
    workers: int = 4
    expire: bool = False
    growth: float = 0.05
    hung_s: float = 60.0
    seed: int = 0
    json: pathlib.Path | None = None


def main() -> None:
    """The program."""
    options = cli.parse(Options, __doc__)
    cli.check_above_zero(options, "minutes", "rate", "workers", "hung_s", *["queries"][: options.queries is not None])
    chosen = {name: getattr(options, name) for name in ("workers", "agents", "expire", "hung_s", "seed")}
    plan = Storm(**chosen)
    with contextlib.ExitStack() as stack:
        if options.queries is not None:
            plan = dataclasses.replace(plan, queries=options.queries, agents=())
            logger = logging.getLogger("superserve_jax")
            stack.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.CRITICAL)  # failed batches are expected
            print(f"{plan.queries:,} queries of {plan.clients} clients, {plan.workers} workers, seed {plan.seed}")
        else:
            plan = dataclasses.replace(
                plan,
                queries=sys.maxsize,
                seconds=60 * options.minutes,
                rate_qps=options.rate,
                export=stack.enter_context(replaced_export()),
            )
            print(
                f"{plan.rate_qps:g} queries/s of {plan.clients} clients for {plan.seconds:g} s, {plan.workers} workers, "
                f"seed {plan.seed}; what misbehaves: {', '.join(plan.agents)}"
            )
        sys.stdout.flush()
        result = run_storm(plan, on_progress=every_10_s())
    show(result)
    figures = {"storm": {**dataclasses.asdict(dataclasses.replace(plan, export=None))}, **dataclasses.asdict(result)}
    memory = of_memory(result, options.growth) if options.queries is None else []  # as fast as possible, many notes wait
    end([*of_queries(result), *of_process(result), *memory], figures, options.json)


def every_10_s() -> Any:
    """A function that prints the number of offered queries every 10 s."""
    line_s, stream = time.monotonic(), sys.stderr  # during the storm, `sys.stderr` is another one

    def on_progress(offered: int) -> None:
        nonlocal line_s
        if time.monotonic() > line_s + 10:
            line_s = time.monotonic()
            print(f"{offered:,} offered, {endurance.resident_mb():.0f} MB", file=stream, flush=True)

    return on_progress


def show(result: StormResult) -> None:
    """Prints what happened."""
    check = result.check
    outcomes = sorted(check.outcomes.items(), key=lambda item: -item[1])
    cli.print_table([("outcome", "queries"), *((outcome, f"{count:,}") for outcome, count in outcomes)])
    print(f"failures: {in_words(result.failures)}\nworkers: {in_words(result.workers)}")
    if result.acts:
        print(f"acts: {in_words(dict(sorted(result.acts.items())))}")
        slowest = sorted(result.slowest_s.items(), key=lambda item: -item[1])[:5]
        print(f"slowest acts: {', '.join(f'{name} {seconds:.2f} s' for name, seconds in slowest)}")
    print(
        f"{result.seconds:.0f} s, {check.offered / result.seconds:,.0f} queries/s including the check, "
        f"{check.batches:,} batches, {endurance.resident_mb():.0f} MB resident"
    )
    for example in (*check.examples, *result.undocumented, *result.left):
        print(f"violation: {example}")


def of_queries(result: StormResult) -> list[Guarantee]:
    """The guarantees about queries and errors."""
    check, resolved = result.check, sum(result.check.outcomes.values())
    return [
        Guarantee("every query resolves", f"{check.offered:,} offered, {resolved:,} resolved", check.offered == resolved),
        Guarantee("no query is lost", f"{check.lost:,} lost", not check.lost),
        Guarantee("no query resolves twice", f"{check.twice:,} did", not check.twice),
        Guarantee(
            "right answers, documented errors, floors, and deadlines in order",
            f"{check.violations:,} violations in all, {check.compared:,} batches compared with all waiting queries",
            not check.violations,
        ),
        Guarantee("calls raise documented errors only", f"{len(result.undocumented)} others", not result.undocumented),
    ]


def of_process(result: StormResult) -> list[Guarantee]:
    """The guarantee about the process."""
    return [Guarantee("no thread, file descriptor or setting is left", f"{len(result.left)} are", not result.left)]


def of_memory(result: StormResult, most: float) -> list[Guarantee]:
    """The guarantees about memory, which may grow by the fraction `most`. The start of the run does not count."""
    guarantees = []
    for what, unit, values in (
        ("resident memory", "MB", result.memory_mb),
        ("the number of memory blocks of Python", "", result.blocks),
    ):
        counted = values[math.ceil(WARM_UP * len(values)) :]
        if len(counted) < 10:
            continue
        growth, chance = endurance.growth(counted)
        guarantees.append(
            Guarantee(
                f"{what} does not grow by more than {100 * most:.0f} %",
                f"{100 * growth:+.1f} % over {len(counted)} s, {min(counted):,.0f} to {max(counted):,.0f} {unit}".rstrip()
                + f", p = {chance:.2g} (growth counts only if p < {CHANCE:g})",
                not (growth > most and chance < CHANCE),
            )
        )
    return guarantees


@contextlib.contextmanager
def replaced_export() -> Iterator[ReplacedExport]:
    """An export of two versions: networks of one size with different random weights."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ.setdefault("SUPERSERVE_CACHE", f"{folder}/cache")
        path, subnet = pathlib.Path(folder) / "export", SMALL.space().largest()
        models = [SuperNet.create(SMALL, seed=i) for i in range(2)]
        for model in models:
            model.statistics = {subnet: np.ones((2, sum(SMALL.norm_sizes(SMALL.sizes(subnet)).values())), np.float32)}
        served = [Served(subnet, 0.5, None, SMALL.flops(subnet), SMALL.num_params(subnet))]
        inputs = np.random.default_rng(0).integers(0, 256, (8, *SMALL.input_spec(1).shape[1:]), dtype=np.uint8)

        def replace(version: int) -> None:
            exports.export(path, models[version], served, measured="not measured: random weights")

        replace(0)
        kind = machine.device_kind(jax.devices()[0])
        Profile((1, 4), (Row(subnet, 0.5, (1.0, 2.0)),), kind).save(exports.profile_path(path, kind))
        export = ReplacedExport(
            open=functools.partial(Server, path, batch_sizes=(1, 4), slo_ms=1_000.0, tune_runtime=False),
            path=path,
            replace=replace,
            inputs=list(inputs),
            outputs=[np.asarray(model(inputs, subnet)) for model in models],
        )
        yield dataclasses.replace(export, leaked_blocks=warm_up(export))


def warm_up(export: ReplacedExport) -> dict[str, float]:
    """Compiles everything, and starts the threads that other libraries keep. Returns `ReplacedExport.leaked_blocks`.

    tensorstore 0.1.86, which Orbax uses, leaks the result of every `Spec.to_json()`.
    """
    with export.open() as server:
        export.replace(1)
        leaked = {
            "replace_export": leak(functools.partial(export.replace, 0)),
            "swap_export": leak(functools.partial(server.swap, export.path)),
        }
    print(
        "memory blocks that other libraries leak, not counted as growth: "
        + ", ".join(f"{blocks:,.0f} in each {act}" for act, blocks in leaked.items())
    )
    return leaked


def leak(call: Callable[[], object]) -> float:
    """How many memory blocks of Python each call leaks."""
    blocks = []
    for _ in range(2 * REPEATS):
        call()
        gc.collect()
        blocks.append(sys.getallocatedblocks())
    return (blocks[-1] - blocks[-REPEATS]) / (REPEATS - 1)


if __name__ == "__main__":
    cli.run(main)
