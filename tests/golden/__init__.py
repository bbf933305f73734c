"""Golden files with expected texts; `DIST_FT_WRITE_GOLDEN=1 pytest …` rewrites them, so that git shows the changes."""

import difflib
import os
from pathlib import Path

FOLDER = Path(__file__).parent


def check_golden(name: str, text: str) -> None:
    """Compare `text` with the file `name`, line by line."""
    path = FOLDER / name
    if os.environ.get("DIST_FT_WRITE_GOLDEN"):
        path.write_text(text, encoding="utf-8")
    wanted = path.read_text(encoding="utf-8") if path.exists() else ""
    diff = "\n".join(difflib.unified_diff(wanted.splitlines(), text.splitlines(), name, "rendered", lineterm=""))
    assert text == wanted, f"differs from tests/golden/{name}:\n{diff}"
