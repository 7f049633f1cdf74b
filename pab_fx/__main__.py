"""`python -m pab_fx`."""

from .cli import main

main()
