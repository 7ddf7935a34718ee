"""`python -m nestpatch`."""

from nestpatch.cli import main

main(prog_name="nestpatch")
