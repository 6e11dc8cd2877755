"""Which parameters are left out of the penalty: by parts of their names, or one by one.

It is parameters that are excluded, and they stay so when groups are added, taken out or shrink. Only where
all of a group was replaced, as FSDP2 and tensor parallelism do, positions in it tell.
"""

from collections.abc import Callable, Iterable
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
        new = [p for group in groups for p in group["params"] if p not in self._is_excluded]
        if new:
            patterns = () if self.patterns == NOTHING else self.patterns
            left_out = matching(groups, patterns, model, must_match=must_match)
            left_out |= {id(parameter) for parameter in (self.default() if self.default else ())}
            for parameter in new:
                self._is_excluded[parameter] = id(parameter) in left_out

    def _settle(self, groups: list[Group]) -> list[list[int]]:
        self._members = [[id(parameter) for parameter in group["params"]] for group in groups]
        self.positions = [
            [i for i, p in enumerate(group["params"]) if self._is_excluded.get(p)] for group in groups
        ]
        return self.positions


def matching(
    groups: list[Group], patterns: tuple[str, ...], model: nn.Module | None, *, must_match: bool = True
) -> set[int]:
    """The ``id`` of each parameter that has one of ``patterns`` in a name; a tied parameter has several.

    Names are those in the model, or in an optimizer that was built on named parameters.

    Raises:
        ValueError: there are patterns but no names, or a pattern is part of no name.
    """
    if not patterns:
        return set()
    own = [(group.get("param_names", ()), group["params"]) for group in groups]
    in_groups = (pair for columns in own for pair in zip(*columns, strict=False))
    named = in_groups if model is None else model.named_parameters(remove_duplicate=False)
    names = [(name, id(parameter)) for name, parameter in named]
    if not names:
        raise ValueError(
            f"exclude={patterns!r}: parameter names are not known. Pass model=<the module>, or build the "
            "optimizer on model.named_parameters()."
        )
    held = {id(parameter) for _, parameters in own for parameter in parameters}
    known = [name for name, key in names if key in held]
    for pattern in patterns:
        if must_match and not any(pattern in name for name in known):
            raise ValueError(
                f"exclude={patterns!r}: {pattern!r} is part of no parameter name, and a pattern has to "
                f"match. Names look like {', '.join(map(repr, known[:3]))}."
            )
    return {key for name, key in names if any(pattern in name for pattern in patterns)}
