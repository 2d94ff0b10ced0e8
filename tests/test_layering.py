"""Each layer imports only what stands above it (in this list), found by reading the import statements."""

import ast
import pathlib
import subprocess
import sys

import pytest

PACKAGE = pathlib.Path(__file__).parent.parent / "superserve_jax"
LAYERS = [
    ["errors", "files"],
    ["manifest"],
    ["subnet", "plots", "progress", "cli", "vocabulary"],
    ["ops", "compiling"],
    ["layers"],
    ["supernets"],
    ["profile", "rows"],
    ["checkpoint"],
    ["convert"],
    ["training", "serving"],
]
NO_JAX = (
    ["errors", "files", "manifest", "subnet", "rows", "profile", "plots", "progress", "cli", "vocabulary"]
    + [
        f"serving.{name}"
        for name in ("queue", "policies", "traces", "azure", "simulator", "bounds", "reference", "metrics", "engine")
    ]
    + [
        f"serving.{name}"
        for name in (
            "futures",
            "query",
            "retries",
            "telemetry",
            "prometheus",
            "crew",
            "roster",
            "failing",
            "tuning",
            "workers",
            "swap",
            "server",
            "runtime",
            "measuring",
            "loadgen",
            "dispatch",
            "admission",
            "padding",
            "subnet_buckets",
        )
    ]
    + [f"serving.{name}" for name in ("experiments", "evaluation", "readings", "findings", "figures", "fidelity", "faults")]
    + [f"serving.{name}" for name in ("stress", "endurance")]
)


def modules():
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if name:
            yield name, path


def imports(path, *, at_import_time=False):
    """Full names of what a file imports; without functions' own imports where `at_import_time`."""
    tree = ast.parse(path.read_text())
    nodes = ast.walk(tree) if not at_import_time else (n for n in ast.iter_child_nodes(tree))
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path} imports relatively"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def layer_of(name):
    top = name.split(".")[0]
    return next(i for i, layer in enumerate(LAYERS) if top in layer)


MODULES = dict(modules())


def test_every_module_belongs_to_a_layer():
    assert {name.split(".")[0] for name in MODULES} == {top for layer in LAYERS for top in layer}


@pytest.mark.parametrize("name", sorted(MODULES))
def test_a_module_imports_only_from_its_own_layer_or_above(name):
    for target in imports(MODULES[name]):
        if not target.startswith("superserve_jax."):
            continue
        inner = target.removeprefix("superserve_jax.")
        if inner.split(".")[0] == name.split(".")[0]:
            continue
        assert layer_of(inner) < layer_of(name), f"{name} imports {inner}"


def test_training_and_serving_never_import_each_other():
    for name, path in MODULES.items():
        for one, other in (("training", "serving"), ("serving", "training")):
            if name.split(".")[0] == one:
                assert not [t for t in imports(path) if t.startswith(f"superserve_jax.{other}")], name


def test_nothing_in_the_library_imports_a_program():
    assert not [
        (name, t) for name, path in MODULES.items() for t in imports(path) if t.split(".")[0] in ("train", "serve", "configs")
    ]


@pytest.mark.parametrize("name", NO_JAX)
def test_this_module_works_without_jax(name):
    code = (
        f"import sys, superserve_jax.{name}\n"
        "found = sorted(m for m in sys.modules if m.split('.')[0] in ('jax', 'jaxlib', 'flax', 'tensorflow'))\n"
        "assert not found, found[:3]"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_importing_the_package_is_light_and_touches_no_device():
    code = "import sys, superserve_jax; assert not {'jax', 'tensorflow_datasets'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_no_program_carries_the_name_of_a_standard_module():
    root = PACKAGE.parent
    names = {p.stem for folder in ("train", "serve") for p in (root / folder).glob("*.py")}
    assert not names & set(sys.stdlib_module_names)
