"""What a run needs and no reader of the method does: models, engines, ranks, files, the terminal.

Every command begins with `import runtime`, before torch is imported: on few cores OpenMP's idle
threads must sleep soon. Otherwise a step takes many times as long when one other process is busy.
They spin for about as long as falling asleep and waking up take, then sleep (bench/busy.py measures
it). If OMP_WAIT_POLICY is already set, nothing is changed.
"""

import os
import sys

if "OMP_WAIT_POLICY" not in os.environ:
    os.environ["OMP_WAIT_POLICY"] = "passive"
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # rounds of GNU's spin loop; passive alone: 0
if sys.platform == "win32":  # no resource module, and no signals that stop a grading worker
    print("attnrl runs on Linux and macOS; on Windows use WSL (wsl --install)", file=sys.stderr)
    sys.exit(2)
