"""`python -m hopper_mxfp4` is the command line where its script is not on the path."""

from .cli import main

main()
