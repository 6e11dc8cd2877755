"""GradReg: a wrapper that builds its own inner optimizer, for callers that make an optimizer from a name."""

import inspect
from collections.abc import Iterable, Mapping
from pkgutil import resolve_name
from typing import Any

from torch.optim import Optimizer

from gradreg_optim.config import from_text
from gradreg_optim.optimizer import GradRegOptimizer
from gradreg_optim.wrapping.settings import SETTINGS, Settings, check_names, published, shown

_KINDS = {setting.name: setting.rule.kind for setting in SETTINGS}


class GradReg(GradRegOptimizer):
    """A :class:`GradRegOptimizer` for callers of ``cls(params, **kwargs)``: it builds its inner optimizer.

    ::

        GradReg(params, "torch.optim.AdamW", gradreg={"strength": 0.3}, lr=1e-6, weight_decay=0.01)
        # is
        GradRegOptimizer(torch.optim.AdamW(params, lr=1e-6, weight_decay=0.01), strength=0.3)

    Args:
        params: parameters, named parameters or groups, as the optimizer inside takes them.
        base_optimizer: the full name of the optimizer inside, or its class.
        gradreg: keyword arguments of :class:`GradRegOptimizer`; numbers may be text, as YAML reads ``1e-3``.
            ``"published": True`` sets those of :data:`gradreg_optim.PUBLISHED` that are not given.
        base_kwargs: keyword arguments of the optimizer inside. ``eps`` is there that optimizer's,
            and in ``gradreg`` ε.

    Raises:
        ImportError: there is nothing of the name ``base_optimizer``.
        TypeError: ``base_optimizer`` is no :class:`torch.optim.Optimizer`; ``gradreg`` is no mapping or has
            an unknown name; one of its names is among ``base_kwargs``.
        ValueError: a setting breaks its rule.

    >>> import torch
    >>> w = torch.nn.Parameter(torch.tensor([1.0]))
    >>> optimizer = GradReg([w], "torch.optim.SGD", gradreg={"strength": 0.5, "eps": 0.25}, lr=0.1)
    >>> for _ in optimizer.passes():
    ...     optimizer.zero_grad()
    ...     (2 * w**2).sum().backward()      # gradient 4w, Hessian 4
    >>> optimizer.step()
    >>> w.item()                             # 1 − 0.1·(4 + 0.5·4·4)
    -0.2000...
    """

    def __init__(
        self,
        params: Iterable[Any],
        base_optimizer: str | type[Optimizer] = "torch.optim.AdamW",
        gradreg: Mapping[str, Any] | None = None,
        **base_kwargs: Any,
    ) -> None:
        settings = _settings(gradreg)
        try:
            make = resolve_name(base_optimizer) if isinstance(base_optimizer, str) else base_optimizer
        except (ImportError, AttributeError, ValueError) as error:
            raise ImportError(
                f"base_optimizer={base_optimizer!r} cannot be imported ({error}): it must be the full name "
                "of an installed optimizer. Write, for example, 'torch.optim.AdamW', or install the package "
                "that has it."
            ) from error
        if not isinstance(make, type) or not issubclass(make, Optimizer):
            raise TypeError(
                f"base_optimizer={shown(base_optimizer)} is no torch.optim.Optimizer: it must be the full "
                "name of the optimizer inside, or its class. Write, for example, "
                "base_optimizer='torch.optim.AdamW'."
            )
        _check_base_kwargs(make, base_kwargs)
        super().__init__(make(params, **base_kwargs), **settings)


def _settings(gradreg: Mapping[str, Any] | None) -> dict[str, Any]:
    if gradreg is not None and not isinstance(gradreg, Mapping):
        raise TypeError(
            f"gradreg={shown(gradreg)} is a {type(gradreg).__name__}: it must be a mapping of "
            "GradRegOptimizer's keyword arguments. Write, for example, gradreg={'strength': 0.3}."
        )
    given = dict(gradreg or {})
    is_published = given.pop("published", False)
    if not isinstance(is_published, bool):
        raise ValueError(
            f"gradreg has published={shown(is_published)}: it must be true or false. Write no text."
        )
    check_names("gradreg", map(str, given))
    given = {name: from_text(value, _KINDS.get(name)) for name, value in given.items()}
    return {**(published(given) if is_published else {}), **given}


def _check_base_kwargs(make: type[Optimizer], base_kwargs: Mapping[str, Any]) -> None:
    """Raise for settings of the penalty among the inner optimizer's arguments; its error would not help."""
    known = inspect.signature(make).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values())
    for name in base_kwargs:
        if name in Settings.__annotations__ and name not in known and not takes_any:
            raise TypeError(
                f"{name}={shown(base_kwargs[name])} is no argument of {make.__name__}, which gets what is "
                f"beside gradreg=. Settings of the penalty go into it: gradreg={{{name!r}: "
                f"{shown(base_kwargs[name])}}}."
            )
