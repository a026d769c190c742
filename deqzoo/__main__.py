"""`deqzoo` and `python -m deqzoo`."""

from __future__ import annotations

import io
import sys


def main() -> None:
    """Run the command line; Ctrl-C ends it in one line while it is still importing, too."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Names of files in another encoding, and signs that the terminal's lacks, are escaped.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        from deqzoo.cli import run

        code = run()
    except KeyboardInterrupt:
        print("deqzoo: interrupted", file=sys.stderr)
        code = 130
    sys.exit(code)


if __name__ == "__main__":
    main()
