"""`python -m rayllm` is `rayllm`."""

import sys

from rayllm.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
