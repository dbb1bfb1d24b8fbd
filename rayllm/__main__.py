"""`python -m rayllm` is `rayllm`: no module is taken from the working folder, unless this package is itself."""

import os
import sys


def _leave_out_working_folder() -> None:
    package_parent = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
    is_safe = getattr(sys.flags, "safe_path", False)  # then Python has left it out
    if not is_safe and sys.path and os.path.realpath(sys.path[0] or ".") != package_parent:
        del sys.path[0]


if __name__ == "__main__":
    _leave_out_working_folder()

    from rayllm.cli.main import main

    sys.exit(main())
