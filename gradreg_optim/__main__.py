"""``gradreg`` and ``python -m gradreg_optim``: TRL's training scripts with the penalty."""

from gradreg_optim import import_part


def main() -> None:
    """Run the command line that :mod:`gradreg_optim.trainers.command` describes."""
    import_part("gradreg_optim.trainers.command", "The command gradreg").main()


if __name__ == "__main__":
    main()
