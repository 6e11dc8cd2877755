"""Clips that a pass calls, held back for the combined gradient.

A clip of each gradient by itself would remove what the difference of the two is to measure. Lightning's
``gradient_clip_val`` clips inside its closure, and many loops do in the body of ``passes()``.

Relied upon (torch 2.6 to 2.15): ``torch.nn.utils.clip_grad._get_total_norm`` and ``_clip_grads_with_norm_``, which
``clip_grad_norm_`` calls, also where it was imported by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch.nn.utils import clip_grad

from gradreg_optim.core.witnesses import backward_replaced


class HeldClips:
    """The clips of the first pass of one step. Those of further passes are dropped."""

    def __init__(self) -> None:
        self._held: list[Callable[[], Any]] = []
        self._norm_type = 2.0

    @contextmanager
    def around(self, *, is_first: bool) -> Iterator[None]:
        """Around one pass: hold its clips back, unless another backward follows them."""
        clips: list[Callable[[], Any]] = []
        total_norm, clip_value = clip_grad._get_total_norm, clip_grad.clip_grad_value_

        def note_norm(tensors: Any, norm_type: float = 2.0, *args: Any, **kwargs: Any) -> Any:
            self._norm_type = norm_type
            return total_norm(tensors, norm_type, *args, **kwargs)

        def hold_norm(parameters: Any, max_norm: float, _total: Any, foreach: bool | None = None) -> None:
            held = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
            clips.append(partial(clip_grad.clip_grad_norm_, held, max_norm, self._norm_type, foreach=foreach))

        def hold_value(parameters: Any, *args: Any, **kwargs: Any) -> None:
            held = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
            clips.append(partial(clip_value, held, *args, **kwargs))

        def clip_before(backward: Callable[..., None], *args: Any, **kwargs: Any) -> None:
            with replaced_by(total_norm, clip_with_norm, clip_value):
                while clips:
                    clips.pop(0)()
            backward(*args, **kwargs)

        clip_with_norm = clip_grad._clip_grads_with_norm_
        with replaced_by(note_norm, hold_norm, hold_value), backward_replaced(clip_before):
            yield
        if is_first:
            self._held = clips

    def release(self) -> None:
        """Clip the combined gradient."""
        held, self._held = self._held, []
        for clip in held:
            clip()


@contextmanager
def replaced_by(total_norm: Any, clip_with_norm: Any, clip_value: Any) -> Iterator[None]:
    """Let torch's clips call these in the block."""
    functions = {"_get_total_norm": total_norm, "_clip_grads_with_norm_": clip_with_norm}
    with patch.multiple(clip_grad, **functions), patch.object(torch.nn.utils, "clip_grad_value_", clip_value):
        yield
