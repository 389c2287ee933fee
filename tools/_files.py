"""Files that are either whole or not there."""
from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Gives a temporary name beside `path`; what is written there takes its place at the end, or goes on an error."""
    temporary = path.with_name(f'.{path.name}.{os.getpid()}')
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
