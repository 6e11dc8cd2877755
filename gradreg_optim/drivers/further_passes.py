"""The driver of a trainer, which has run the first pass already and repeats its recorded micro-batches."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from typing import Any

from gradreg_optim.core.plan import Plan
from gradreg_optim.core.regularize import regularized
from gradreg_optim.core.step import Outcome, PartOfPass
from gradreg_optim.core.storage import Storage


def further_passes(storage: Storage, plan: Plan, run: Callable[[], Any], part: PartOfPass | None = None) -> Outcome:
    """Replace the gradient that ``storage`` holds by the combined one.

    Args:
        storage: where the first pass has left its gradient.
        plan: the settings of the step.
        run: repeats the first pass, or the part of it that ``part`` describes. Called at each further point.
        part: that part, if it is not all.
    """
    with closing(regularized(storage, plan)) as points:
        next(points)
        while True:
            try:
                points.send(part)
            except StopIteration as end:
                return end.value  # type: ignore[no-any-return]
            part = None
            run()
