"""Errors of engines and policies, made safe to keep. No jax."""

from typing import NamedTuple

from superserve_jax import errors


class Failure(NamedTuple):
    """An error of an engine or a policy, and its `repr`.

    The text is made once, where the error is caught. No lock is held there, since `repr` may run foreign code.

    >>> Failure.of(ValueError("no")).text
    "ValueError('no')"
    """

    error: BaseException
    text: str

    @classmethod
    def of(cls, error: BaseException) -> "Failure":
        """Makes the failure of an error, even if its `repr` raises."""
        try:
            return cls(error, repr(error))
        except Exception:
            return cls(error, f"{type(error).__name__} (its repr fails)")

    @property
    def out_of_memory(self) -> bool:
        """Whether an engine failed because the batch was too large for its device.

        >>> Failure.of(RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.")).out_of_memory
        True
        """
        # jax.errors.JaxRuntimeError is a RuntimeError whose text starts with the status code.
        return isinstance(self.error, MemoryError) or (
            isinstance(self.error, RuntimeError) and "RESOURCE_EXHAUSTED" in self.text
        )

    def forget_frames(self) -> None:
        """Drops the tracebacks of the error and of its causes.

        Otherwise a client that keeps the error keeps their frames, and with them the engine and its device's memory.
        """
        error, seen = self.error, set[int]()  # an error may be its own cause
        while error is not None and id(error) not in seen:
            seen.add(id(error))
            error.__traceback__ = None
            error = error.__cause__ or error.__context__

    def cause(self, error: errors.SuperServeError) -> errors.SuperServeError:
        """Returns `error` with this failure's error as its `__cause__`."""
        error.__cause__ = self.error
        return error
