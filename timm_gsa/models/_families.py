"""One record for each family: tables, model cards, commands, benchmarks and tests take their lists from here.

Adding a family is its model file with the layer and operation files it needs, a record here and its tests.
"""
from collections.abc import Mapping
from dataclasses import dataclass, field

from timm.models import is_model_pretrained

from ._zoo import entries

__all__ = ['FAMILIES', 'Family', 'family_of', 'tiny_models', 'trained_models']


@dataclass(frozen=True)
class Family:
    """One paper and its models.

    Attributes:
        name: Module in `timm_gsa.models`.
        title: Name in texts.
        arxiv: arXiv number of the paper.
        bibtex: Citation of the paper.
        prefix: Start of the names of its models.
        tiny: Models that train on a CPU, one for each kind of attention.
        smallest: The smallest model of the paper's size for each kind.
        usual: Models that benchmarks compare with ResNet-50.
        verified: What is verified, in Markdown.
        ours: What is our choice, in Markdown.
        attention: True if `timm_gsa.attention_maps` reads its models.
        map_sizes: Side of the image, in pixels, at which the maps of a pretrained model are drawn, where its own size
            makes them small: the largest at which it still classifies well, by tools/measure/sizes.py.
        sized: True if its models take `img_size`.
        strides: Strides of the maps that its models give as features.
        output_strides: Values of `output_stride` that its models take.
        small_stem: True if its models take `stem_type='small'`.
        final_norm: True if a norm stands between the last of these maps and the pool.
        code: Address of the authors' code.
        code_license: Licence of that code and of the authors' weights.
        reported: ImageNet-1k top-1 in percent by model, as the paper reports it.
        reported_status: Source of `reported`; nothing of it was measured here.
        reported_confirmed: True if `reported` was read at the source. Tables show confirmed figures only.
        weights: Where weights of the models in `reported` come from, one sentence.
        excused: Test functions of timm that its models cannot pass, and why.
    """

    name: str
    title: str
    arxiv: str
    bibtex: str
    prefix: str
    tiny: tuple[str, ...]
    smallest: tuple[str, ...]
    usual: tuple[str, ...]
    verified: str
    ours: str
    attention: bool
    map_sizes: Mapping[str, int] = field(default_factory=dict)
    sized: bool = False
    strides: tuple[int, ...] = (2, 4, 8, 16, 32)
    output_strides: tuple[int, ...] = (8, 16, 32)
    small_stem: bool = False
    final_norm: bool = False
    code: str | None = None
    code_license: str | None = None
    reported: Mapping[str, float] = field(default_factory=dict)
    reported_status: str = ''
    reported_confirmed: bool = False
    weights: str = ''
    excused: Mapping[str, str] = field(default_factory=dict)


