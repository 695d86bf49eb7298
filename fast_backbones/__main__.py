"""python -m fast_backbones: the command line (see cli.py)."""

from .cli import main

main()
