"""Questions about the optimizer, answered by measurements. See README.md."""

import sys
from types import TracebackType


def _say_what_is_missing(
    kind: type[BaseException], error: BaseException, traceback: TracebackType | None
) -> None:
    if (
        isinstance(error, ModuleNotFoundError)
        and error.name
        and error.name.split(".")[0] not in ("benchmarks", "examples")
    ):
        print(
            f"The package {error.name!r} is not installed. The benchmarks need pip install -e '.[demo]'",
            file=sys.stderr,
        )
    else:
        sys.__excepthook__(kind, error, traceback)


if sys.argv[0] == "-m":  # run as a program, python -m benchmarks.…
    sys.excepthook = _say_what_is_missing
