"""`hopper-mxfp4 bench` and the measuring that `tune` shares with it. Nothing a server needs imports
this.
"""
