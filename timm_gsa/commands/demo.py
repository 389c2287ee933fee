"""Serve a page: choose a model, drop a photo, click on it and see the attention at that point.

examples:
  timm-gsa demo
  timm-gsa demo --model gsa_resnet_tiny --model san_tiny_patchwise --port 8000

The page listens on this machine only and connects to no other. Photos may have 20 MB and 50 megapixels, which is
checked before decoding. They are deleted after an hour. Needs the extra demo.
"""
import argparse
import os
import signal
import tempfile
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from ..models._families import trained_models
from ._figure import panels
from ._inputs import Classifier, progress, require_extra


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the command."""
    parser.add_argument(
        '--model', metavar='NAME', action='append',
        help='pretrained model of this package, repeated for more; all of them if not given')
    parser.add_argument(
        '--host', default=os.environ.get('GRADIO_SERVER_NAME', '127.0.0.1'), help='address to listen on')
    parser.add_argument('--port', type=port, default=7860, help='port to listen on')


def run(args: argparse.Namespace) -> int:
    """Serve the page until interrupted; returns 0."""
    require_extra('demo', 'gradio', 'matplotlib')
    classifiers = load(args.model or trained_models(attention=True))
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    # Gradio checks its own address by HTTP, which must not go through a proxy.
    direct = ','.join(filter(None, [os.environ.get('no_proxy') or os.environ.get('NO_PROXY'), 'localhost', args.host]))
    os.environ['no_proxy'] = os.environ['NO_PROXY'] = direct
    with tempfile.TemporaryDirectory(prefix='timm-gsa-demo-') as folder:
        os.environ['GRADIO_TEMP_DIR'] = folder
        from ._page import Page, launch

        page = Page(classifiers)
        try:
            launch(page, args.host, args.port, Path(folder))
        except OSError:
            raise RuntimeError(
                f'cannot listen on {args.host}:{args.port}: --host must be an address of this machine and --port must '
                'not be in use'
            ) from None
        print(f'{page.local_url} shows the page until Ctrl-C', flush=True)
        page.block_thread()
    return 0


def load(names: Sequence[str]) -> dict[str, Classifier]:
    """The models of the page by name.

    Raises:
        ValueError: A model cannot be loaded or has no attention to show; the message names it.
    """
    classifiers = {}
    for name in progress(names, 'loading', 'model'):
        try:
            classifiers[name] = Classifier(name, for_maps=True)
            panels(classifiers[name], Image.new('RGB', (64, 64)))
        except (RuntimeError, ValueError, OSError) as error:
            raise ValueError(f'--model {name}: {error}') from error
    return classifiers


def port(text: str) -> int:
    """Number of a port, for argparse."""
    if not text.isdecimal() or not 1 <= int(text) <= 65535:
        raise argparse.ArgumentTypeError(f'must be a whole number from 1 to 65535, got {text!r}')
    return int(text)
