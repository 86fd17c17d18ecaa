"""``python -m omniq_compile``: the command line, where ``omniq`` is not on the path."""

from omniq_compile.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
