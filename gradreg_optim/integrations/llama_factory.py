"""LLaMA-Factory: its training command, with ``grad_reg_*`` keys. Run with LLaMA-Factory 0.9.5.

In place of ``llamafactory-cli train``::

    python -m gradreg_optim.integrations.llama_factory train.yaml grad_reg_strength=auto     # or in the file
    torchrun --nproc_per_node 8 -m gradreg_optim.integrations.llama_factory train.yaml

In Python, give ``run_exp`` a :class:`~gradreg_optim.GradRegCallback`, which is all that this file does.

Relied upon: ``llamafactory.hparams.read_args()``, and ``llamafactory.train.tuner.run_exp(args, callbacks)``,
whose callbacks the trainers of all stages but PPO get in their constructors.
"""

import os
from typing import Any

from llamafactory.hparams import read_args
from llamafactory.train.tuner import run_exp
from transformers import HfArgumentParser

from gradreg_optim.config import GradRegConfig
from gradreg_optim.integrations.arguments import of_penalty, parted
from gradreg_optim.trainers.attach import GradRegCallback


def main() -> None:
    """Train as ``llamafactory-cli train`` does with the same arguments, and take ``grad_reg_*`` as settings.

    Raises:
        ValueError: a setting is unknown or breaks its rule, or the stage is PPO or the engine Megatron's,
            where nothing would take the penalty.
    """
    arguments: dict[str, Any] | list[str] = read_args()
    if isinstance(arguments, dict):
        config, rest = parted(arguments)
        stage = arguments.get("stage")
    else:
        of_penalty(word[2:].partition("=")[0] for word in arguments if word.startswith("--"))
        parser: Any = HfArgumentParser
        config, rest = parser(GradRegConfig).parse_args_into_dataclasses(
            arguments, return_remaining_strings=True
        )
        stage = "ppo" if "ppo" in arguments else None
    if stage == "ppo" or os.environ.get("USE_MCA", "0").lower() in ("1", "true", "y"):
        raise ValueError(
            "stage='ppo' and USE_MCA step their optimizers in loops of their own, which take no penalty. Use "
            "llamafactory-cli train, or another stage, on Transformers' engine."
        )
    run_exp(rest, [GradRegCallback(config)])


if __name__ == "__main__":
    main()
