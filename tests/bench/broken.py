"""A section that fails, or hangs, for test_gpu: `python -m tests.bench.broken fail|hang ...`."""

import sys
import time

if sys.argv[1] == "hang":
    time.sleep(60)
raise RuntimeError("the section broke")
