"""Reads many damaged files, and checks that each is refused with a documented error, or is read as a usable value.

    python serve/bench/fuzz.py --jobs 2 --json runs/fuzz.json
    python serve/bench/fuzz.py --case profiles 1234

There are five kinds of files: `manifests`, `profiles`, `statistics`, `traces` (recorded arrivals and Azure's counts), and
whole `exports` with damage in any one file. They come from two tiny exports. Many manifests get a digest that fits, as an
attacker would make it. A manifest is read without its payload, so it is always refused. Every case has a number, and
`--case KIND NUMBER` repeats it. A finding is:
- any other error, a warning or a crash,
- a message that does not name the file, or is not one printable line,
- a value that cannot be used: an export is checked, a profile and a trace go through the simulator,
- more than --limit-s seconds, or more than --limit-mb MB of memory, for one file.
The exit status is 1 if there is one. The files are read in processes of their own, so that a crash ends only one of them.
Ctrl-C prints the counts so far.
Library: superserve_jax.load, profile, exports.statistics, simulation.traces, simulation.azure, engines.prepare.
"""

import collections
import dataclasses
import faulthandler
import gc
import logging
import multiprocessing
import os
import pathlib
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Generator
from multiprocessing.connection import Connection, wait

import damaged_files
import psutil
from damaged_files import DamagedFiles

from superserve_jax import cli, errors, progress

BLOCK = 200  # cases that a process gets at a time
MORE_ADDRESSES = 4 << 30  # bytes of address space that a process may take for its cases
MOST_CHARACTERS = 2_000  # of an error's message


