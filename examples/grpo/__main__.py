"""``python -m examples.grpo``; see :mod:`examples.grpo.grpo`."""

import sys

from examples.grpo.grpo import main

if __name__ == "__main__":
    main(sys.argv[1:])