FAMILIES = (
    Family(
        name='gsa_resnet',
        title='GSA-ResNet',
        arxiv='2010.03019',
        bibtex="""\
@misc{shen2020global,
  title = {Global Self-Attention Networks for Image Recognition},
  author = {Zhuoran Shen and Irwan Bello and Raviteja Vemulapalli and Xuhui Jia and Ching-Hui Chen},
  year = {2020}, eprint = {2010.03019}, archivePrefix = {arXiv}
}""",
        prefix='gsa_resnet',
        tiny=('gsa_resnet_tiny',),
        smallest=('gsa_resnet26',),
        usual=('gsa_resnet50',),
        verified=(
            'parameters and multiply-adds agree with what we recall of the paper (18.1 M and 3.6 G for 50 layers, '
            '30.4 M and 6.1 G for 101); we could not read its text'
        ),
        ours=(
            'initialisation, norm of the query, no bias or norm on key and value, pool before norm, shortcut, '
            'resampling of tables'
        ),
        attention=True,
        map_sizes={'gsa_resnet50': 96},
        sized=True,
        small_stem=True,
        reported={'gsa_resnet50': 78.5, 'gsa_resnet101': 79.6},
        reported_status='recalled; an author states +1.6 over ResNet-50 for 50 layers',
        excused={'test_headless_checkpoint_reload': 'reads no foreign checkpoints, so it has no filter'},
    ),
    Family(
        name='san',
        title='SAN',
        arxiv='2004.13621',
        bibtex="""\
@inproceedings{zhao2020exploring,
  title = {Exploring Self-attention for Image Recognition},
  author = {Hengshuang Zhao and Jiaya Jia and Vladlen Koltun},
  booktitle = {CVPR}, year = {2020}
}""",
        prefix='san',
        tiny=('san_tiny_pairwise', 'san_tiny_patchwise'),
        smallest=('san10_pairwise', 'san10_patchwise'),
        usual=('san10_patchwise', 'san10_pairwise'),
        verified=(
            "operations, modules and networks against the authors' code in float64, with gradients and running "
            'statistics; parameters and costs'
        ),
        ours='maps smaller than reflection allows, `output_stride`, stochastic depth',
        attention=True,
        small_stem=True,
        code='https://github.com/hszhao/SAN',
        code_license='mit',
        reported={
            'san10_pairwise': 74.9, 'san15_pairwise': 76.6, 'san19_pairwise': 76.9,
            'san10_patchwise': 77.1, 'san15_patchwise': 78.0, 'san19_patchwise': 78.2,
        },
        reported_status="the authors' README",
        reported_confirmed=True,
        weights="the authors' file, by timm-gsa convert-san",
        excused={
            'test_resnetv2_stem_feature_odd_size':
                "expects a stem that rounds odd sizes up; SAN's is the authors' max pool, which rounds down",
        },
    ),
    Family(
        name='priorattn_resnet',
        title='prior-attention ResNet',
        arxiv='2006.07872',
        bibtex="""\
@inproceedings{tan2021explicitly,
  title = {Explicitly Modeled Attention Maps for Image Classification},
  author = {Andong Tan and Duc Tam Nguyen and Maximilian Dax and Matthias Nie{\\ss}ner and Thomas Brox},
  booktitle = {AAAI}, year = {2021}
}""",
        prefix='priorattn_resnet',
        tiny=('priorattn_resnet_tiny',),
        smallest=('priorattn_resnet18',),
        usual=('priorattn_resnet50',),
        verified="a reconstruction; the paper's parameter and FLOP claims for depth 152 are reproduced",
        ours='one radius a layer, its initial value and unit, pool before the value projection, depths 18 and 34',
        attention=True,
        small_stem=True,
        reported={'priorattn_resnet152': 80.0},
        reported_status='derived from the claim of +0.9 over AA-ResNet-152',
        excused={'test_headless_checkpoint_reload': 'reads no foreign checkpoints, so it has no filter'},
    ),
    Family(
        name='smlpnet',
        title='sMLPNet',
        arxiv='2109.05422',
        bibtex="""\
@inproceedings{tang2022sparse,
  title = {Sparse {MLP} for Image Recognition: Is Self-Attention Really Necessary?},
  author = {Chuanxin Tang and Yucheng Zhao and Guangting Wang and Chong Luo and Wenxuan Xie and Wenjun Zeng},
  booktitle = {AAAI}, year = {2022}
}""",
        prefix='smlpnet',
        tiny=('smlpnet_mini',),
        smallest=('smlpnet_tiny',),
        usual=('smlpnet_tiny',),
        verified=(
            "modules and whole networks against the authors' code in float64, with gradients and running statistics; "
            'parameters and costs'
        ),
        ours='images of another size than 224 and another aspect ratio, `smlpnet_mini`',
        attention=True,
        sized=True,
        strides=(4, 8, 16, 32),
        output_strides=(32,),
        final_norm=True,
        code='https://github.com/microsoft/SPACH',
        code_license='mit',
        reported={'smlpnet_tiny': 81.9, 'smlpnet_small': 83.1, 'smlpnet_base': 83.4},
        reported_status="the authors' README",
        reported_confirmed=True,
        weights="the authors' file, by timm-gsa convert-smlpnet",
        excused={
            'test_forward_after_prune_intermediate_layers':
                "expects the last map to be the features; between them sMLPNet has the authors' norm, which "
                'forward_intermediates(norm=True) puts into the map',
            'test_model_features_output_stride':
                'a mixing matrix belongs to the positions of one stride: output_stride is an error that says so',
            'test_resnetv2_stem_feature_odd_size':
                'expects a map of stride 2; sMLPNet begins with patches of 4 x 4 pixels',
        },
    ),
    Family(
        name='dcac',
        title='DC-AC',
        arxiv='2208.06980',
        bibtex="""\
@misc{wong2022faster,
  title = {Faster Attention Is What You Need: A Fast Self-Attention Neural Network Backbone Architecture for the Edge
    via Double-Condensing Attention Condensers},
  author = {Alexander Wong and Mohammad Javad Shafiee and Saad Abbasi and Saeejith Nair and Mahmoud Famouri},
  year = {2022}, eprint = {2208.06980}, archivePrefix = {arXiv}
}""",
        prefix='dcac',
        tiny=('dcac_mini',),
        smallest=('dcac_325mf',),
        usual=('dcac_325mf',),
        verified=(
            "reduced networks against the authors' code in float64, with gradients and running statistics; parameters "
            'and names'
        ),
        ours='`output_stride`, stochastic depth, `dcac_mini`; AttendNet-A and -B are unpublished and cannot be rebuilt',
        attention=True,
        excused={
            'test_reset_classifier_keeps_pool':
                'tells pools apart by features of a fresh network in eval mode, where each gate of DC-AC divides by '
                "its number of channels: they are below 1e-12, the test's tolerance is 1e-8",
        },
    ),
)


def family_of(model: str) -> Family:
    """Record of the family of a model of this package.

    Args:
        model: Registered name, also with a tag (arch.tag).

    Raises:
        ValueError: The model is not of this package.
    """
    for family in FAMILIES:
        if model.startswith(family.prefix):
            return family
    raise ValueError(f'model must start with {", ".join(family.prefix for family in FAMILIES)}, got {model!r}')


def map_size(architecture: str) -> int | None:
    """Height and width in pixels at which maps of a model's pretrained weights are drawn; None: those of its training.

    Args:
        architecture: Name without a tag, of any package.
    """
    return next((family.map_sizes[architecture] for family in FAMILIES if architecture in family.map_sizes), None)


def tiny_models(attention: bool = False, untrained: bool = False) -> tuple[str, ...]:
    """Names of the tiny models of all families that have weights in the package.

    Args:
        attention: Leave out families that have no attention to show.
        untrained: Name the models without weights, too.
    """
    names = (name for family in FAMILIES if family.attention or not attention for name in family.tiny)
    return tuple(name for name in names if untrained or is_model_pretrained(name))


def trained_models(attention: bool = False) -> tuple[str, ...]:
    """Names of the architectures that have weights in the package; models of the papers come first.

    Args:
        attention: Leave out families that have no attention to show.
    """
    names = dict.fromkeys(entry.partition('.')[0] for entry in entries())
    shown = (name for name in names if family_of(name).attention or not attention)
    return tuple(sorted(shown, key=lambda name: name in family_of(name).tiny))
