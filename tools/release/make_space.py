"""Write a folder that is a Hugging Face Space of the page of `timm-gsa demo`, with all that it needs.

    python tools/release/make_space.py DIR
"""
import argparse
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import timm_gsa
from timm_gsa.models._families import trained_models
from timm_gsa.models._weights import hub_id
from timm_gsa.models._zoo import entries

ROOT = Path(__file__).parents[2]
APP = """\
import sys

from timm_gsa.commands import main

if __name__ == '__main__':
    sys.exit(main(['demo', *sys.argv[1:]]))
"""
REQUIREMENTS = ('torch', 'timm', 'huggingface-hub', 'safetensors', 'matplotlib')  # beside gradio, which is the SDK
README = """\
---
title: What attention networks look at
emoji: 👀
colorFrom: blue
colorTo: red
sdk: gradio
sdk_version: {gradio}
python_version: '{python}'
app_file: app.py
license: apache-2.0
short_description: Click on a photo to see what that place attends to
models:
{models}
---

Choose a model, drop a photo and click on it: the maps show the weights with which that place gathers what the others
hold, in GSA-ResNet, SAN and ResNets with prior attention. `gsa_resnet50` was trained on Tiny ImageNet, 200 classes of
ImageNet, the tiny models on the 100 classes of CIFAR-100. Their weights lie in this folder; nothing is downloaded.

    pip install gradio=={gradio} -r requirements.txt && python app.py

runs the page on this machine. The folder was written by `tools/release/make_space.py` of timm-gsa {timm_gsa}. Code and
weights are under Apache-2.0; [timm_gsa/photos/README.md](timm_gsa/photos/README.md) says where the photos come from.
"""


def write_space(folder: Path) -> None:
    """Write the Space, whole or not at all.

    Args:
        folder: Where to; it must not exist, or be empty.

    Raises:
        OSError: The folder is not empty, or cannot be written.
    """
    repositories = [hub_id(entries(model)[0]) for model in trained_models(attention=True)]
    texts = {
        'app.py': APP,
        'README.md': README.format(
            gradio=version('gradio'),
            python='{}.{}'.format(*sys.version_info),
            models='\n'.join(f'  - {repository}' for repository in repositories),
            timm_gsa=timm_gsa.__version__,
        ),
        # The versions here, without their builds: those that were tried together.
        'requirements.txt': ''.join(f'{name}=={version(name).partition("+")[0]}\n' for name in REQUIREMENTS),
    }
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f'.{folder.name}.', dir=folder.parent) as temporary:
        space = Path(temporary, 'space')
        package = Path(timm_gsa.__file__).parent
        shutil.copytree(package, space / package.name, ignore=shutil.ignore_patterns('__pycache__'))
        shutil.copy(ROOT / 'LICENSE', space)
        for name, text in texts.items():
            (space / name).write_text(text, encoding='utf-8')
        os.rename(space, folder)


def main(argv: Sequence[str] | None = None) -> int:
    """Write the Space of a command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or '').partition('\n')[0])
    parser.add_argument('dir', metavar='DIR', type=Path, help='new or empty folder')
    args = parser.parse_args(argv)
    try:
        write_space(args.dir)
    except OSError as error:
        parser.exit(2, f'{parser.prog}: error: cannot write {args.dir}: {error.strerror or error}\n')
    print(f'{args.dir} is a Space; to publish it: hf upload OWNER/NAME {args.dir} . --repo-type space')
    return 0


if __name__ == '__main__':
    raise SystemExit(main())
