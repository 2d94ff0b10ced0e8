"""What comes with the package: configs by name, and a small trained export. Works without jax.

The configs are the files of configs/ in the repository, which the wheel holds as shipped/configs/. The export `digits` is the
demo's SuperNet with six subnets, so that a server starts in half a minute. `make shipped` trains and exports it again.
"""

import pathlib

_HERE = pathlib.Path(__file__).parent


def configs() -> dict[str, pathlib.Path]:
    """The file of each config, by its name.

    >>> sorted(configs())[:2]
    ['debug', 'digits_resnet']
    """
    folders = _HERE / "configs", _HERE.parents[1] / "configs"  # in a wheel, in the repository
    folder = next((folder for folder in folders if folder.is_dir()), _HERE)
    return {path.stem: path for path in sorted(folder.glob("[!_]*.py"))}


def exports() -> dict[str, pathlib.Path]:
    """The directory of each export, by its name.

    >>> list(exports())
    ['digits']
    """
    return {path.parent.name: path.parent for path in sorted(_HERE.glob("*/manifest.json"))}
