"""The command `tangents`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from tangents._demo import command as demo
from tangents._version import __version__


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status."""
    parser = argparse.ArgumentParser(
        prog="tangents", description="Neural tangent kernels of finite and infinite networks."
    )
    parser.add_argument("--version", action="version", version=f"tangents {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    description = "Kernels of a convolutional network on handwritten digits, and a report."
    demo.add_arguments(commands.add_parser("demo", help=description, description=description))
    arguments = parser.parse_args(argv)
    try:
        return demo.run(arguments)
    except KeyboardInterrupt:
        print("\ntangents: interrupted; nothing was written.", file=sys.stderr, flush=True)
        # A computation may still run on XLA's threads; the interpreter's own way out would take
        # away what it works on, and crash now and then.
        os._exit(130)


if __name__ == "__main__":
    sys.exit(main())
