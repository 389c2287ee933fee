"""transformers: TimmBackbone, and TimmWrapper and its pipeline on folders; tests/hub has them on a Hub."""
import json

import pytest
import timm
import torch
from _hub_entry import Entry
from PIL import Image
from safetensors.torch import save_file

from timm_gsa.commands._inputs import PHOTOS as PACKAGED

pytestmark = pytest.mark.interop

PHOTO = PACKAGED / 'rocket.jpg'


def maps(model, images, indices=None):
    with torch.no_grad():
        return model.eval().forward_intermediates(images, indices=indices, intermediates_only=True)


def running_means(module):
    return torch.cat([each.running_mean for each in module.modules() if isinstance(each, torch.nn.BatchNorm2d)])


def refuses(load, folder):
    """Whether transformers gives `num_classes` to timm twice, once by itself and once from config.json."""
    try:
        load(folder)
    except TypeError as error:
        assert "multiple values for keyword argument 'num_classes'" in str(error)
        return True
    return False


def test_backbone_gives_the_models_own_maps(
        ours, pyramid, needs, control, create, tmp_path, record_property, assert_own_layers_learn, assert_maps_close):
    transformers = needs('transformers', '`TimmBackbone`: feature maps, gradients', ours)
    images = torch.randn(2, 3, 64, 96)
    model = timm.create_model(ours, pretrained=True)
    expected = maps(model, images, pyramid)
    nested = '.' in model.feature_info[-1]['module']  # transformers looks for hidden states among direct children
    config = transformers.TimmBackboneConfig(backbone=ours, out_indices=pyramid, freeze_batch_norm_2d=True)
    backbone = transformers.TimmBackbone(config, pretrained=True).eval()
    with torch.no_grad():
        assert_maps_close(backbone(images).feature_maps, expected)
        backbone.unfreeze_batch_norm_2d()
        torch.testing.assert_close(list(backbone.eval()(images).feature_maps), expected)
        if not nested:
            output = backbone(images, output_hidden_states=True)
            torch.testing.assert_close(list(output.feature_maps), expected)
            torch.testing.assert_close(list(output.hidden_states)[1:], expected)
    sum(each.square().mean() for each in backbone.train()(images).feature_maps).backward()
    assert_own_layers_learn(backbone)
    if nested:
        config = transformers.TimmBackboneConfig(backbone='test_convnext', out_indices=pyramid)
        for each in (backbone, transformers.TimmBackbone(config, pretrained=False)):
            with pytest.raises(IndexError):
                each.eval()(images, output_hidden_states=True)

    plain = transformers.TimmBackbone.from_pretrained(ours, out_indices=pyramid).eval()
    if not running_means(plain).any():  # transformers draws buffers anew after timm has loaded them
        name, shape = control
        save_file(create(name).state_dict(), tmp_path / 'control.safetensors')
        weights = dict(file=str(tmp_path / 'control.safetensors'))
        assert not running_means(
            transformers.TimmBackbone.from_pretrained(name, pretrained_cfg_overlay=weights, **shape)).any()
        result = (
            'needs `freeze_batch_norm_2d=True`, then `unfreeze_batch_norm_2d()`: '
            "otherwise it resets running statistics, also of timm's ResNets")
        if nested:
            result += "; `output_hidden_states=True` fails, as for timm's ConvNeXts"
        record_property('result', result)
    else:
        with torch.no_grad():
            torch.testing.assert_close(list(plain(images).feature_maps), expected)


def test_folder_as_published(ours, needs, tmp_path, assert_own_layers_learn):
    transformers = needs(
        'transformers', "`AutoModel`, `AutoModelForImageClassification`, `pipeline`: an entry's folder", ours)
    folder = tmp_path / f'{ours}.c100'
    Entry(f'{ours}.c100').export(folder)
    own = timm.create_model(ours, pretrained=True).eval()
    photo = Image.open(PHOTO).convert('RGB')
    pixels = transformers.AutoImageProcessor.from_pretrained(folder)(photo, return_tensors='pt')['pixel_values']
    transform = timm.data.create_transform(**timm.data.resolve_data_config({}, model=own))
    torch.testing.assert_close(pixels, transform(photo).unsqueeze(0))
    classifier = transformers.AutoModelForImageClassification.from_pretrained(folder).eval()
    features = transformers.AutoModel.from_pretrained(folder).eval()
    with torch.no_grad():
        torch.testing.assert_close(classifier(pixels).logits, own(pixels))
        output = features(pixels, output_hidden_states=True)
        torch.testing.assert_close(output.last_hidden_state, own.forward_features(pixels))
        torch.testing.assert_close(output.pooler_output, own.forward_head(output.last_hidden_state, pre_logits=True))
        torch.testing.assert_close(list(output.hidden_states), maps(own, pixels))
        best, score = (each.item() for each in reversed(own(pixels).softmax(1).max(1)))
    [first] = transformers.pipeline('image-classification', str(folder), device='cpu')(photo, top_k=1)
    assert first == {'label': own.pretrained_cfg['label_names'][best], 'score': pytest.approx(score, abs=1e-4)}

    tuned = transformers.AutoModelForImageClassification.from_pretrained(
        folder, num_labels=3, ignore_mismatched_sizes=True).train()
    tuned(torch.randn(4, 3, 64, 64), labels=torch.tensor([0, 1, 2, 0])).loss.backward()
    assert_own_layers_learn(tuned)


def test_folder_of_save_for_hf(ours, needs, control, create, tmp_path, record_property):
    transformers = needs('transformers', "`AutoModelForImageClassification`: a folder of timm's `save_for_hf`", ours)
    load = transformers.AutoModelForImageClassification.from_pretrained
    # Tables of another size than the architecture's have to come through.
    model = create(ours, num_classes=7, **(dict(img_size=(96, 64)) if ours == 'gsa_resnet_tiny' else {})).eval()
    timm.models.save_for_hf(model, tmp_path / 'ours', safe_serialization=True)
    timm.models.save_for_hf(create(control[0], num_classes=7), tmp_path / 'control', safe_serialization=True)
    if refuses(load, tmp_path / 'ours'):
        assert refuses(load, tmp_path / 'control')
        arguments = json.loads((tmp_path / 'ours' / 'config.json').read_text())['model_args']
        del arguments['num_classes']
        loaded = load(tmp_path / 'ours', model_args=arguments)
        record_property(
            'result', 'needs `model_args=`: those of config.json without `num_classes`, as for timm\'s ResNets')
    else:
        loaded = load(tmp_path / 'ours')
    images = torch.randn(2, 3, 96, 64)
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(images).logits, model(images))


def test_no_attentions(ours, needs, record_property):
    transformers = needs('transformers', '`output_attentions=True`', ours)
    backbone = transformers.TimmBackbone(transformers.TimmBackboneConfig(backbone=ours))
    wrapper = transformers.TimmWrapperForImageClassification(transformers.TimmWrapperConfig(architecture=ours))
    for model in (backbone, wrapper):
        with pytest.raises(ValueError, match='timm'):
            model(torch.randn(1, 3, 64, 64), output_attentions=True)
    record_property(
        'result', 'cannot: transformers refuses it for all models of timm; `timm_gsa.attention_maps` gives them')
