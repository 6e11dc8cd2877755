"""The one arrow upwards: trainers, in a package that imports this one, have to use a wrapper they are given.

That package is imported by name, and only once Transformers' trainer is there: ``import gradreg_optim`` needs
torch alone. A scaler that calls the wrapper is found in the calling frames.
"""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from torch.amp import GradScaler

_TRAINER = "transformers.trainer"
_ATTACH = "gradreg_optim.trainers.attach"


class _AfterTrainer(MetaPathFinder):
    """Imports this package's part for trainers as soon as Transformers' trainer has been imported."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Find ``transformers.trainer`` as the other finders do, with an import that follows its own."""
        if name != _TRAINER:
            return None
        found = (finder.find_spec(name, path, target) for finder in sys.meta_path if finder is not self)
        spec: Any = next((spec for spec in found if spec is not None), None)
        if spec is not None:
            execute = spec.loader.exec_module

            def execute_both(module: ModuleType) -> None:
                execute(module)
                prefix, modules = "gradreg_optim.trainers.", list(sys.modules.items())
                specs = [part.__spec__ for name, part in modules if name.startswith(prefix)]
                # A part that is being imported may be what imports the trainer.
                is_under_way = any(getattr(spec, "_initializing", False) for spec in specs)
                if module.__name__ == _TRAINER and not is_under_way:
                    import_module(_ATTACH)

            spec.loader.exec_module = execute_both
        return spec  # type: ignore[no-any-return]


_AFTER_TRAINER = _AfterTrainer()


def announce() -> None:
    """A wrapper was built: trainers have to use those that they are given, imported before or after this."""
    if _TRAINER in sys.modules:
        import_module(_ATTACH)
    elif _AFTER_TRAINER not in sys.meta_path:
        sys.meta_path.insert(0, _AFTER_TRAINER)


def calling_scaler() -> Any:
    """The enabled ``GradScaler`` that calls the step; ``None`` if there is none."""
    frame, depth = sys._getframe(1), 0
    # There are two frames of torch's hooks in between, and one of each LR scheduler.
    while frame is not None and depth < 12:
        scaler = frame.f_locals.get("self")
        if isinstance(scaler, GradScaler) and scaler.is_enabled():
            return scaler
        frame, depth = frame.f_back, depth + 1  # type: ignore[assignment]
    return None


def check_scaler(known: Any) -> None:
    """Raise ``RuntimeError`` if an unknown ``GradScaler`` calls the step: the gradients were scaled."""
    if calling_scaler() not in (None, known):
        raise RuntimeError(
            "scaler.step(optimizer): the optimizer does not know this scaler, and took scaled "
            "gradients for gradients. Pass GradRegOptimizer(..., scaler=scaler), and call "
            "optimizer.step() and scaler.update()."
        )
