"""``python -m paravae``, also under ``torchrun -m paravae``."""

import sys

from paravae.launch.cli import main

if __name__ == "__main__":
    sys.exit(main())