@dataclasses.dataclass(frozen=True)
class Options:
    """Options.

    Args:
      files: the number of damaged files of each kind, except exports.
      exports: the number of damaged exports, each read by the full `load`.
      seed: the number of the first case of each kind.
      jobs: the number of processes that read files.
      limit_s: the longest time that one file may take.
      limit_mb: the most memory that one file may take, in MB.
      case: a kind and a number: repeat only this case, and print what happens.
      json: write the counts and findings to this file.
    """

    files: int = 50_000
    exports: int = 2_000
    seed: int = 0
    jobs: int = 1
    limit_s: float = 10.0
    limit_mb: float = 100.0
    case: tuple[str, int] | None = None
    json: pathlib.Path | None = None

    def __post_init__(self):
        cli.check_above_zero(self, "jobs", "limit_s", "limit_mb")
        if self.case is not None:
            errors.check_name("kind of file", self.case[0], damaged_files.KINDS)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of one damaged file.

    Args:
      kind: the kind of file.
      case: the number of the case.
      result: "read", the name of a documented error, or "finding".
      finding: what went wrong, in words.
      seconds: the time that reading took.
    """

    kind: str
    case: int
    result: str
    finding: str = ""
    seconds: float = 0.0


def main() -> None:
    """The program."""
    options = cli.parse(Options, __doc__)
    if options.case is not None:
        with tempfile.TemporaryDirectory() as folder:
            kind, case = options.case
            outcome = read_case(DamagedFiles(pathlib.Path(folder)), kind, case, options, show=True)
        print(f"{outcome.result}, {1e3 * outcome.seconds:.1f} ms\n{outcome.finding}".rstrip())
        sys.exit(1 if outcome.finding else 0)
    counts = {kind: options.exports if kind == "exports" else options.files for kind in damaged_files.KINDS}
    results = {kind: collections.Counter[str]() for kind in counts}
    seconds, slowest = dict.fromkeys(counts, 0.0), dict.fromkeys(counts, 0.0)
    findings: list[Outcome] = []
    print(f"seed {options.seed}, {options.jobs} process(es): {', '.join(f'{n:,} {kind}' for kind, n in counts.items())}")
    began_s, interrupted = time.monotonic(), False
    outcomes = read_all(options, counts)
    try:
        note = lambda: f"{len(findings)} finding(s)"  # noqa: E731
        for outcome in progress.track(outcomes, "files", total=sum(counts.values()), note=note):
            results[outcome.kind][outcome.result] += 1
            seconds[outcome.kind] += outcome.seconds
            slowest[outcome.kind] = max(slowest[outcome.kind], outcome.seconds)
            if outcome.finding:
                findings.append(outcome)
                print(f"{outcome.kind} {outcome.case}: {outcome.finding}", flush=True)
    except KeyboardInterrupt:
        interrupted = True
    finally:
        outcomes.close()
    took_s = time.monotonic() - began_s
    lines = [["kind", "files", "read", "refused", "findings", "files/s", "slowest ms"]]
    for kind, found in results.items():
        refused = found.total() - found["read"] - found["finding"]
        counted = found.total(), found["read"], refused, found["finding"], round(found.total() / max(seconds[kind], 1e-9))
        lines.append([kind, *(f"{n:,}" for n in counted), f"{1e3 * slowest[kind]:.0f}"])
    cli.print_table(lines)
    read = sum(found.total() for found in results.values())
    print(f"seed {options.seed}: {read:,} files in {took_s:.0f} s{', interrupted' if interrupted else ''}")
    about = {"seed": options.seed, "seconds": took_s, "interrupted": interrupted, "results": results}
    cli.write_results(options.json, {**about, "findings": [dataclasses.asdict(f) for f in findings]})
    sys.exit(130 if interrupted else 1 if findings else 0)


# -- one case -----------------------------------------------------------------------------------------------------------------


def read_case(files: DamagedFiles, kind: str, case: int, options: Options, *, show: bool = False) -> Outcome:
    """Damages and reads the file of one case.

    Args:
      files: makes the damaged files.
      kind: the kind of file.
      case: the number of the case.
      options: the limits.
      show: whether to print the damaged file.
    """
    path, read = files.make(kind, case)
    if show:
        print(f"{path.name}: {path.read_bytes()[:4_000]!r}")
    before_kb, began_s = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    result, finding = "read", ""
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        warnings.filterwarnings("ignore", "coroutine .* was never awaited")  # Orbax drops tasks after damaged weights
        try:
            read()
        except damaged_files.DOCUMENTED[kind] as e:
            result, finding = type(e).__name__, flaw(str(e), files.folder)
            if show:
                print(e)
        except Exception:
            finding = traceback.format_exc()
    seconds = time.monotonic() - began_s
    taken_mb = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kb) / 1024
    if warned and not finding:
        finding = f"warned: {warned[0].message}"
    elif taken_mb > options.limit_mb and not finding:
        finding = f"took {taken_mb:.0f} MB of memory"
    elif seconds > options.limit_s and not finding:
        finding = f"took {seconds:.1f} s"
    files.mend()
    return Outcome(kind, case, "finding" if finding else result, finding, seconds)


def flaw(message: str, folder: pathlib.Path) -> str:
    """What is wrong with the message of a documented error about a file in `folder`; "" if nothing is."""
    if not message.isprintable():
        return f"a message that is not one printable line: {message!r:.500}"
    if len(message) > MOST_CHARACTERS:
        return f"a message of {len(message):,} characters: {message:.500}"
    if str(folder) not in message:
        return f"a message that does not name the file: {message}"
    return ""


# -- processes ----------------------------------------------------------------------------------------------------------------


class Reader:
    """A process that reads damaged files, and sends the outcome of each. It is started again after a crash.

    Args:
      folder: a folder for its files.
      options: the options.
    """

    def __init__(self, folder: pathlib.Path, options: Options):
        self.folder, self.options = folder, options
        self.kind, self.left = "", collections.deque[int]()  # the cases without an outcome yet
        self.start()

    def start(self) -> None:
        """Starts the process."""
        context = multiprocessing.get_context("spawn")
        self.pipe, end = context.Pipe()
        self.process = context.Process(target=read_files, args=(end, self.folder, self.options), daemon=True)
        self.process.start()
        end.close()
        self.pipe.recv()  # raises EOFError if the process cannot start

    def give(self, kind: str, cases: range) -> None:
        """Gives it cases to read."""
        self.kind, self.left = kind, collections.deque(cases)
        self.pipe.send((kind, list(self.left)))

    def outcome(self) -> Outcome:
        """The next outcome. After a crash, the process is started again for the other cases."""
        try:
            outcome = self.pipe.recv()
        except (EOFError, ConnectionResetError):
            self.process.join()
            said = (self.folder / "stderr").read_text(errors="replace").strip()
            finding = f"the process ended with status {self.process.exitcode}: {said[-3_000:]}"
            outcome = Outcome(self.kind, self.left[0], "finding", finding)
            self.start()
            self.pipe.send((self.kind, list(self.left)[1:]))
        self.left.popleft()
        return outcome


def read_all(options: Options, counts: dict[str, int]) -> Generator[Outcome]:
    """Yields the outcome of every case, read in `options.jobs` processes."""
    blocks = [
        (kind, range(first, min(first + BLOCK, options.seed + count)))
        for kind, count in counts.items()
        for first in range(options.seed, options.seed + count, BLOCK)
    ]
    with tempfile.TemporaryDirectory() as folder:
        readers = [Reader(pathlib.Path(folder, str(i)), options) for i in range(min(options.jobs, len(blocks)))]
        try:
            for reader in readers:
                reader.give(*blocks.pop(0))
            while busy := {reader.pipe: reader for reader in readers if reader.left}:
                for ready in wait(list(busy)):
                    reader = busy[ready]  # type: ignore[index]
                    yield reader.outcome()
                    if not reader.left and blocks:
                        reader.give(*blocks.pop(0))
        finally:
            for reader in readers:
                reader.process.kill()
                reader.process.join()


def read_files(pipe: Connection, folder: pathlib.Path, options: Options) -> None:
    """Runs in a process of its own: reads the files of cases, and sends each outcome."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    logging.disable()  # a profile of another device is ignored with a warning
    folder.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as own, (folder / "stderr").open("a") as said:
        os.dup2(said.fileno(), 2)  # Orbax writes much about damaged weights
        files = DamagedFiles(pathlib.Path(own))
        files.read_undamaged()  # the first reading imports modules and fills caches
        addresses = psutil.Process().memory_info().vms + MORE_ADDRESSES
        resource.setrlimit(resource.RLIMIT_AS, (addresses, addresses))
        faulthandler.enable(said)
        pipe.send("ready")
        while True:
            try:
                kind, cases = pipe.recv()
            except EOFError:
                return
            gc.collect()
            os.truncate(said.fileno(), 0)
            for case in cases:
                faulthandler.dump_traceback_later(2 * options.limit_s, exit=True, file=said)
                outcome = read_case(files, kind, case, options)
                faulthandler.cancel_dump_traceback_later()
                pipe.send(outcome)


if __name__ == "__main__":
    cli.run(main)
