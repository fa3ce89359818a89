"""`triton-deq profile`: a model and a peer timed in turns on this machine, and where the model's time goes.

Importing this module loads nothing but the command's options; `run` loads the rest.
"""

from .command import add_arguments, run

__all__ = ["add_arguments", "run"]
