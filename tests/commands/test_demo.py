"""The page of `timm-gsa demo`: what it refuses, its server over HTTP, and the page itself in a browser.

The tests with a browser leave their screenshots in the folder that TIMM_GSA_SCREENSHOTS names, if it names one:
desktop.png there is tools/figures/demo.png.
"""
import base64
import concurrent.futures
import contextlib
import io
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from pathlib import Path

import numpy as np
import pytest
import timm
import yaml
from PIL import Image, ImageFile

from timm_gsa.commands import main
from timm_gsa.commands._inputs import PHOTOS

MAPS = {  # in the order of the page
    'gsa_resnet50': 8, 'gsa_resnet_tiny': 8, 'priorattn_resnet_tiny': 3, 'san_tiny_pairwise': 5,
    'san_tiny_patchwise': 5, 'smlpnet_mini': 8,
}
FIRST = 'gsa_resnet50'
FASTEST = 'priorattn_resnet_tiny'
BROWSERS = ('chromium', 'chromium-browser', 'google-chrome')
BROWSER_ARGUMENTS = (
    '--headless', '--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run',
    '--disable-background-networking', '--disable-component-update', '--disable-sync')

RING_ALONE = 0.002  # of the pixels of a map change at most, if only the ring in it moves

# Runs the package or a script and writes down every host that it looks up or connects to.
WATCHED = '''
import runpy, sys
log = open(sys.argv[1], 'a', buffering=1)
def watch(event, arguments):
    if event == 'socket.connect' and isinstance(arguments[1], tuple):
        print(arguments[1][0], file=log)
    elif event in ('socket.getaddrinfo', 'socket.gethostbyname'):
        print(arguments[0], file=log)
sys.addaudithook(watch)
sys.argv[:] = sys.argv[2:]
if sys.argv[0] == 'timm_gsa':
    runpy.run_module('timm_gsa', run_name='__main__')
else:
    sys.path[0] = sys.argv[0].rpartition('/')[0]
    runpy.run_path(sys.argv[0], run_name='__main__')
'''


@pytest.fixture(scope='module')
def demo():
    pytest.importorskip('gradio', reason='needs gradio, of the extra demo')
    from timm_gsa.commands import _page
    return _page


