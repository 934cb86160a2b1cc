"""What a run needs and no reader of the method does: models, engines, ranks, files, the terminal.

Every command begins with `import runtime`, before torch is imported: on few cores OpenMP's idle
threads must sleep soon, or a step beside one other busy process takes many times as long. They spin
about as long as falling asleep and waking up take, and then sleep: bench/busy.py measures it.
Whoever has set OMP_WAIT_POLICY keeps what he has.
"""

import os
import sys

if "OMP_WAIT_POLICY" not in os.environ:
    os.environ["OMP_WAIT_POLICY"] = "passive"
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # times round GNU's loop; passive alone: 0
if sys.platform == "win32":  # no resource module, no signals to stop a grading worker with
    print("attnrl runs on Linux and macOS; on Windows use WSL (wsl --install)", file=sys.stderr)
    sys.exit(2)
