"""Each example is its own package; its tests import it without an install."""

from __future__ import annotations

import sys
from pathlib import Path

for project in sorted(Path(__file__).parent.glob("*/pyproject.toml")):
    sys.path.insert(0, str(project.parent))
