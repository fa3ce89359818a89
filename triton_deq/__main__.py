"""`python -m triton_deq` is the same as `triton-deq`."""

import sys

from .cli import main

sys.exit(main())
