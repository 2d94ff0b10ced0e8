"""A teacher for distillation: the largest subnet of another SuperNet, own or converted."""

import os
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from superserve_jax import errors, exports
from superserve_jax.supernets import programs
from superserve_jax.supernets.programs import Params, Program
from superserve_jax.training import step
from superserve_jax.training.runs import Run
from superserve_jax.training.step import Lesson, Recipe


class Teacher(NamedTuple):
    """A network that is asked about every batch: the program of the largest subnet, its parameters and statistics."""

    program: Program
    params: Params
    row: np.ndarray

    def __call__(self, recipe: Recipe, inputs: Any) -> Lesson:
        """What it says of a batch."""
        return step.lesson(self.program, recipe, dict(self.params), inputs, jnp.asarray(self.row))


def load(path: str | os.PathLike[str], student: Any) -> Teacher:
    """The teacher in a run's folder or an export.

    Args:
      path: the folder.
      student: the family's config of the SuperNet to teach.

    Raises:
      ConfigError: it is neither, or of other inputs or classes. NotCalibratedError: its largest subnet has no statistics.
    """
    path = pathlib.Path(path)
    if not path.is_dir():
        raise errors.ConfigError(f"distill.teacher: there is no folder {path}; give that of a run or of an export")
    model = Run.open(path).model() if (path / "config.json").is_file() else exports.load(path)
    config, largest = model.config, model.space.largest()
    for what, theirs, ours in (
        ("inputs", config.input_spec(1), student.input_spec(1)),
        ("num_classes", config.num_classes, student.num_classes),
        *((name, getattr(config, name, None), getattr(student, name, None)) for name in ("vocab_size", "pad_id")),
    ):
        if theirs != ours:
            raise errors.ConfigError(f"distill.teacher: {path} has {what} {theirs}, the SuperNet to train has {ours}")
    return Teacher(programs.sliced(config, largest), model.params, model.statistics_of(largest))


def check_hidden(recipe: Recipe, student: Any, teacher: Teacher | None) -> None:
    """Raises ConfigError where hidden states are asked for and student or teacher cannot give fitting ones."""
    if not recipe.hidden_weight:
        return
    shapes = _hidden_shapes(student)
    if not shapes:
        raise errors.ConfigError(
            f"distill.hidden is {recipe.hidden_weight}, but the hidden states of family '{student.family}' have not one shape "
            f"in all subnets; set it to 0"
        )
    if teacher is not None and (theirs := _hidden_shapes(teacher.program.config)) != shapes:
        raise errors.ConfigError(
            f"distill.hidden needs a teacher whose hidden states have the student's shapes: it has {len(theirs)} of "
            f"{theirs[:1]}, the student {len(shapes)} of {shapes[:1]}; set it to 0 or choose another teacher"
        )


def _hidden_shapes(config: Any) -> list[tuple[int, ...]]:
    program = programs.sliced(config, config.space().largest())
    arguments = programs.param_spec(config), config.input_spec(1), jax.ShapeDtypeStruct((0,), jnp.int32)
    return [state.shape for _, state in jax.eval_shape(program.train_hidden, *arguments)[1]]
