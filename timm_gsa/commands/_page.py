"""The page of `timm-gsa demo`: models, photos and the attention maps of a clicked position. Needs Gradio."""
import base64
import html
import io
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from gradio_client.utils import is_http_url_like, traverse
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image, ImageDraw
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ._figure import Panel, draw_on, panels
from ._inputs import PHOTOS, Classifier, upright_rgb

EXAMPLES = sorted(PHOTOS.glob('*.jpg'), reverse=True)

FORMATS = ('JPEG', 'PNG', 'WEBP', 'GIF')  # of Pillow's other formats some start programs or ignore size limits
MAX_BYTES = 20 * 2**20
MAX_OVERHEAD = 2**16  # bytes of an upload request beyond the file
MAX_PIXELS = 50_000_000
MAX_RATIO = 20  # of the sides, because transforms resize the shorter side and enlarge the longer with it
MAX_SCANS = 100  # of a JPEG: decoding a scan visits all pixels, but a scan may have 75 bytes
ALLOWED = f'JPEG, PNG, WebP and GIF, at most {MAX_BYTES >> 20} MB and {MAX_PIXELS // 10**6} megapixels'
KEEP_SECONDS = 3600  # age at which uploads and pictures are deleted
SWEEP_SECONDS = 600  # between two searches for old files

TOP_K = 5
CENTRE = (0.5, 0.5)
LAST = 1 - 1e-6  # largest coordinate inside the picture
THEME = gr.themes.Default(primary_hue='blue', font=['system-ui', 'sans-serif'], font_mono=['system-ui', 'sans-serif'])
CSS = """
.gradio-container { max-width: 1200px !important; margin: 0 auto !important; }
#drop p { max-width: 30em; font-size: 13px; white-space: normal; text-align: center; }
#examples .gallery { max-width: none; display: grid; grid-template-columns: repeat(4, 1fr); gap: 8px; }
#examples .gallery-item { width: 100%; height: 72px; }
#examples .gallery-item > span, #examples .container { display: block; width: 100%; height: 100%; }
#examples .gallery-item img { width: 100%; max-width: none; height: 100%; object-fit: cover; }
#view img { cursor: crosshair; }
#maps .html-container { padding: 0; }
.maps { display: grid; gap: 16px; grid-template-columns: repeat(var(--stages), minmax(0, 276px)); }
#maps figure { margin: 0; padding: 8px; background: white; border: 1px solid #e4e4e7; border-radius: 4px; }
#maps figcaption { color: #27272a; font-size: 12px; line-height: 1.35; margin-bottom: 6px; overflow-wrap: anywhere; }
#maps b { color: inherit; }
#maps b, #maps img { display: block; width: 100%; }
@media (max-width: 700px) {
  .gradio-container .main { padding: 12px !important; }
  #drop { height: 150px !important; }
  .maps { gap: 8px; grid-template-columns: repeat(2, minmax(0, 1fr)); }
  #maps figcaption { font-size: 11px; }
}
"""

Spot = tuple[float, float]


class PhotoError(ValueError):
    """Reason why a file is refused, for the user."""


