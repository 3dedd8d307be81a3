"""`python -m te_runtime`, the same as `te-runtime`."""

from te_runtime.cli import main

main(prog_name="te-runtime")
