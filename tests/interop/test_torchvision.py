"""torchvision: detectors with a feature pyramid on `features_only`, and its graph of features."""
import pytest
import timm
import torch

pytestmark = pytest.mark.interop


@pytest.mark.parametrize('kind', ['FasterRCNN', 'RetinaNet'])
def test_detector_trains_and_detects(ours, pyramid, kind, needs, assert_own_layers_learn):
    needs('torchvision', '`FasterRCNN` and `RetinaNet`, `BackboneWithFPN` on `features_only`: a step, boxes', ours)
    from torchvision.models import detection
    from torchvision.models.detection.anchor_utils import AnchorGenerator
    from torchvision.models.detection.backbone_utils import BackboneWithFPN
    features = timm.create_model(ours, pretrained=True, features_only=True, out_indices=pyramid)
    names = (name.replace('.', '_') for name in features.feature_info.module_name())
    levels = {name: str(level) for level, name in enumerate(names)}  # as FasterRCNN's
    backbone = BackboneWithFPN(features, levels, features.feature_info.channels(), out_channels=16)
    anchors = AnchorGenerator(((8,), (16,), (32,), (64,), (96,)), ((0.5, 1., 2.),) * 5)
    arguments: dict = dict(num_classes=3, min_size=64, max_size=96)
    if kind == 'FasterRCNN':
        arguments.update(rpn_anchor_generator=anchors, box_score_thresh=0., box_detections_per_img=10)
    else:
        arguments.update(anchor_generator=anchors, score_thresh=0., detections_per_img=10)
    detector = getattr(detection, kind)(backbone, **arguments)

    x = torch.randn(1, 3, 64, 96)
    plain = timm.create_model(ours, pretrained=True).eval()
    with torch.no_grad():
        torch.testing.assert_close(
            list(detector.eval().backbone.body(x).values()),
            plain.forward_intermediates(x, indices=pyramid, intermediates_only=True))
        images = [torch.rand(3, 64, 80), torch.rand(3, 75, 64)]
        for image, found in zip(images, detector(images), strict=True):
            assert found['boxes'].shape == (10, 4) and found['labels'].shape == (10,)
            corners = found['boxes'].reshape(-1, 2)
            assert (corners >= 0).all() and (corners <= torch.tensor(image.shape[:0:-1])).all()

    target = dict(boxes=torch.tensor([[8., 8., 40., 40.]]), labels=torch.tensor([1]))
    losses = detector.train()(images, [target, target])
    assert losses and all(loss.isfinite() and loss > 0 for loss in losses.values())
    sum(losses.values()).backward()
    assert_own_layers_learn(detector)


def test_graph_of_features(ours, needs, record_property, assert_maps_close):
    needs('torchvision', '`create_feature_extractor`: two stages', ours)
    from torch.fx.proxy import TraceError
    from torchvision.models.feature_extraction import create_feature_extractor
    model = timm.create_model(ours, pretrained=True).eval()
    indices = [2, len(model.feature_info) - 1]
    nodes = {model.feature_info[index]['module']: str(index) for index in indices}
    with pytest.raises(TraceError, match='control flow'):  # attention looks at sizes in Python
        create_feature_extractor(model, nodes)
    record_property(
        'result', 'needs `tracer_kwargs=dict(leaf_modules=timm.models.get_notrace_modules())`; '
        "timm's own `create_feature_extractor` does that itself")
    graph = create_feature_extractor(model, nodes, tracer_kwargs=dict(leaf_modules=timm.models.get_notrace_modules()))
    x = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        expected = model.forward_intermediates(x, indices=indices, intermediates_only=True)
        assert_maps_close(graph(x).values(), expected)
