from pathlib import Path

import pytest
from PIL import Image

from timm_gsa.commands import main
from timm_gsa.commands._inputs import PHOTOS


@pytest.fixture
def classify(tmp_path, monkeypatch, capsys):
    """Runs the command in an empty folder; returns its status and the lines of its output and of its messages."""
    def classify(*arguments):
        monkeypatch.chdir(tmp_path)
        status = main(['classify', *map(str, arguments)])
        said = capsys.readouterr()
        return status, said.out.splitlines(), said.err.splitlines()
    return classify


def test_classify_names_what_is_in_the_photos_and_draws_a_picture_of_each(classify, tmp_path):
    status, said, _ = classify('--save-dir', 'out')
    assert status == 0
    lines = dict(line.split(': ', 1) for line in said)
    assert sorted(lines) == ['astronaut.jpg', 'chelsea.jpg', 'coffee.jpg', 'rocket.jpg']
    assert 'projectile' in lines['rocket.jpg'] and 'espresso' in lines['coffee.jpg']
    for name, listing in lines.items():
        assert listing.count(' %') == 5
        with Image.open(tmp_path / 'out' / f'{Path(name).stem}.png') as picture:
            assert picture.width > picture.height >= 320
            assert len(picture.getcolors(1 << 24)) > 100
    assert sorted(p.name for p in (tmp_path / 'out').iterdir()) == [
        'astronaut.png', 'chelsea.png', 'coffee.png', 'rocket.png']


def test_classify_names_the_files_it_cannot_read_and_classifies_the_others(classify, tmp_path):
    photo = next(PHOTOS.glob('*.jpg'))
    (tmp_path / 'empty.jpg').touch()
    (tmp_path / 'text.jpg').write_text('no image')
    (tmp_path / 'cut.jpg').write_bytes(photo.read_bytes()[:5000])
    (tmp_path / 'folder').mkdir()
    Image.new('1', (15000, 15000)).save(tmp_path / 'bomb.png')  # beyond twice Pillow's limit of pixels
    Image.new('RGBA', (3, 200), 'red').save(tmp_path / 'thin.png')
    Image.new('I;16', (40, 30), 999).save(tmp_path / 'deep.png')
    bad = ['missing.jpg', 'empty.jpg', 'text.jpg', 'cut.jpg', 'folder', 'bomb.png']
    status, said, refused = classify(
        photo, *bad, 'thin.png', 'deep.png', photo, '--top-k', 2, '--model', 'san_tiny_patchwise', '--save-dir', 'out')
    assert status == 1
    assert [line.split(': not classified: ')[0] for line in refused] == bad
    assert all(line.split(': not classified: ')[1] for line in refused)
    assert len(said) == 4 and all(line.count(' %') == 2 for line in said)
    assert sorted(p.name for p in (tmp_path / 'out').iterdir()) == sorted(
        [f'{photo.stem}.png', f'{photo.stem}-2.png', 'thin.png', 'deep.png'])


@pytest.mark.parametrize('arguments, message', [
    (['--model', 'gsa_resnet26'], 'gsa_resnet_tiny.c100'),
    (['--model', 'no_such_model'], 'no_such_model'),
    (['--top-k', '0'], 'at least 1'),
])
def test_classify_refuses_what_it_cannot_do(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match='2'):
        main(['classify', *arguments])
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
