"""The three families; importing this registers them with timm."""
from . import gsa_resnet, priorattn_resnet, san
from .gsa_resnet import GSAResNet
from .priorattn_resnet import PriorAttentionResNet
from .san import SAN

__all__ = ['SAN', 'GSAResNet', 'PriorAttentionResNet', 'gsa_resnet', 'priorattn_resnet', 'san']
