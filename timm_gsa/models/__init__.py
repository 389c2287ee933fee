"""The families; importing this registers them with timm."""
from . import dcac, gsa_resnet, priorattn_resnet, san, smlpnet
from .dcac import DCAC
from .gsa_resnet import GSAResNet
from .priorattn_resnet import PriorAttentionResNet
from .san import SAN
from .smlpnet import SMLPNet

__all__ = [
    'DCAC',
    'GSAResNet',
    'PriorAttentionResNet',
    'SAN',
    'SMLPNet',
    'dcac',
    'gsa_resnet',
    'priorattn_resnet',
    'san',
    'smlpnet',
]
