"""Packages import only what the table below allows. The test reads the import statements.

docs/architecture.md shows the same table. Change both together, and say why in the commit.
"""

import ast
import graphlib
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "superserve_jax"

# Every module may also import dtypes, errors, files and foreign. A name with a dot allows only that module.
ALLOWED = {
    **dict.fromkeys(("dtypes", "errors", "files", "foreign", "shipped", "subnet", "lengths"), ()),
    **dict.fromkeys(("cli", "progress", "plots", "machine", "ops", "image_files"), ()),
    "manifest": ("shipped",),
    "space": ("subnet",),
    "vocabulary": ("subnet",),
    "profile": ("subnet", "lengths"),
    "scheduling": ("profile", "subnet", "lengths"),
    "simulation": ("scheduling", "profile", "subnet", "lengths"),
    "experiments": ("simulation", "scheduling", "profile", "subnet", "plots", "progress"),
    "layers": ("ops",),
    "supernets": ("ops", "layers", "subnet", "space", "vocabulary"),
    "tracing": ("ops", "layers", "supernets", "subnet", "space"),
    "families": ("ops", "layers", "supernets", "tracing", "subnet", "space", "lengths", "vocabulary"),
    "exports": ("families", "supernets", "subnet", "space", "vocabulary", "manifest"),
    "convert": ("exports", "families", "supernets", "subnet", "space", "vocabulary", "manifest"),
    "extract": ("exports", "families", "supernets", "ops"),
    "training": (
        "exports",
        "families",
        "supernets",
        "subnet",
        "space",
        "vocabulary",
        "machine",
        "manifest",
        "plots",
        "progress",
        "shipped",
        "image_files",
    ),
    "engines": (
        *("exports", "families", "supernets", "ops", "layers"),
        *("profile", "subnet", "lengths", "machine", "manifest", "progress"),
    ),
    "serving": (
        *("scheduling", "profile", "subnet", "lengths", "manifest", "image_files"),
        *("engines.base", "engines.fake"),
    ),
    "loadtest": (
        *("serving", "simulation", "scheduling", "engines.base", "engines.fake"),
        *("profile", "subnet", "lengths"),
    ),
    "remote": (
        *("serving", "simulation", "scheduling", "engines.base"),
        *("profile", "subnet", "lengths", "manifest", "image_files"),
    ),
    "scaling": ("serving", "simulation", "scheduling", "profile"),
    "gateway": (
        *("serving", "profile", "subnet", "lengths", "vocabulary", "manifest"),
        *("loadtest.loadgen", "simulation.traces"),  # for the demo's traffic
    ),
    "commands": (
        *("cli", "convert", "engines", "experiments", "exports", "extract", "families", "gateway", "lengths", "loadtest"),
        *("machine", "manifest"),
        *("plots", "profile", "progress", "scheduling", "serving", "shipped", "simulation", "subnet", "training"),
    ),
}
# These packages and modules work in a process that has no jax.
NO_JAX = (
    *("dtypes", "errors", "files", "foreign", "shipped", "subnet", "space", "lengths", "vocabulary", "manifest", "profile"),
    *("cli", "progress", "plots", "machine", "image_files"),
    *("scheduling", "simulation", "experiments", "serving", "loadtest", "scaling", "gateway", "remote"),
    *("engines", "engines.base", "engines.fake", "engines.subnet_buckets", "engines.profiling"),
)
BLOCKED = ["jax", "jaxlib", "flax", "tensorflow", "tensorflow_datasets"]
# Imports inside functions are for optional libraries and for modules that would load jax too early.
LATE = {
    "__init__": ("superserve_jax",),
    "cli": ("rich",),
    "progress": ("rich",),
    "plots": ("matplotlib",),
    "vocabulary": ("tokenizers",),
    "convert": ("safetensors", "torch"),
    "extract": ("onnx", "onnxruntime", "safetensors"),
    "scheduling": ("scipy",),
    "simulation": ("scipy",),
    "training": ("pyarrow", "sklearn", "tensorboardX", "tensorflow_datasets", "PIL", "importlib_resources", "wandb"),
    "serving": ("prometheus_client", "superserve_jax.engines.prepare", "superserve_jax.image_files"),
    "commands": ("superserve_jax.gateway",),
    "remote": ("ray", "superserve_jax.image_files", "superserve_jax.remote.maker"),
    "gateway": ("opentelemetry", "superserve_jax.gateway.demo"),
}


def module_name(path):
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def names_of(node):
    """Full names of the modules that an import statement imports."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    assert node.level == 0, "an import is relative"
    names = (f"{node.module}.{alias.name}" for alias in node.names)
    return [name if name.removeprefix("superserve_jax.") in MODULES else node.module for name in names]


def imports(path):
    """(name, whether it is inside a function) of every import. Imports under TYPE_CHECKING do not count."""
    found = []

    def visit(node, late):
        if isinstance(node, ast.Import | ast.ImportFrom):
            found.extend((name, late) for name in names_of(node))
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            return
        late = late or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            visit(child, late)

    visit(ast.parse(path.read_text()), False)
    return found


IMPORTS = {name: imports(path) for name, path in MODULES.items()}


def inner(name):
    """The name without "superserve_jax.". None if the name belongs to another library."""
    return name.removeprefix("superserve_jax.") if name.startswith("superserve_jax.") else None


def is_in(name, prefixes):
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes)


def test_every_package_is_in_the_table():
    assert {name.split(".")[0] for name in MODULES} == {*ALLOWED, "__init__"}


@pytest.mark.parametrize("name", sorted(MODULES))
def test_a_module_imports_what_the_tables_allow(name):
    top = name.split(".")[0]
    for target, late in IMPORTS[name]:
        if late:
            assert is_in(target, LATE.get(top, ())), f"a function of {name} imports {target}"
        elif (module := inner(target)) is not None and name != "__init__":
            assert is_in(module, (top, "dtypes", "errors", "files", "foreign", *ALLOWED[top])), f"{name} imports {module}"
        assert target.split(".")[0] not in ("train", "serve", "configs"), f"{name} imports the program {target}"


def test_no_modules_import_each_other():
    early = {name: {inner(target) for target, late in found if not late} for name, found in IMPORTS.items()}
    graphlib.TopologicalSorter(
        {name: targets - {name} for name, targets in early.items()}
    ).prepare()  # its error names a cycle


@pytest.mark.parametrize("package", NO_JAX)
def test_a_package_works_without_jax(package):
    names = [name for name in MODULES if name == package or (package != "engines" and name.startswith(f"{package}."))]
    code = (
        "import importlib, sys\n"
        f"sys.modules.update(dict.fromkeys({BLOCKED}))\n"  # importing one of them fails
        f"for name in {names}: importlib.import_module('superserve_jax.' + name)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_no_file_in_a_folder_of_programs_shadows_a_standard_module():
    folders = {path.parent for folder in ("train", "serve", "configs") for path in (ROOT / folder).rglob("*.py")}
    found = {path for folder in folders for path in folder.glob("*.py") if path.stem in sys.stdlib_module_names}
    assert not found
