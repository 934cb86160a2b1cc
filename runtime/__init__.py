"""What a run needs and no reader of the method does: models, engines, ranks, files, the terminal.

Every command begins with `import runtime`, before torch is imported: on few cores OpenMP's idle
threads must sleep, not spin, or a step beside one other busy process takes many times as long.
Whoever has set the variable keeps it.
"""

import os
import sys

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
if sys.platform == "win32":  # no resource module, no signals to stop a grading worker with
    print("attnrl runs on Linux and macOS; on Windows use WSL (wsl --install)", file=sys.stderr)
    sys.exit(2)
