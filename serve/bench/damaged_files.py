"""The files of serve/bench/fuzz.py: makes valid ones, damages one, reads it, and checks the result."""

import json
import pathlib
import random
from collections.abc import Callable, Mapping
from typing import Any

import jax
import mutations
import numpy as np

import superserve_jax as ss
from superserve_jax import errors, exports, files, machine
from superserve_jax.engines import executables, prepare
from superserve_jax.exports import Model, Served, statistics
from superserve_jax.families.dynabert import DynaBERTConfig
from superserve_jax.families.ofa_resnet import OFAResNetConfig
from superserve_jax.manifest import MANIFEST_NAME
from superserve_jax.profile import Profile, Row
from superserve_jax.scheduling import policies
from superserve_jax.simulation import azure, recorded, simulator
from superserve_jax.simulation.paper_profile import paper_profile
from superserve_jax.simulation.traces import Trace
from superserve_jax.supernets import programs
from superserve_jax.supernets.family import FamilyConfig
from superserve_jax.supernets.supernet import SuperNet
from superserve_jax.vocabulary import Vocabulary

DOCUMENTED: Mapping[str, type[Exception]] = {
    "manifests": errors.ExportError,
    "profiles": errors.ProfileError,
    "statistics": errors.ExportError,
    "traces": errors.DataError,
    "exports": errors.ExportError,
}
"""The documented error of each kind of file."""

KINDS = tuple(DOCUMENTED)

IMAGES = OFAResNetConfig(
    num_classes=2,
    image_size=4,
    channels=1,
    block="basic",
    stem_width=4,
    stem_pool=False,
    stem_depths=(1,),
    stage_widths=(4,),
    strides=(1,),
    depths=((0, 1),),
    expand_ratios=(0.5, 1.0),
    width_mults=(1.0,),
    divisor=4,
    mean=(0.4,),
    std=(0.3,),
)
TEXTS = DynaBERTConfig(
    num_classes=2, vocab_size=9, max_length=4, token_types=1, hidden_size=4, depths=(1,), heads=(1,), ffn=(2, 4)
)
WORDS = Vocabulary(("[PAD]", "[CLS]", "a", "b", "é"), scheme="words")
BATCH_SIZES = (1, 2, 4)
MOST_CHARACTERS = 1_000_000  # of damaged JSON; a part that is repeated 50 times, three times, would take 100 MB
ARRIVALS = "arrival_s,slo_ms,floor,length\n0.5,36,0,3\n0.25,36,0.75,12\n1.75,100,0.5,7\n2,20,0,0\n"
INVOCATIONS = (
    "HashOwner,HashApp,HashFunction,Trigger,1,2,3,4\na,b,c,http,0,7,12,3\na,b,d,timer,1,1,1,1\ne,f,g,queue,0,,0,250\n"
)
TRACE = Trace(np.linspace(0, 0.1, 20), slo_ms=np.geomspace(1, 1_000, 20), lengths=np.arange(20) % 5)

Read = Callable[[], None]


