"""Which parameters are left out of the penalty: by parts of their names, or one by one.

It is parameters that are excluded, and they stay so when groups are added, taken out or shrink. Only where
all of a group was replaced, as FSDP2 and tensor parallelism do, positions in it tell.
"""

from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any

from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from gradreg_optim.wrapping.settings import exclude_patterns

Group = dict[str, Any]

NOTHING = ("none",)
"""The value of ``exclude`` that leaves nothing out, not even where a default would."""


class Exclusion:
    """The parameters of one optimizer that are left out.

    ``patterns`` are those of ``exclude``. ``default`` returns more parameters, where a trainer has a default.
    """

    def __init__(self, exclude: Any, model: nn.Module | None, groups: list[Group]) -> None:
        self.patterns = exclude_patterns(exclude)
        self.default: Callable[[], Iterable[Tensor]] | None = None
        self.positions: list[list[int]] = []
        self._is_excluded: Any = WeakIdKeyDictionary()
        self._members: list[list[int]] = []
        self._judge(groups, model, must_match=True)
        self._settle(groups)

    def __getstate__(self) -> dict[str, Any]:
        """A copy knows positions alone, since its parameters are others."""
        return {**self.__dict__, "default": None, "_is_excluded": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Begin anew with the parameters of the copy."""
        self.__dict__.update(state, _is_excluded=WeakIdKeyDictionary())

    def update(self, groups: list[Group], model: nn.Module | None) -> list[list[int]]:
        """The positions of excluded parameters in each of ``groups``, which may have changed since."""
        members = [[id(parameter) for parameter in group["params"]] for group in groups]
        if members == self._members:
            return self.positions
        if len(members) == len(self._members):
            for group, own, positions in zip(groups, self._members, self.positions, strict=True):
                is_replaced = not any(parameter in self._is_excluded for parameter in group["params"])
                if is_replaced and len(own) == len(group["params"]):  # other tensors in the same places
                    for position, parameter in enumerate(group["params"]):
                        self._is_excluded[parameter] = position in positions
        self._judge(groups, model)
        return self._settle(groups)

    def leave_out(self, parameters: Iterable[Tensor], groups: list[Group]) -> None:
        """Exclude ``parameters``; raise if no trainable parameter of ``groups`` is left to regularize."""
        for parameter in parameters:
            self._is_excluded[parameter] = True
        self._settle(groups)
        trainable = [
            parameter for group in groups for parameter in group["params"] if parameter.requires_grad
        ]
        if not trainable:
            raise ValueError(
                "The optimizer has no trainable parameter: nothing would be trained. Build it on parameters "
                "with requires_grad=True; if an adapter is created later, call peft.get_peft_model(model, "
                "config) first, or let the trainer create the optimizer and call attach(trainer)."
            )
        if all(self._is_excluded.get(parameter) for parameter in trainable):
            raise ValueError(
                "Every trainable parameter of the optimizer is excluded: nothing is left to regularize. "
                "Pass exclude='none' to regularize embeddings and heads too."
            )

    def _judge(self, groups: list[Group], model: nn.Module | None, *, must_match: bool = False) -> None:
        """Find out which of the parameters that are not known yet are left out."""
        if all(parameter in self._is_excluded for group in groups for parameter in group["params"]):
            return
        patterns = () if self.patterns == NOTHING else self.patterns
        by_default = {id(parameter) for parameter in (self.default() if self.default else ())}
        for group, matching in zip(
            groups, excluded_positions(groups, patterns, model, must_match=must_match), strict=True
        ):
            for position, parameter in enumerate(group["params"]):
                if parameter not in self._is_excluded:
                    self._is_excluded[parameter] = position in matching or id(parameter) in by_default

    def _settle(self, groups: list[Group]) -> list[list[int]]:
        self._members = [[id(parameter) for parameter in group["params"]] for group in groups]
        self.positions = [
            [i for i, p in enumerate(group["params"]) if self._is_excluded.get(p)] for group in groups
        ]
        return self.positions


def parameter_names(groups: Iterable[Group], model: nn.Module | None) -> dict[int, list[str]]:
    """All names of each parameter, by ``id``: from the model, or from an optimizer built on named parameters.

    A tied parameter has several names. Empty if neither source has any.
    """
    names: dict[int, list[str]] = {}
    in_groups = (zip(group.get("param_names", ()), group["params"], strict=False) for group in groups)
    in_model = None if model is None else model.named_parameters(remove_duplicate=False)
    for name, parameter in in_model or chain.from_iterable(in_groups):
        names.setdefault(id(parameter), []).append(name)
    return names


def excluded_positions(
    groups: list[Group], patterns: tuple[str, ...], model: nn.Module | None, *, must_match: bool = True
) -> list[list[int]]:
    """For each group the positions of the parameters whose names contain one of ``patterns``.

    Raises:
        ValueError: there are patterns but no names, or a pattern is part of no name.
    """
    if not patterns:
        return [[] for _ in groups]
    names = parameter_names(groups, model)
    if not names:
        raise ValueError(
            f"exclude={patterns!r}: parameter names are not known. Pass model=<the module>, or build the "
            "optimizer on model.named_parameters()."
        )
    known = [
        name for group in groups for parameter in group["params"] for name in names.get(id(parameter), ())
    ]
    for pattern in patterns:
        if must_match and not any(pattern in name for name in known):
            raise ValueError(
                f"exclude={patterns!r}: {pattern!r} is part of no parameter name, and a pattern has to "
                f"match. Names look like {', '.join(map(repr, known[:3]))}."
            )

    def matches(parameter: Tensor) -> bool:
        return any(pattern in name for name in names.get(id(parameter), ()) for pattern in patterns)

    return [[i for i, parameter in enumerate(group["params"]) if matches(parameter)] for group in groups]
