"""`python -m speckd` is `speckd`; with several processes: `torchrun --nproc-per-node 2 -m speckd train …`."""

import sys

from speckd.cli import main

if __name__ == "__main__":
    sys.exit(main())
