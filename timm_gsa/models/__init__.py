"""The three families; importing this registers them with timm."""
from .gsa_resnet import *
from .priorattn_resnet import *
from .san import *
