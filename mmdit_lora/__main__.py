"""`python -m mmdit_lora`: the command `mmdit-lora`."""

import sys

from mmdit_lora.cli.start import main

if __name__ == "__main__":
    sys.exit(main())
