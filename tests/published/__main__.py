"""`python -m tests.published`: the page of published bugs. `python -m tests.published plant [KEY ...]`: plants them one by one
in a copy of the repository, says whether their tests fail, and ends with 1 where one does not."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from tests.published.catalogue import read_table, write_page


def main(words: list[str]) -> int:
    """Run the command; returns the exit code."""
    if not words:
        print(write_page(), end="")
        return 0
    from tests.mutation.workshop import Workshop
    from tests.published.plant import see

    bugs = [bug for bug in read_table()[0] if bug.plant and (bug.key in words or words == ["plant"])]
    missed = 0
    with tempfile.TemporaryDirectory() as folder:
        shop = Workshop(Path(folder))
        for bug in bugs:
            is_seen, how = see(shop, bug)
            missed += not is_seen
            print(f"{'seen' if is_seen else 'NOT SEEN'} {bug.key}: {how}", flush=True)
            if not is_seen:
                print(shop.log.read_text(errors="replace")[-2000:], flush=True)
        shop.close()
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
