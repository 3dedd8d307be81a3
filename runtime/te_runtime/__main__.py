"""`python -m te_runtime`, the same as `te-runtime`."""

from te_runtime.entry import main

main()
