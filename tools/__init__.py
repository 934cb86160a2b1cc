"""Commands around a run: python -m tools.view, .report, .plan, .show_fci, .ask."""

import runtime  # its first line must run before torch is imported
