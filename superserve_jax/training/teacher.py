"""An outside teacher for distillation: the largest subnet of another run or export."""

import os
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from superserve_jax import errors, exports, files, manifest
from superserve_jax.supernets import programs
from superserve_jax.supernets.family import FamilyConfig, SequenceConfig
from superserve_jax.supernets.programs import Params, Program
from superserve_jax.training import step
from superserve_jax.training.data import fingerprints
from superserve_jax.training.runs import Run
from superserve_jax.training.step import Lesson, Recipe


class Teacher(NamedTuple):
    """An outside teacher: the program of its largest subnet, with parameters and statistics."""

    program: Program
    params: Params
    statistics: np.ndarray

    def __call__(self, recipe: Recipe, inputs: jax.Array) -> Lesson:
        """The teacher's output for a batch."""
        return step.lesson(self.program, recipe, dict(self.params), inputs, jnp.asarray(self.statistics))


def fingerprint(teacher: Teacher) -> str:
    """The SHA-256 of a teacher's parameters and statistics."""
    params = (np.asarray(teacher.params[name]) for name in sorted(teacher.params))
    return fingerprints.sha256([*params, teacher.statistics])


def load(path: str | os.PathLike[str], student: FamilyConfig) -> Teacher:
    """The teacher in a run's folder or an export.

    Args:
      path: the folder.
      student: the family's config of the SuperNet to teach.

    Raises:
      ConfigError: the folder is neither, or its network has other inputs or classes than the student.
      NotCalibratedError: the teacher's largest subnet has no statistics.
    """
    path = files.user_path(path)
    if not path.is_dir():
        raise errors.ConfigError(f"distill.teacher: there is no folder {path}; give the folder of a run or an export")
    model = Run.open(path).model() if manifest.is_run(path) else exports.load(path)
    config, largest = model.config, model.space.largest()
    theirs, ours = _interface(config), _interface(student)
    for what in theirs:
        if theirs[what] != ours.get(what):
            raise errors.ConfigError(
                f"distill.teacher: {path} has {what} {theirs[what]}, the SuperNet to train has {ours.get(what)}"
            )
    return Teacher(programs.sliced(config, largest), model.params, model.statistics_of(largest))


def check_hidden(recipe: Recipe, student: FamilyConfig, teacher: Teacher | None) -> None:
    """Raises ConfigError if the recipe needs hidden states, but student and teacher have none of equal shapes."""
    if not recipe.hidden_weight:
        return
    shapes = _hidden_shapes(student)
    if not shapes:
        raise errors.ConfigError(
            f"distill.hidden is {recipe.hidden_weight}, but family '{student.family}' has no hidden states of one shape; "
            f"set it to 0"
        )
    if teacher is not None and (theirs := _hidden_shapes(teacher.program.config)) != shapes:
        raise errors.ConfigError(
            f"distill.hidden needs a teacher whose hidden states have the student's shapes: it has {len(theirs)} of "
            f"{theirs[:1]}, the student {len(shapes)} of {shapes[:1]}; set it to 0 or choose another teacher"
        )


def _interface(config: FamilyConfig) -> dict[str, object]:
    """What a teacher and its student must have in common."""
    sequence = {"vocab_size": config.vocab_size, "pad_id": config.pad_id} if isinstance(config, SequenceConfig) else {}
    return {"inputs": config.input_spec(1), "num_classes": config.num_classes, **sequence}


def _hidden_shapes(config: FamilyConfig) -> list[tuple[int, ...]]:
    program = programs.sliced(config, config.space().largest())
    arguments = programs.param_spec(config), config.input_spec(1), jax.ShapeDtypeStruct((0,), jnp.int32)
    return [state.shape for _, state in jax.eval_shape(program.train_hidden, *arguments)[1]]
