"""How a judge that cannot be loaded is reported."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from nestpatch.errors import CheckpointError, JudgeError, MissingExtraError


@contextmanager
def explained(name: str) -> Iterator[None]:
    """Names the judge in what is raised while it is loaded.

    Args:
        name: As the user gave it.

    Raises:
        JudgeError: For an error of the model.
        MissingExtraError: For a module that is not installed.
    """
    try:
        yield
    except (CheckpointError, JudgeError) as error:
        raise JudgeError(f"the judge {name} cannot be used: {error}", advice=error.advice) from error
    except ModuleNotFoundError as error:
        raise MissingExtraError("train", f"the judge {name}", instead="use the judge keywords") from error