class DamagedFiles:
    """Valid files in a folder, and one damaged file at a time. The same kind and number give the same damage.

    The times and the random names of files in an export differ from run to run, so digests and a few results do, too.

    Args:
      folder: an empty folder.
    """

    def __init__(self, folder: pathlib.Path):
        self.folder, self.undamaged = folder, dict[pathlib.Path, bytes]()
        self.device_kind = machine.device_kind(jax.devices()[0])
        self.models = [self._export("images", IMAGES, None), self._export("texts", TEXTS, WORDS)]
        for name, text in (("arrivals.csv", ARRIVALS), ("invocations.csv", INVOCATIONS)):
            (folder / name).write_text(text)

    def make(self, kind: str, case: int) -> tuple[pathlib.Path, Read]:
        """Damages a file. Returns its path, and the function that reads it and checks the value."""
        return getattr(self, f"_{kind}")(random.Random(f"{kind} {case}"))

    def read_undamaged(self) -> None:
        """Reads files of each kind without any damage, except manifests, which have no payload."""
        for kind in KINDS[1:]:
            for case in range(10):
                _, read = self.make(kind, case)
                self.mend()
                read()

    def mend(self) -> None:
        """Undoes the damage."""
        for path, content in self.undamaged.items():
            path.write_bytes(content)
        self.undamaged.clear()

    def _export(self, name: str, config: FamilyConfig, words: Vocabulary | None) -> Model:
        """A tiny export with two subnets and a profile."""
        space = config.space()
        chosen = [space.smallest(), space.largest()]
        rng = np.random.default_rng(0)
        params = {k: rng.normal(1.0, 0.1, v.shape).astype(np.float32) for k, v in programs.param_spec(config).items()}
        ones = {s: np.ones((2, programs.sliced(config, s).statistics_size), np.float32) for s in chosen}
        served = [Served(s, 0.5 + 0.25 * i, None, config.flops(s), config.num_params(s)) for i, s in enumerate(chosen)]
        model = SuperNet(config, params, ones)
        path = exports.export(self.folder / name, model, served, measured="made up", vocabulary=words, training={"lr": 1e-5})
        rows = tuple(
            Row(s.subnet, s.known_accuracy, (0.1 + i, 2.0 + i, 3.5 + i), envelope=chosen[1]) for i, s in enumerate(served)
        )
        at = dict.fromkeys(prepare.check_lengths(config, (2, 4)), rows) if words else {}
        profile = Profile(BATCH_SIZES, rows, self.device_kind, at)
        profile.save(exports.profile_path(path, self.device_kind))
        return ss.load(path)

    def _write(self, path: pathlib.Path, content: bytes) -> None:
        self.undamaged.setdefault(path, path.read_bytes())
        path.write_bytes(content)

    # -- one file of each kind ------------------------------------------------------------------------------------------------

    def _manifests(self, rng: random.Random) -> tuple[pathlib.Path, Read]:
        """A manifest, read by `load` in a folder without a payload. So a manifest without any flaw is refused, too."""
        model = rng.choice(self.models)
        path = self.folder / "manifest" / MANIFEST_NAME
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(self._damaged_json(rng, (model.path / MANIFEST_NAME).read_bytes()))
        return path, lambda: self._check_model(ss.load(path.parent))

    def _profiles(self, rng: random.Random) -> tuple[pathlib.Path, Read]:
        """A profile beside its export, read as by a server."""
        model = rng.choice(self.models)
        path = exports.profile_path(model.path, self.device_kind)
        self._write(path, self._damaged_json(rng, path.read_bytes()))
        policy = rng.choice(policies.NAMES)
        return path, lambda: self._check_profile(model, path, policy)

    def _statistics(self, rng: random.Random) -> tuple[pathlib.Path, Read]:
        model = rng.choice(self.models)
        path = self._payload(model) / "statistics.npz"
        self._write(path, mutations.npz_file(rng, path.read_bytes()))
        return path, lambda: _check_statistics(model.config, statistics.read(path, model.config))

    def _traces(self, rng: random.Random) -> tuple[pathlib.Path, Read]:
        path = self.folder / rng.choice(("arrivals.csv", "invocations.csv"))
        self._write(path, mutations.csv_file(rng, path.read_bytes()))
        return path, lambda: (_check_arrivals if path.stem == "arrivals" else _check_invocations)(path)

    def _exports(self, rng: random.Random) -> tuple[pathlib.Path, Read]:
        """An export with damage in any one of its files. In half of the cases its digests fit."""
        model = rng.choice(self.models)
        manifest = model.path / MANIFEST_NAME
        content = manifest.read_bytes()
        if rng.random() < 0.3:
            self._write(manifest, self._damaged_json(rng, content))
            return manifest, lambda: self._check_model(ss.load(model.path))
        values, payload = json.loads(content), self._payload(model)
        path = payload / rng.choice(sorted(values["files"], key=lambda name: values["files"][name]["bytes"]))
        damage = mutations.npz_file if path.suffix == ".npz" and rng.random() < 0.8 else mutations.any_bytes
        self._write(path, damage(rng, path.read_bytes()))
        if rng.random() < 0.5:
            values["files"][str(path.relative_to(payload))] = {"bytes": path.stat().st_size, "sha256": files.sha256(path)}
            self._write(manifest, json.dumps(values | {"sha256": files.digest(values)}).encode())
        return path, lambda: self._check_model(ss.load(model.path))

    def _payload(self, model: Model) -> pathlib.Path:
        return model.path / model.manifest["payload"]

    @staticmethod
    def _damaged_json(rng: random.Random, content: bytes) -> bytes:
        """Damaged JSON. In most cases, its values change, and its digest fits or is missing."""
        values = json.loads(content)
        changed = mutations.json_value(rng, values)
        try:
            if isinstance(changed, dict) and rng.random() < 0.8:
                changed["sha256"] = files.digest(changed)
            elif isinstance(changed, dict) and rng.random() < 0.5:
                changed.pop("sha256", None)
            text = json.dumps(changed if rng.random() < 0.8 else values)
        except (RecursionError, TypeError, ValueError):  # nested too deep, keys of several kinds, or too large a number
            text = ""
        text = text if 0 < len(text) < MOST_CHARACTERS else content.decode()
        return mutations.json_text(rng, text) if rng.random() < 0.25 else text.encode()

    # -- checks of what was read ----------------------------------------------------------------------------------------------

    def _check_model(self, model: Model) -> None:
        """Checks that a loaded export is complete."""
        assert model.served
        assert all(0 <= s.known_accuracy <= 1 for s in model.served)
        assert [model.space.validate(s) for s in model.subnets] == list(model.subnets)
        assert all(isinstance(name, str) for name in (*model.class_names, *model.vocabulary))
        spec = programs.param_spec(model.config)
        assert {k: (v.shape, v.dtype) for k, v in model.params.items()} == {k: (v.shape, v.dtype) for k, v in spec.items()}
        assert all(np.isfinite(v).all() for v in (*map(np.asarray, model.params.values()), *model.statistics.values()))
        _check_statistics(model.config, model.statistics)
        json.dumps(model.manifest)

    def _check_profile(self, model: Model, path: pathlib.Path, policy: str) -> None:
        """Checks that an engine can use a profile, and simulates a server with it."""
        whole = Profile.load(path)
        assert Profile.from_json(json.loads(json.dumps(whole.to_json()))) == whole
        profile = prepare.stored_profile(model, self.device_kind, whole.batch_sizes, whole.lengths)
        if profile is None:
            return
        limits = model.config.sizes(model.space.largest())
        for program in set(executables.bucket_programs(model.config, model.subnets, profile.envelopes).values()):
            assert all(size <= limits[name] for name, size in program.limits.items())
        spec = executables.input_spec(model.config, profile.max_batch, profile.lengths[-1] if profile.lengths else 0)
        assert all(size > 0 for size in spec.shape)
        _simulate(profile.pareto(min_accuracy_gap=0.01).monotone(), policy, TRACE)


