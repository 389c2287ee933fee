"""segmentation_models_pytorch: every family as a `tu-` encoder."""
import re
from itertools import cycle

import pytest
import timm
import torch
from torch.nn import functional as F

from timm_gsa.models._families import family_of, tiny_models

pytestmark = pytest.mark.interop

LIBRARY = 'segmentation-models-pytorch'
UNET = '`Unet` on a `tu-` encoder: a training step, odd image sizes, `in_channels=`, `encoder_depth=`'
# Decoders with the stride that must divide the sides of images.
DECODERS = {
    'UnetPlusPlus': 32, 'MAnet': 32, 'Linknet': 32, 'FPN': 32, 'UPerNet': 32, 'Segformer': 32,
    'PAN': 16, 'DeepLabV3Plus': 16, 'PSPNet': 8, 'DeepLabV3': 8,
}


# Those that ask the encoder for a smaller stride, which must be one of its family's.
OUTPUT_STRIDES = {'PAN': 16, 'DeepLabV3Plus': 16, 'DeepLabV3': 8}


def decoders():
    """A model for each decoder, in turn, that can give its stride."""
    for model, decoder in zip(cycle(tiny_models()), DECODERS, strict=False):
        fits = OUTPUT_STRIDES.get(decoder, 32) in family_of(model).output_strides
        yield model if fits else tiny_models()[0], decoder


def features(maps):
    """Maps of an encoder without the image and the empty map that stands for a missing stride of 2."""
    return [each for each in maps[1:] if each.shape[1]]


def assert_trains(net, assert_own_layers_learn, channels=3, size=(64, 96)):
    images, masks = torch.randn(2, channels, *size), torch.randint(3, (2, *size))
    scores = net.train()(images)
    assert scores.shape == (2, 3, *size)
    F.cross_entropy(scores, masks).backward()
    assert_own_layers_learn(net.encoder)


def test_unet_takes_images_of_any_size(ours, needs, assert_own_layers_learn):
    smp = needs(LIBRARY, UNET, ours)
    net = smp.Unet(f'tu-{ours}', encoder_weights=True, classes=3).eval()
    plain = timm.create_model(ours, pretrained=True).eval()
    with torch.no_grad():
        for size in ((64, 96), (65, 97), (33, 47)):
            images = torch.randn(1, 3, *size)
            maps = net.encoder(images)
            torch.testing.assert_close(
                features(maps), plain.forward_intermediates(images, intermediates_only=True))
            assert net(images).shape == (1, 3, *size)
    assert_trains(net, assert_own_layers_learn)


def test_unet_with_other_channels_and_fewer_stages(ours, needs, assert_own_layers_learn):
    smp = needs(LIBRARY, UNET, ours)
    net = smp.Unet(
        f'tu-{ours}', encoder_weights=True, classes=3, in_channels=1, encoder_depth=3,
        decoder_channels=(32, 16, 8)).eval()
    plain = timm.create_model(ours, pretrained=True, in_chans=1).eval()
    images = torch.randn(1, 1, 64, 64)
    with torch.no_grad():
        maps = features(net.encoder(images))
        indices = [i for i, stride in enumerate(family_of(ours).strides) if stride <= 8]
        expected = plain.forward_intermediates(images, indices=indices, intermediates_only=True)
    torch.testing.assert_close(maps, expected)
    assert_trains(net, assert_own_layers_learn, channels=1)


@pytest.mark.parametrize('ours, decoder', decoders())
def test_other_decoders_want_multiples_of_their_stride(
        ours, decoder, needs, control, record_property, assert_own_layers_learn):
    smp = needs(LIBRARY, 'the ten other convolutional decoders: a training step, odd image sizes', ours)
    make = getattr(smp, decoder)
    name, shape = control
    net = make(f'tu-{ours}', encoder_weights=True, classes=3).eval()
    images = torch.randn(1, 3, 129, 145)
    refusals = []
    for each in (net, make(f'tu-{name}', encoder_weights=None, classes=3, **shape).eval()):
        with pytest.raises(RuntimeError, match=f'divisible by {DECODERS[decoder]}') as refusal:
            each(images)
        refusals.append(str(refusal.value))
    assert refusals[0] == refusals[1]
    height, width = map(int, re.findall(r'pad your images to shape \((\d+), (\d+)\)', refusals[0])[0])
    with torch.no_grad():
        assert net(F.pad(images, (0, width - 145, 0, height - 129))).shape == (1, 3, height, width)
    assert_trains(net, assert_own_layers_learn, size=(128, 160))
    record_property('result', 'works untouched; images padded to multiples of 8, 16 or 32, as for any encoder')
