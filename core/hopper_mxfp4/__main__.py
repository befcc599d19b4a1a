"""`python -m hopper_mxfp4` is the command line where its script is not on the path."""

from hopper_mxfp4.cli.main import main

main()
