"""Modules are short, imports keep their names, and configs have types."""

import ast
import collections
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1]
FOLDERS = ("superserve_jax", "train", "serve", "configs", "tests")
TEXTS = {
    str(path.relative_to(ROOT)): path.read_text()
    for folder in FOLDERS
    for path in sorted((ROOT / folder).rglob("*.py"))
    if path.parent != ROOT / "tests" / "data"  # programs for other versions and libraries
}
LINES = {name: len(text.splitlines()) for name, text in TEXTS.items()}
LIBRARY = [name for name in TEXTS if name.startswith("superserve_jax/")]
ALIASES = {"np", "jnp", "ss", "tfds", "ocp", "st", "plt", "npt"}


@pytest.fixture(scope="module")
def trees():
    """The syntax trees by file. They go away with this file's tests, or every later garbage collection would visit them.

    They are a million objects, and many tests collect garbage.
    """
    return {name: ast.parse(text) for name, text in TEXTS.items()}


def nodes(tree, *kinds):
    return [node for node in ast.walk(tree) if isinstance(node, kinds)]


def test_no_module_has_more_than_400_lines():
    assert not {name: count for name, count in LINES.items() if count > 400}


def test_a_module_of_more_than_300_lines_says_why_it_is_one_file(trees):
    """The first eight lines of its docstring say "One file because" or "One class, because", and the reason."""
    first = {name: " ".join((ast.get_docstring(tree) or "").splitlines()[:8]) for name, tree in trees.items()}
    reason = re.compile(r"\bone \w+,? because \w+", re.IGNORECASE)
    assert not [name for name, count in LINES.items() if count > 300 and not reason.search(first[name])]


def test_no_package_has_more_than_a_quarter_of_the_library():
    """The data and the datasets of training count as a package of their own."""
    sizes = collections.Counter()
    for name in LIBRARY:
        _, *folders, _ = pathlib.PurePath(name).parts
        data = folders[:1] == ["training"] and folders[1:2] in (["data"], ["datasets"])
        sizes["training's data" if data else "".join(folders[:1])] += LINES[name]
    assert max(sizes.values()) <= sum(sizes.values()) / 4, sizes


def test_imports_have_no_other_aliases_than_the_usual_ones(trees):
    names = (
        (name, a.asname)
        for name, tree in trees.items()
        for node in nodes(tree, ast.Import, ast.ImportFrom)
        for a in node.names
    )
    assert not [(name, alias) for name, alias in names if alias is not None and alias not in ALIASES]


def test_every_config_has_a_type(trees):
    """With a type, pyright and the reader can check how a config is used."""
    arguments = (
        (name, node.arg, node.annotation) for name in LIBRARY for node in nodes(trees[name], ast.arg) if node.annotation
    )
    fields = (
        (name, ast.unparse(node.target), node.annotation) for name in LIBRARY for node in nodes(trees[name], ast.AnnAssign)
    )
    declared = [(name, of.removeprefix("self."), ast.unparse(kind)) for name, of, kind in (*arguments, *fields)]
    assert not [name for name, of, kind in declared if of == "config" and kind == "Any"]


def test_no_config_is_probed(trees):
    """`hasattr`, and `getattr` with a default, ask whether a config has a field. Its type should tell."""
    calls = ((name, ast.unparse(node.func), node.args) for name in LIBRARY for node in nodes(trees[name], ast.Call))
    probed = [(name, ast.unparse(args[0])) for name, f, args in calls if f == "hasattr" or (f == "getattr" and len(args) == 3)]
    assert not [(name, of) for name, of in probed if re.fullmatch(r"(.*\.)?config|self\.model", of)]
