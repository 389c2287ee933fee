"""The tool that compares rules for position tables at other sizes."""
import sizes
import timm
import torch
from PIL import Image

from timm_gsa.layers import GlobalSelfAttention


def test_in_place_keeps_each_embedding_at_its_offset():
    table = torch.arange(1., 8.)[:, None]  # offsets -3 to 3
    assert sizes.in_place(table, 2).flatten().tolist() == [3, 4, 5]
    assert torch.equal(sizes.in_place(table, 4), table)
    assert sizes.in_place(table, 6).flatten().tolist() == [0, 0, 1, 2, 3, 4, 5, 6, 7, 0, 0]
    assert sizes.in_place(table, 5, 'replicate').flatten().tolist() == [1, 1, 2, 3, 4, 5, 6, 7, 7]
    torch.testing.assert_close(sizes.unscaled(table, 7).flatten(), torch.linspace(1, 7, 13))


def test_stretching_beforehand_is_what_the_layer_does_itself():
    model = timm.create_model('gsa_resnet_tiny', pretrained=True).eval()
    image = torch.randn(1, 3, 96, 96)
    expected = model(image)
    sizes.fit(model, 96, sizes.RULES['stretch'])
    tables = [layer.rel_h.shape[0] for layer in model.modules() if isinstance(layer, GlobalSelfAttention)]
    assert tables == [2 * side - 1 for side in (24, 24, 12, 6)]
    torch.testing.assert_close(model(image), expected)


def test_table_has_a_row_for_each_size(tmp_path, capsys):
    for name in ('a', 'b'):
        (tmp_path / 'val' / name).mkdir(parents=True)
        Image.new('RGB', (64, 64), 'red').save(tmp_path / 'val' / name / '0.png')
    sizes.main(['--model', 'gsa_resnet_tiny', '--data-dir', str(tmp_path), '--sizes', '32', '64', '--rules', 'stretch'])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == '| size | stretch, top-1 | top-5 |'
    assert [line[:8] for line in lines[2:]] == ['| 32 px ', '| 64 px ']
