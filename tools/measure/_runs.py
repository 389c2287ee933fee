"""Reads output folders of timm's train.py."""
from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from timm.data import resolve_data_config
from torch import nn


def network_of(name: str) -> str:
    """Common name of runs: NAME for NAME-seed0, NAME-seed1 and so on; other names are unchanged."""
    return name.partition('-seed')[0]


@dataclass(frozen=True)
class Run:
    """A run of train.py, read from its output folder.

    Attributes:
        folder: The folder.
        args: Its arguments, from args.yaml.
    """

    folder: Path
    args: dict[str, Any]

    @classmethod
    def of(cls, folder: Path) -> Run:
        """Read the arguments of a run.

        Raises:
            ValueError: There is no args.yaml in the folder, or it is not one of train.py.
            OSError: It is unreadable.
        """
        path = folder / 'args.yaml'
        if not path.is_file():
            raise ValueError(f'{folder} is no output folder of train.py: it holds no args.yaml')
        try:
            args = yaml.safe_load(path.read_text(encoding='utf-8'))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f'{path} is not one of train.py: {error}') from error
        if not isinstance(args, dict) or not isinstance(args.get('model'), str):
            raise ValueError(f'{path} is not one of train.py: it names no model')
        return cls(folder, args)

    @property
    def model_args(self) -> dict[str, Any]:
        """Arguments of `timm.create_model` beside the name of the model."""
        given = {'num_classes': 'num_classes', 'in_chans': 'in_chans', 'global_pool': 'gp'}
        kwargs = {key: self.args[name] for key, name in given.items() if self.args.get(name) is not None}
        return {**kwargs, **(self.args.get('model_kwargs') or {})}

    def data_config(self, model: nn.Module) -> dict[str, Any]:
        """Size and preprocessing of the images, as train.py resolved them for this model."""
        return resolve_data_config(self.args, model=model)
