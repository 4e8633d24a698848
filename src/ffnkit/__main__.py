"""``python -m ffnkit``."""

from __future__ import annotations

from ffnkit.cli.program import main

if __name__ == "__main__":
    main()
