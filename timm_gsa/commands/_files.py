"""Writes files atomically, and the config of a model for the Hub."""
from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from timm.models._hub import save_config_for_hf


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Give a temporary name beside `path`; the file written there replaces `path` at the end, or is deleted."""
    temporary = path.with_name(f'.{path.name}.{os.getpid()}')
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def hub_config(model: Any, **model_config: Any) -> dict[str, Any]:
    """config.json of a model as timm writes it, for a repository that transformers can read too."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / 'config.json'
        save_config_for_hf(model, str(path), model_config=model_config)
        config = json.loads(path.read_text(encoding='utf-8'))
    config.pop('model_args', None)  # with them, transformers passes the number of classes twice
    return config