def read_photo(path: Path) -> Image.Image:
    """Read an untrusted picture as RGB: upright, on a white ground, first frame of an animation.

    The limits are checked before anything is decoded.

    Raises:
        PhotoError: The file is beyond the limits, broken or not a picture.
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            _check(image, path)
            return upright_rgb(image)
    except PhotoError:
        raise
    except FileNotFoundError:
        raise PhotoError('The photo is no longer here, as photos are deleted after a while: drop it again.') from None
    except Image.DecompressionBombError:
        raise PhotoError(f'The photo has too many pixels; allowed are {ALLOWED}.') from None
    except Exception as error:  # Pillow's decoders raise many kinds of errors for broken files
        raise PhotoError(f'The file is broken, or of another kind than what is allowed: {ALLOWED}.') from error


def _check(image: Image.Image, path: Path) -> None:
    """Raise PhotoError if an opened, not yet decoded picture is beyond the limits."""
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise PhotoError(f'The photo has {width} x {height} pixels; allowed are {ALLOWED}.')
    if max(width, height) > MAX_RATIO * min(width, height):
        raise PhotoError(
            f'The photo has {width} x {height} pixels; one side may be at most {MAX_RATIO} times as long as the other.')
    if image.format in ('JPEG', 'MPO') and path.read_bytes().count(b'\xff\xda') > MAX_SCANS:
        raise PhotoError(f'The photo consists of more than {MAX_SCANS} scans; allowed are at most that many.')


def marked(view: Image.Image, point: tuple[float, float]) -> Image.Image:
    """A copy of a picture with a ring around a point."""
    view = view.copy()
    pen = ImageDraw.Draw(view)
    for radius, colour, width in ((12, 'black', 7), (10, 'white', 3)):
        pen.ellipse([int(at) + side * radius for side in (-1, 1) for at in point], outline=colour, width=width)
    return view


def drawn(view: Image.Image, panel: Panel, point: tuple[float, float]) -> Image.Image:
    """Picture of a panel without title, with large labels."""
    width, height, labels = 3.6, 3.6 * view.height / view.width, 0.85  # inches
    figure = Figure(figsize=(width, height + labels), dpi=100)
    axes = figure.add_axes((0, labels / (height + labels), 1, height / (height + labels)))
    draw_on(axes, view, replace(panel, title='', detail=''), point, font_size=15)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert('RGB')


def maps_html(view: Image.Image, shown: Sequence[Panel], point: tuple[float, float]) -> str:
    """HTML grid of panels: stages from left to right, one row for each kind of map."""
    kinds = list(dict.fromkeys(panel.kind for panel in shown))
    figures = []
    for panel in sorted(shown, key=lambda panel: kinds.index(panel.kind)):
        file = io.BytesIO()
        drawn(view, panel, point).save(file, 'WEBP', quality=90)
        title, detail = html.escape(panel.title), html.escape(panel.detail)
        figures.append(
            f'<figure><figcaption><b>{title}</b>{detail}</figcaption><img alt="Map of {title}" '
            f'src="data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"></figure>')
    return f'<div class="maps" style="--stages: {len(shown) // len(kinds)}">{"".join(figures)}</div>'


class Page(gr.Blocks):
    """The page. Choices of a user are kept in the session.

    Args:
        classifiers: Models with attention layers by name; the first is shown at the start.
    """

    def __init__(self, classifiers: Mapping[str, Classifier]) -> None:
        super().__init__(
            title='What attention networks look at',
            analytics_enabled=False,
            delete_cache=(SWEEP_SECONDS, KEEP_SECONDS),
        )
        self.classifiers = classifiers
        with self:
            self.path, self.spot = gr.State(str(EXAMPLES[0])), gr.State(CENTRE)
            gr.Markdown(
                '# What attention networks look at\n'
                'Choose a model and a photo, then click on the photo. The maps show the weights with which the place '
                'in the ring sums the values of the other places, in the last attention layer of each stage.'
            )
            self.model = gr.Radio(
                list(classifiers), value=next(iter(classifiers)), label='Model', elem_id='model')
            with gr.Row():
                with gr.Column(min_width=280):
                    self.drop = gr.Image(
                        sources=['upload'],
                        buttons=[],
                        height=254,
                        label='Your photo',
                        placeholder=f'# Drop a photo, or click\n({ALLOWED})',
                        elem_id='drop',
                    )
                    examples = gr.Dataset(
                        components=[gr.Image(visible=False)],
                        samples=[[str(photo)] for photo in EXAMPLES],
                        type='index',
                        label='Or one of these',
                        elem_id='examples',
                    )
                with gr.Column(min_width=280):
                    self.view = gr.Image(
                        interactive=False,
                        buttons=[],
                        show_label=False,
                        elem_id='view',
                        alt_text='What the model sees of the photo, with a ring around the chosen place',
                    )
                with gr.Column(min_width=280):
                    self.predictions = gr.Label(
                        num_top_classes=TOP_K, label='Predictions', elem_id='predictions')
            self.maps = gr.HTML(elem_id='maps', padding=False)

            common: dict[str, Any] = dict(
                outputs=[self.drop, self.path, self.spot, self.view, self.predictions, self.maps],
                # A forward pass uses all cores, and memory is planned for one large photo at a time.
                concurrency_id='model',
                concurrency_limit=1,
                show_progress_on=self.view,
                api_visibility='private',
            )
            state = [self.model, self.path, self.spot]
            self.load(self._show, state, **common)
            self.model.change(self._show, state, trigger_mode='always_last', **common)
            self.view.select(self._click, state, trigger_mode='always_last', **common)
            examples.click(self._choose, [self.model, examples], **common)
            # Gradio's preprocessing would decode pictures of any size.
            self.drop.upload(self._take, [self.model, self.drop], preprocess=False, **common)
        self.queue(max_size=64)

    async def preprocess_data(self, block_fn: Any, inputs: list[Any], *args: Any, **kwargs: Any) -> Any:
        """As in Gradio, but refuses addresses in place of files, which Gradio would download."""
        def refuse(file: dict[str, Any]) -> None:
            raise gr.Error('A photo has to be uploaded; no address is allowed.', print_exception=False)

        traverse(inputs, refuse, lambda value: isinstance(value, dict) and is_http_url_like(value.get('path')))
        return await super().preprocess_data(block_fn, inputs, *args, **kwargs)

    def _show(self, model: str, path: str, spot: Spot, pixel: Sequence[float] | None = None) -> dict[Any, Any]:
        """Changes of the page: everything, or only the dropped file if it is refused."""
        try:
            photo = read_photo(Path(path))
        except PhotoError as error:
            gr.Warning(str(error))
            return {self.drop: None}
        classifier = self.classifiers[model]
        view = classifier.view(photo)
        if pixel is not None:
            x, y = ((at + 0.5) / size for at, size in zip(pixel, view.size, strict=True))
            spot = (min(max(x, 0), LAST), min(max(y, 0), LAST))
        point = (spot[0] * view.width, spot[1] * view.height)
        return {
            self.drop: None,  # empty again for the next one
            self.path: path,
            self.spot: spot,
            self.view: marked(view, point),
            self.predictions: {each.name: each.probability for each in classifier.predict(photo, TOP_K)},
            self.maps: maps_html(view, panels(classifier, photo, point), point),
        }

    def _click(self, model: str, path: str, spot: Spot, event: gr.SelectData) -> dict[Any, Any]:
        return self._show(model, path, spot, event.index)

    def _choose(self, model: str, index: int) -> dict[Any, Any]:
        return self._show(model, str(EXAMPLES[index]), CENTRE)

    def _take(self, model: str, file: dict[str, Any]) -> dict[Any, Any]:
        return self._show(model, file['path'], CENTRE)


class UploadGuard:
    """Middleware that limits the size of whole requests and deletes interrupted uploads, which Gradio does not.

    Args:
        app: The application behind.
        folder: Gradio's folder for uploads. Incomplete ones have temporary names.
    """

    def __init__(self, app: ASGIApp, folder: Path) -> None:
        self.app = app
        self.folder = folder

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        received = 0

        async def limited() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get('body', b''))
            if received > MAX_BYTES + MAX_OVERHEAD:
                raise HTTPException(413, f'A request must have at most {MAX_BYTES + MAX_OVERHEAD} bytes.')
            return message

        if scope['type'] == 'http' and scope['path'].endswith('/upload'):
            for part in self.folder.glob('tmp*'):
                with suppress(FileNotFoundError):  # renamed in the meantime
                    if part.stat().st_mtime < time.time() - KEEP_SECONDS:
                        part.unlink()
        await self.app(scope, limited, send)


def launch(page: Page, host: str, port: int, folder: Path) -> None:
    """Serve a page in the background.

    Args:
        page: The page.
        host: Address to listen on.
        port: Port to listen on.
        folder: Folder for uploads: GRADIO_TEMP_DIR at the time when the page was made.

    Raises:
        OSError: It cannot listen there.
    """
    page.launch(
        server_name=f'[{host}]' if ':' in host else host,
        server_port=port,
        share=False,
        quiet=True,
        prevent_thread_lock=True,
        max_file_size=MAX_BYTES,
        app_kwargs={'middleware': [Middleware(UploadGuard, folder=folder)]},
        ssr_mode=False,
        mcp_server=False,
        run_history=False,
        enable_monitoring=False,
        footer_links=[],
        theme=THEME,
        head=f'<style>{CSS}</style>',  # Gradio rewrites the selectors of css=
    )