def encoded(image, kind='PNG', **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def scan_bomb(scans):
    """A progressive JPEG whose last scan is there again and again."""
    photo = encoded(Image.new('L', (3000, 3000)), 'JPEG', progressive=True)
    return photo[:-2] + scans * photo[photo.rindex(b'\xff\xda'):-2] + photo[-2:]


def giant_webp():
    """A valid lossless WebP of 16383 x 16383 pixels in one colour, in 34 bytes or so."""
    content = bytearray(encoded(Image.new('RGB', (8, 8)), 'WEBP', lossless=True))
    size = content.index(b'VP8L') + 9
    content[size:size + 4] = (int.from_bytes(content[size:size + 4], 'little') | (1 << 28) - 1).to_bytes(4, 'little')
    return bytes(content)


def giant_gif():
    """A GIF of 65535 x 65535 pixels, of which one is drawn."""
    content = encoded(Image.new('L', (1, 1)), 'GIF')
    return content[:6] + b'\xff' * 4 + content[10:]


PIXELS, SIDES, SCANS = 'pixels; allowed are', 'times as long as the other', 'scans'
BROKEN = 'broken, or of another kind'
REFUSED = {
    'pixels': (lambda: encoded(Image.new('1', (10000, 9000))), PIXELS),
    'pixels beyond what Pillow opens': (lambda: encoded(Image.new('1', (20000, 9000))), PIXELS),
    'webp': (giant_webp, PIXELS),
    'gif': (giant_gif, PIXELS),
    'strip': (lambda: encoded(Image.new('RGB', (1, 21))), SIDES),
    'scans': (lambda: scan_bomb(2000), SCANS),
    'empty': (lambda: b'', BROKEN),
    'text': (lambda: b'no photo', BROKEN),
    'page': (lambda: b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>', BROKEN),
    'cut': (lambda: (PHOTOS / 'coffee.jpg').read_bytes()[:9000], BROKEN),
    'cut png': (lambda: encoded(Image.effect_noise((64, 64), 50))[:-500], BROKEN),
    'kind': (lambda: encoded(Image.new('RGB', (8, 8)), 'TIFF'), BROKEN),
}


@pytest.mark.interop
@pytest.mark.parametrize('case', REFUSED)
def test_photo_beyond_a_limit_is_refused_before_it_is_decoded(demo, case, tmp_path, monkeypatch):
    make, reason = REFUSED[case]
    path = tmp_path / 'photo'
    path.write_bytes(make())
    assert path.stat().st_size < 200_000
    if reason != BROKEN:
        def load(image):
            raise AssertionError('decoded')
        monkeypatch.setattr(ImageFile.ImageFile, 'load', load)
    with pytest.warns(Image.DecompressionBombWarning) if case == 'pixels' else contextlib.nullcontext():
        with pytest.raises(demo.PhotoError, match=reason):
            demo.read_photo(path)


@pytest.mark.interop
def test_limits_allow_what_is_just_within_them(demo, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, 'MAX_PIXELS', 1000)
    for size, allowed in (((25, 40), True), ((41, 25), False), ((7, 140), True), ((7, 141), False)):
        (tmp_path / 'photo.png').write_bytes(encoded(Image.new('RGB', size)))
        if allowed:
            assert demo.read_photo(tmp_path / 'photo.png').size == size
        else:
            with pytest.raises(demo.PhotoError):
                demo.read_photo(tmp_path / 'photo.png')
    monkeypatch.undo()
    (tmp_path / 'photo.jpg').write_bytes(scan_bomb(50))
    assert demo.read_photo(tmp_path / 'photo.jpg').size == (3000, 3000)


def animation():
    first, second = (Image.new('RGB', (8, 4), colour) for colour in ('red', 'blue'))
    return encoded(first, 'GIF', save_all=True, append_images=[second])


def palette():
    image = Image.new('P', (8, 4), 1)
    image.putpalette([0, 0, 0, 255, 0, 0])
    return encoded(image, transparency=1)


def turned():
    image = Image.new('RGB', (8, 4), 'blue')
    image.paste('red', (0, 0, 4, 4))
    exif = Image.Exif()
    exif[0x0112] = 6  # the top of the scene is on the right-hand side
    return encoded(image, 'JPEG', exif=exif, quality=100, subsampling=0)


@pytest.mark.interop
@pytest.mark.parametrize('content, size, colour', [
    (encoded(Image.new('1', (8, 4), 1)), (8, 4), (255, 255, 255)),
    (encoded(Image.new('L', (8, 4), 90)), (8, 4), (90, 90, 90)),
    (encoded(Image.new('LA', (8, 4), (90, 0))), (8, 4), (255, 255, 255)),
    (encoded(Image.new('RGBA', (8, 4), (255, 0, 0, 51))), (8, 4), (255, 204, 204)),
    (encoded(Image.new('I;16', (8, 4), 0x5A5A)), (8, 4), (90, 90, 90)),
    (encoded(Image.new('CMYK', (8, 4), (0, 255, 255, 0)), 'JPEG', quality=100), (8, 4), (255, 0, 0)),
    (palette(), (8, 4), (255, 255, 255)),
    (turned(), (4, 8), (255, 0, 0)),
    (animation(), (8, 4), (255, 0, 0)),
], ids=['1', 'L', 'LA', 'RGBA', '16 bits', 'CMYK', 'palette', 'turned', 'animation'])
def test_photo_of_any_mode_is_read_as_rgb(demo, content, size, colour, tmp_path):
    (tmp_path / 'photo').write_bytes(content)
    photo = demo.read_photo(tmp_path / 'photo')
    assert (photo.mode, photo.size) == ('RGB', size)
    np.testing.assert_allclose(photo.getpixel((1, 1)), colour, atol=3)


@pytest.mark.interop
@pytest.mark.filterwarnings('ignore:Corrupt EXIF data', 'ignore:Truncated File Read')
@pytest.mark.parametrize('kind', ['JPEG', 'PNG', 'WEBP', 'GIF'])
def test_damaged_file_is_shown_or_refused(demo, kind, tmp_path):
    photo = Image.open(PHOTOS / 'rocket.jpg').resize((60, 40))
    exif = Image.Exif()
    exif.update({0x0112: 6, 0x010F: 'maker', 0x011A: 72.5})
    whole = encoded(photo, kind, **({} if kind == 'GIF' else {'exif': exif}))
    draw = random.Random(0)
    refused = 0
    for _ in range(150):
        content = bytearray(whole)
        for _ in range(draw.randint(1, 4)):  # most of them in the head
            content[min(int(draw.expovariate(1 / 200)), len(content) - 1)] = draw.randrange(256)
        (tmp_path / 'photo').write_bytes(content[:draw.choice([None, None, draw.randrange(len(content))])])
        try:
            assert demo.read_photo(tmp_path / 'photo').mode == 'RGB'
        except demo.PhotoError:
            refused += 1
    assert refused > 20


def free_port():
    with socket.socket() as listener:
        listener.bind(('127.0.0.1', 0))
        return listener.getsockname()[1]


@contextlib.contextmanager
def serving(folder, command=('timm_gsa', 'demo'), options=(), **env):
    """The page as a process of its own, stopped at the end."""
    server = Server(folder, command, options, env)
    try:
        server.wait()
        yield server
    finally:
        server.stop()


class Server:
    """Process that serves the page; its temporary files and what it connects to are in a folder."""

    def __init__(self, folder, command, options, env):
        self.temporary = folder / 'temporary'
        self.temporary.mkdir()
        self._hosts = folder / 'hosts'
        self._output = (folder / 'output').open('w+')
        port = free_port()
        self.url = f'http://127.0.0.1:{port}'
        proxy = dict.fromkeys(('http_proxy', 'https_proxy', 'all_proxy'), 'http://127.0.0.1:9')  # nothing listens there
        env = {**os.environ, 'TMPDIR': str(self.temporary), 'HF_HUB_OFFLINE': '0', **proxy, **env}
        for name in ('GRADIO_SERVER_NAME', 'GRADIO_ANALYTICS_ENABLED', 'GRADIO_TEMP_DIR', 'no_proxy', 'NO_PROXY'):
            env.pop(name, None)
        self.process = subprocess.Popen(
            [sys.executable, *options, '-c', WATCHED, str(self._hosts), *command, '--port', str(port)],
            cwd=folder, env=env, stdout=self._output, stderr=subprocess.STDOUT)

    def said(self):
        self._output.seek(0)
        return self._output.read()

    def hosts(self):
        return set(self._hosts.read_text().split())

    def wait(self):
        deadline = time.monotonic() + 120
        while 'shows the page' not in self.said():
            assert self.process.poll() is None and time.monotonic() < deadline, self.said()
            time.sleep(0.1)

    def stop(self):
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(20)
        finally:
            self.process.kill()

    def memory(self, what):
        """VmRSS, the memory it has, or VmHWM, the most it had, in bytes."""
        return 1024 * int(re.search(rf'{what}:\s*(\d+)', Path(f'/proc/{self.process.pid}/status').read_text())[1])


@pytest.fixture(scope='module')
def server(demo, tmp_path_factory):
    with serving(tmp_path_factory.mktemp('server')) as server:
        yield server


def file_data(path):
    """How the page names an uploaded file."""
    return {'path': str(path), 'meta': {'_type': 'gradio.FileData'}}


class User:
    """One session with the page, by the requests that its script makes."""

    def __init__(self, url):
        import httpx  # comes with gradio
        self.http = httpx.Client(base_url=url, timeout=60, trust_env=False)
        self.session = uuid.uuid4().hex
        self.events = {each['targets'][-1][1]: each['id'] for each in self.http.get('/config').json()['dependencies']}

    def upload(self, content, name='photo.jpg'):
        return self.http.post('/gradio_api/upload', files={'files': (name, content)})

    def call(self, event, *data, **event_data):
        """What an event makes the page show, if anything, and the messages that pop up."""
        body = {'data': data, 'fn_index': self.events[event], 'event_data': event_data or None}
        self.http.post('/gradio_api/queue/join', json=body | {'session_hash': self.session}).raise_for_status()
        messages = []
        with self.http.stream('GET', '/gradio_api/queue/data', params={'session_hash': self.session}) as stream:
            for line in stream.iter_lines():
                message = json.loads(line.removeprefix('data: ')) if line else {}
                if message.get('msg') == 'log':
                    messages.append(message['log'])
                elif message.get('msg') == 'process_completed' and not message['success']:
                    return None, [*messages, message['output']['error']]
                elif message.get('msg') == 'process_completed':
                    *_, view, predictions, maps = message['output']['data']
                    return (Shown(view['url'], predictions, maps) if 'url' in view else None), messages
        raise AssertionError('no answer')

    def open(self, model=FASTEST):
        return self.call('load', model, None, None)

    def take(self, content, model=FASTEST, **kwargs):
        path = self.upload(content, **kwargs).raise_for_status().json()[0]
        return self.call('upload', model, file_data(path))

    def click(self, x, y, model=FASTEST):
        return self.call('select', model, None, None, index=[x, y], value=None)


class Shown:
    """Answer of the server in the terms of the page."""

    def __init__(self, view, predictions, maps):
        self.view = view
        self.classes = [each['label'] for each in predictions['confidences']]
        self.maps = [decoded(source) for source in re.findall('src="([^"]*)"', maps)]


def decoded(source):
    assert source.startswith('data:image/webp;base64,')
    return pixels(base64.b64decode(source.partition(',')[2]))


def pixels(content):
    return np.asarray(Image.open(io.BytesIO(content)).convert('RGB')).astype(int)


def changed(before, after):
    """Share of the pixels that differ visibly."""
    return (abs(before - after).max(-1) > 20).mean()


def expected_classes(demo, photo, model):
    classifier = demo.Classifier(model, img_size=96 if model == FIRST else None)
    return [each.name for each in classifier.predict(demo.read_photo(photo), 5)]


@pytest.mark.interop
def test_server_answers_with_the_classes_and_the_maps_of_the_place(demo, server):
    user = User(server.url)
    centre, messages = user.open('gsa_resnet_tiny')
    assert messages == []
    assert centre.classes == expected_classes(demo, PHOTOS / 'rocket.jpg', 'gsa_resnet_tiny')
    assert len(centre.maps) == MAPS['gsa_resnet_tiny']
    corner, _ = user.click(10, 440, 'gsa_resnet_tiny')
    assert all(changed(*each) > RING_ALONE for each in zip(centre.maps, corner.maps, strict=True))
    again, _ = user.click(223.5, 223.5, 'gsa_resnet_tiny')
    assert all(changed(*each) == 0 for each in zip(centre.maps, again.maps, strict=True))
    cup, _ = user.take((PHOTOS / 'coffee.jpg').read_bytes())
    assert cup.classes == expected_classes(demo, PHOTOS / 'coffee.jpg', FASTEST)


@pytest.mark.interop
def test_users_do_not_disturb_one_another(demo, server):
    def use(model, photo, x):
        user = User(server.url)
        answers = [user.take((PHOTOS / photo).read_bytes(), model)]
        for y in (30, 400):
            answers.append(user.click(x, y, model))
        return [shown for shown, _ in answers]

    cases = [('san_tiny_pairwise', 'coffee.jpg', 20), (FASTEST, 'chelsea.jpg', 400)]
    alone = {case: use(*case) for case in cases}
    with concurrent.futures.ThreadPoolExecutor() as pool:
        together = {case: pool.submit(use, *case) for case in alone}
    for case, answers in alone.items():
        for expected, shown in zip(answers, together[case].result(), strict=True):
            assert shown.classes == expected.classes
            assert len(shown.maps) == MAPS[case[0]]
            assert all(np.array_equal(*each) for each in zip(shown.maps, expected.maps, strict=True))


@pytest.mark.interop
def test_server_survives_what_it_refuses_and_needs_no_memory_for_it(server):
    user = User(server.url)
    before = None
    if sys.platform == 'linux':
        Path(f'/proc/{server.process.pid}/clear_refs').write_text('5')  # forget the most it had
        before = server.memory('VmRSS')
    started = time.monotonic()
    for case, (make, reason) in REFUSED.items():
        shown, messages = user.take(make(), name=f'{case}.png')
        assert shown is None and len(messages) == 1 and reason in messages[0], case
        assert '50 megapixels' in messages[0] or reason in (SIDES, SCANS)
    assert time.monotonic() - started < 15
    if before is not None:
        assert server.memory('VmHWM') - before < 60 * 2**20  # a decoded 'pixels' takes 90 MB
    shown, messages = user.take((PHOTOS / 'coffee.jpg').read_bytes())
    assert shown and not messages


@pytest.mark.interop
def test_server_limits_uploads_and_whole_requests(demo, server):
    user = User(server.url)
    large = user.upload(bytes(demo.MAX_BYTES + 1))
    assert large.status_code == 413 and str(demo.MAX_BYTES) in large.text
    assert user.upload(bytes(demo.MAX_BYTES)).status_code == 200
    several = [('files', (f'{i}.jpg', bytes(demo.MAX_BYTES // 2))) for i in range(3)]
    assert user.http.post('/gradio_api/upload', files=several).status_code == 413
    inline = {'path': 'x', 'url': 'data:image/png;base64,' + 'A' * (demo.MAX_BYTES + demo.MAX_OVERHEAD)}
    assert user.http.post('/gradio_api/queue/join', json={'data': [inline]}).status_code == 413
    assert user.open()[0]


@pytest.mark.interop
@pytest.mark.parametrize('event', ['upload', 'change'])
def test_server_fetches_nothing_that_a_request_names(server, event):
    user = User(server.url)
    for path in ('http://192.0.2.1/photo.jpg', 'https://example.com/photo.jpg'):
        data = (FASTEST, file_data(path)) if event == 'upload' else (file_data(path), None, None)
        shown, messages = user.call(event, *data)
        assert shown is None and messages == ['A photo has to be uploaded; no address is allowed.']
    shown, _ = user.call('upload', FASTEST, file_data(PHOTOS / 'coffee.jpg'))
    assert shown is None  # nor does it read files of the server
    assert user.open()[0]
    assert server.hosts() <= {'127.0.0.1', 'localhost'}


@pytest.mark.interop
def test_what_an_upload_that_broke_off_leaves_is_removed(demo, server):
    user = User(server.url)
    uploads = next(server.temporary.glob('timm-gsa-demo-*'))
    host, port = server.url.removeprefix('http://').split(':')
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(
            b'POST /gradio_api/upload HTTP/1.1\r\nHost: x\r\nContent-Type: multipart/form-data; boundary=b\r\n'
            b'Content-Length: 9000\r\n\r\n'
            b'--b\r\nContent-Disposition: form-data; name="files"; filename="a.jpg"\r\n\r\nhalf')
        deadline = time.monotonic() + 20
        while not (parts := list(uploads.glob('tmp*'))):
            assert time.monotonic() < deadline
            time.sleep(0.05)
    user.upload(b'new')
    assert [part for part in parts if part.exists()] == parts  # it might be under way
    for part in parts:
        os.utime(part, (0, time.time() - demo.KEEP_SECONDS - 1))
    user.upload(b'newer')
    assert not [part for part in parts if part.exists()]


@pytest.mark.interop
def test_uploads_are_deleted_after_a_while_and_photos_of_the_page_stay(demo, tmp_path, monkeypatch):
    monkeypatch.setenv('GRADIO_TEMP_DIR', str(tmp_path))
    monkeypatch.setattr(demo, 'KEEP_SECONDS', 2)
    monkeypatch.setattr(demo, 'SWEEP_SECONDS', 1)
    page = demo.Page({'san_tiny_pairwise': demo.Classifier('san_tiny_pairwise')})
    demo.launch(page, '127.0.0.1', free_port(), tmp_path)
    try:
        user = User(page.local_url)
        thumbnails = re.findall(r'/gradio_api/file=[^"]*\.jpg', user.http.get('/config').text)
        shown, _ = user.take(encoded(Image.new('RGB', (50, 40), 'red')), 'san_tiny_pairwise')
        user.upload(b'never used', name='other.png')
        files = {path.name for path in tmp_path.rglob('*') if path.is_file()}
        assert {'photo.jpg', 'other.png', 'image.webp'} <= files
        deadline = time.monotonic() + 20
        while {'photo.jpg', 'other.png', 'image.webp'} & {path.name for path in tmp_path.rglob('*') if path.is_file()}:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert len(thumbnails) == 4
        assert {user.http.get(url).status_code for url in thumbnails} == {200}
        shown, messages = user.click(3, 3, 'san_tiny_pairwise')
        assert shown is None and 'no longer here' in messages[0]
    finally:
        page.close(verbose=False)


@pytest.mark.interop
def test_space_runs_from_its_folder_alone_and_leaves_nothing(demo, tmp_path):
    import make_space
    space = tmp_path / 'space'
    assert make_space.main([str(space)]) == 0
    card = (space / 'README.md').read_text(encoding='utf-8').split('---\n')
    front = yaml.safe_load(card[1])
    assert front['sdk'] == 'gradio' and (space / front['app_file']).is_file()
    assert front['sdk_version'] == sys.modules['gradio'].__version__
    assert front['models'] == [
        'timm-gsa/gsa_resnet50.tin200', *(timm.get_pretrained_cfg(name).hf_hub_id for name in list(MAPS)[1:])]
    assert len(front['short_description']) <= 60
    requirements = (space / 'requirements.txt').read_text().split()
    assert f'timm=={timm.__version__}' in requirements

    # Without site, nothing that an editable install put on the path is there, and so no checkout.
    packages = [path for path in sys.path if path.endswith('site-packages')]
    alone = dict(options=['-S'], PYTHONPATH=os.pathsep.join(packages))
    found = subprocess.run(
        [sys.executable, '-S', '-c', 'import importlib.util as i; print(i.find_spec("timm_gsa").origin)'],
        cwd=space, env={**os.environ, 'PYTHONPATH': alone['PYTHONPATH']}, capture_output=True, text=True, timeout=60)
    assert found.stdout.strip() == str(space / 'timm_gsa' / '__init__.py'), found.stderr
    (tmp_path / 'run').mkdir()
    with serving(tmp_path / 'run', command=[str(space / 'app.py')], **alone) as server:
        shown, _ = User(server.url).take((PHOTOS / 'coffee.jpg').read_bytes(), 'san_tiny_patchwise')
        assert list(server.temporary.rglob('photo.jpg'))
    assert shown.classes == expected_classes(demo, PHOTOS / 'coffee.jpg', 'san_tiny_patchwise')
    assert server.hosts() <= {'127.0.0.1', 'localhost'}
    assert server.process.returncode == 0
    assert not [path for path in server.temporary.rglob('*') if path.is_file()]


@pytest.mark.interop
def test_space_is_written_whole_or_not_at_all(demo, tmp_path, monkeypatch, capsys):
    import make_space
    (tmp_path / 'full').mkdir()
    (tmp_path / 'full' / 'file').touch()
    with pytest.raises(SystemExit, match='2'):
        make_space.main([str(tmp_path / 'full')])
    assert 'not empty' in capsys.readouterr().err
    monkeypatch.setattr(make_space, 'ROOT', tmp_path)  # which holds no LICENSE
    with pytest.raises(SystemExit, match='2'):
        make_space.main([str(tmp_path / 'new')])
    assert [path.name for path in tmp_path.iterdir()] == ['full']


def test_without_gradio_the_error_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, 'gradio', None)
    with pytest.raises(SystemExit, match='2'):
        main(['demo'])
    assert 'needs gradio' in (said := capsys.readouterr().err) and 'pip install "timm-gsa[demo]"' in said


@pytest.mark.interop
def test_options_that_cannot_be_served_are_refused(demo, monkeypatch, capsys, tmp_path):
    def refused(*arguments):
        with pytest.raises(SystemExit, match='2'):
            main(['demo', *arguments])
        error = capsys.readouterr().err
        assert 'Traceback' not in error
        return error

    assert 'from 1 to 65535' in refused('--port', '0')
    assert 'no_such_model' in refused('--model', 'no_such_model')
    assert 'gsa_resnet_tiny.c100' in refused('--model', 'san_tiny_pairwise', '--model', 'gsa_resnet26')
    for name in ('GRADIO_TEMP_DIR', 'no_proxy', 'NO_PROXY'):
        monkeypatch.setenv(name, 'restored at the end')
    monkeypatch.setattr(signal, 'signal', lambda *_: None)
    with socket.create_server(('127.0.0.1', 0)) as taken:
        port = str(taken.getsockname()[1])
        assert f'cannot listen on 127.0.0.1:{port}' in refused('--model', 'san_tiny_pairwise', '--port', port)
    create = timm.create_model
    monkeypatch.setattr(timm, 'create_model', lambda name, **kwargs: create(name, **{**kwargs, 'pretrained': False}))
    assert 'resnet18: model must contain attention layers' in refused('--model', 'resnet18')


@pytest.fixture(scope='module')
def browser():
    sync_api = pytest.importorskip('playwright.sync_api', reason='needs playwright, of the extra browser')
    executable = next(filter(None, map(shutil.which, BROWSERS)), None)
    if executable is None:
        pytest.skip(f'needs a browser: {", ".join(BROWSERS)}')
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=list(BROWSER_ARGUMENTS))
        yield browser
        browser.close()


class Visit:
    """The page in a browser."""

    def __init__(self, page, url):
        self.page = page
        self.requests = []
        self.errors = []
        page.on('request', lambda request: self.requests.append(request.url))
        page.on('pageerror', lambda error: self.errors.append(str(error)))
        page.on('console', self._hear)
        page.goto(url)
        page.wait_for_selector('#maps figure img')

    def _hear(self, message):
        # Gradio asks how far an upload is even if it is over, and says "Response" of the 404 that it gets.
        if message.type == 'error' and 'upload_progress' not in message.location['url'] and message.text != 'Response':
            self.errors.append(message.text)

    def after(self, act):
        """Do something and wait until other maps are there; the rest of the answer comes with them."""
        before = self.page.get_attribute('#maps figure img', 'src')
        act()
        self.page.wait_for_function(
            'before => { const map = document.querySelector("#maps figure img"); return map && map.src !== before }',
            arg=before, timeout=120_000)
        self.page.wait_for_selector('#view [data-testid=status-tracker].hide', state='attached')
        self.page.wait_for_function('[...document.images].every(image => image.complete)')

    def warning_after(self, act):
        act()
        text = self.page.wait_for_selector('.toast-body').inner_text()
        self.page.evaluate('document.querySelector(".toast-close")?.click()')  # it may have closed by itself
        self.page.wait_for_selector('.toast-body', state='detached')
        return text

    def choose(self, model):
        self.after(lambda: self.page.check(f'#model input[value={model}]'))

    def upload(self, *files):
        self.page.set_input_files('#drop input[type=file]', *files)

    def drop(self, path):
        """Let go of a file over the page."""
        content = base64.b64encode(path.read_bytes()).decode()
        transfer = self.page.evaluate_handle('''([name, content]) => {
            const bytes = Uint8Array.from(atob(content), letter => letter.charCodeAt(0))
            const transfer = new DataTransfer()
            transfer.items.add(new File([bytes], name, {type: 'image/jpeg'}))
            return transfer
        }''', [path.name, content])
        self.page.dispatch_event('#drop button', 'drop', {'dataTransfer': transfer})

    def maps(self):
        return [decoded(image.get_attribute('src')) for image in self.page.query_selector_all('#maps figure img')]

    def classes(self):
        return [each.inner_text() for each in self.page.query_selector_all('#predictions dt')]

    def picture(self, selector):
        """What is on the screen there."""
        return pixels(self.page.locator(selector).first.screenshot())

    def has_ring(self, x, y):
        """Whether the photo has a white ring in a black one around a place, given as shares of width and height."""
        data = self.page.evaluate('''async source => {
            const bytes = new Uint8Array(await (await fetch(source)).arrayBuffer())
            return btoa(String.fromCharCode(...bytes))
        }''', self.page.get_attribute('#view img', 'src'))
        view = pixels(base64.b64decode(data)).mean(-1)
        angles = np.linspace(0, 2 * np.pi, 24, endpoint=False)

        def circle(left, top, radius):
            rows, columns = top + radius * np.sin(angles), left + radius * np.cos(angles)
            return view[rows.round().astype(int), columns.round().astype(int)]

        x, y = round(x * view.shape[1]), round(y * view.shape[0])
        places = [(x + dx, y + dy) for dx in range(-3, 4) for dy in range(-3, 4)]
        return any(circle(*place, 8.5).min() > 150 and circle(*place, 11).max() < 150 for place in places)

    def click(self, x, y):
        """Click on the photo, at shares of its width and height."""
        box = self.page.locator('#view img').bounding_box()
        press = self.page.tap if self.page.evaluate('navigator.maxTouchPoints') else self.page.click
        self.after(lambda: press('#view img', position={'x': x * box['width'], 'y': y * box['height']}))

    def boxes(self):
        selectors = ('#model', '#drop', '#examples', '#view img', '#predictions', '#maps figure')
        return {name: [each.bounding_box() for each in self.page.query_selector_all(name)] for name in selectors}


@pytest.fixture
def visit(browser, server, request, tmp_path):
    """A visit in a window of a size, at the end of which nothing went wrong and no other host was asked."""
    width, height = getattr(request, 'param', (1280, 900))
    context = browser.new_context(
        viewport={'width': width, 'height': height}, has_touch=width < 500, device_scale_factor=2 if width < 500 else 1)
    visit = Visit(context.new_page(), server.url)
    yield visit
    requests = [url for url in visit.requests if not url.startswith(('data:', 'blob:'))]
    context.close()
    assert visit.errors == []
    assert len(requests) > 10
    assert [url for url in requests if not url.startswith(server.url)] == []
    assert server.hosts() <= {'127.0.0.1', 'localhost'}


def shot(visit, name):
    """Screenshot of the whole page, also left in a folder if one is wanted, in 256 colours."""
    visit.page.mouse.move(0, 0)
    picture = Image.open(io.BytesIO(visit.page.screenshot(full_page=True))).convert('RGB')
    folder = os.environ.get('TIMM_GSA_SCREENSHOTS')
    if folder:
        colours = picture.quantize(256, method=Image.Quantize.MAXCOVERAGE, kmeans=2)
        small = picture.quantize(palette=colours, dither=Image.Dither.FLOYDSTEINBERG)
        small.save(Path(folder, f'{name}.png'), optimize=True)
    return picture


@pytest.mark.interop
def test_page_draws_what_the_clicked_pixel_attends_to(visit, demo):
    assert visit.has_ring(0.5, 0.5)
    assert visit.classes() == expected_classes(demo, PHOTOS / 'rocket.jpg', FIRST)
    assert [each.inner_text() for each in visit.page.query_selector_all('#maps figcaption b')] == [
        f'layer{stage}.{block}.conv2 {kind}' for kind in ('content', 'position')
        for stage, block in enumerate((2, 3, 5, 2), start=1)]
    before, on_screen = visit.maps(), visit.picture('#maps')
    assert all(len(np.unique(each.reshape(-1, 3), axis=0)) > 100 for each in before)

    visit.click(0.3, 0.8)
    assert visit.has_ring(0.3, 0.8) and not visit.has_ring(0.5, 0.5)
    after = visit.maps()
    assert all(changed(*each) > RING_ALONE for each in zip(before, after, strict=True))
    assert changed(on_screen, visit.picture('#maps')) > 0.1
    assert visit.classes() == expected_classes(demo, PHOTOS / 'rocket.jpg', FIRST)


@pytest.mark.interop
def test_page_shows_every_model_at_the_same_place(visit, demo):
    visit.click(0.48, 0.45)
    for model in (*list(MAPS)[1:], FIRST):
        before = visit.picture('#maps')
        visit.choose(model)
        assert len(visit.maps()) == MAPS[model]
        assert visit.classes() == expected_classes(demo, PHOTOS / 'rocket.jpg', model)
        assert visit.has_ring(0.48, 0.45)
        after = visit.picture('#maps')
        assert before.shape != after.shape or changed(before, after) > 0.1
        if model == FIRST:
            assert len(shot(visit, 'desktop').getcolors(1 << 24)) > 1000


@pytest.mark.interop
def test_page_takes_photos_of_its_own_dropped_and_chosen(visit, demo):
    visit.click(0.2, 0.2)
    visit.after(lambda: visit.page.click('#examples button >> nth=1'))
    assert visit.classes() == expected_classes(demo, PHOTOS / 'coffee.jpg', FIRST)
    assert visit.has_ring(0.5, 0.5)
    before = visit.picture('#view')
    visit.after(lambda: visit.drop(PHOTOS / 'astronaut.jpg'))
    assert visit.classes() == expected_classes(demo, PHOTOS / 'astronaut.jpg', FIRST)
    assert changed(before, visit.picture('#view')) > 0.5
    visit.after(lambda: visit.upload(PHOTOS / 'chelsea.jpg'))
    assert visit.classes() == expected_classes(demo, PHOTOS / 'chelsea.jpg', FIRST)
    visit.click(0.9, 0.9)
    assert visit.classes() == expected_classes(demo, PHOTOS / 'chelsea.jpg', FIRST)


@pytest.mark.interop
def test_page_says_what_is_allowed_and_goes_on(visit, demo, tmp_path):
    before = visit.maps()
    for name, content, said in (
            ('broken.jpg', (PHOTOS / 'coffee.jpg').read_bytes()[:5000], demo.ALLOWED),
            ('giant.webp', giant_webp(), demo.ALLOWED),
            ('text.txt', b'no photo', 'image/*'),
            ('large.jpg', bytes(demo.MAX_BYTES + 1), '20.0 Mb'),
    ):
        (tmp_path / name).write_bytes(content)
        assert said in visit.warning_after(lambda name=name: visit.upload(tmp_path / name))
    assert all(np.array_equal(*each) for each in zip(before, visit.maps(), strict=True))
    visit.after(lambda: visit.upload(PHOTOS / 'coffee.jpg'))
    assert visit.classes() == expected_classes(demo, PHOTOS / 'coffee.jpg', FIRST)


@pytest.mark.interop
@pytest.mark.parametrize('visit', [(1280, 900), (390, 844)], indirect=True, ids=['desktop', 'phone'])
def test_page_fits_the_window(visit):
    width = visit.page.viewport_size['width']
    if width == 1280:
        check_layout(visit, 1280)
        photo = visit.page.locator('#view img').bounding_box()
        assert photo['y'] + photo['height'] < 900  # to be clicked on without scrolling
        visit.page.set_viewport_size({'width': 820, 'height': 1100})
        check_layout(visit, 820)
    else:
        check_layout(visit, 390)
        visit.click(0.25, 0.6)
        assert visit.has_ring(0.25, 0.6)
        assert shot(visit, 'phone').width == 2 * width


def check_layout(visit, width):
    """Everything is there, within the window, and nothing over anything else."""
    boxes = visit.boxes()
    assert len(boxes.pop('#maps figure')) == MAPS[FIRST]
    boxes = {name: box for name, (box,) in boxes.items()}
    boxes |= {f'map {i}': each.bounding_box() for i, each in enumerate(visit.page.query_selector_all('#maps figure'))}
    assert visit.page.evaluate('document.documentElement.scrollWidth') <= width
    for name, box in boxes.items():
        assert box['x'] >= 0 and box['x'] + box['width'] <= width, name
        assert box['width'] >= 150 and box['height'] >= 60, name
    names = list(boxes)
    for i, name in enumerate(names):
        for other in names[i + 1:]:
            one, two = boxes[name], boxes[other]
            apart = (
                one['x'] + one['width'] <= two['x'] or two['x'] + two['width'] <= one['x']
                or one['y'] + one['height'] <= two['y'] or two['y'] + two['height'] <= one['y'])
            assert apart, (name, other)