def _check_statistics(config: FamilyConfig, found: Mapping[Any, np.ndarray]) -> None:
    sizes = {s: sum(config.norm_sizes(config.sizes(config.space().validate(s))).values()) for s in found}
    assert all(v.shape == (2, sizes[s]) and v.dtype == np.float32 for s, v in found.items())


def _simulate(profile: Profile, policy: str, trace: Trace) -> None:
    """Simulates a server for the first 100 queries of a trace, and checks that it answers all."""
    slos, floors, lengths = (np.broadcast_to(v, len(trace))[:100] for v in (trace.slo_ms, trace.floors, trace.lengths))
    floors = np.minimum(floors, profile.rows[-1].accuracy)
    found = simulator.simulate(profile, policy, Trace(trace.arrivals_s[:100], slos, floors, lengths=lengths))
    assert np.isfinite(found.finish_s).all()
    assert 0 <= found.attainment <= 1


def _check_arrivals(path: pathlib.Path) -> None:
    trace = recorded.trace(path, quiet=True)
    assert np.isfinite(trace.deadlines_s).all()
    assert (np.diff(trace.arrivals_s) >= 0).all()
    assert (np.asarray(trace.lengths) >= 0).all()
    assert np.isfinite(trace.mean_qps)
    if len(trace):
        _simulate(paper_profile(), "slackfit", trace)


def _check_invocations(path: pathlib.Path) -> None:
    minutes = azure.invocations_per_minute(path)
    assert minutes.dtype == np.int64
    assert len(minutes) > 0
    assert (minutes >= 0).all()
    assert len(azure.trace(path, mean_qps=50.0, duration_s=1.0)) == 50
