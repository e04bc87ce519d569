"""`amfm` and `python -m amfm.launch`: the command line, with Ctrl-C while it is still being imported answered as later."""

import sys


def main() -> None:
    """Import the command line and run it."""
    try:
        from amfm.launch.cli import main as run

        run()
    except KeyboardInterrupt:
        sys.exit(130)  # INTERRUPTED of amfm.pretrain.launcher_protocol, which may not be there yet


if __name__ == "__main__":
    main()
