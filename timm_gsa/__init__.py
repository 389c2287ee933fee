"""timm_gsa: attention networks and rivals as timm models. Importing it registers the models."""
from ._check import require_supported_timm
from .version import __version__ as __version__

require_supported_timm()

from . import layers, models, ops  # noqa: E402
from ._fuse import fuse  # noqa: E402
from .interpret import attention_maps, attention_rollout  # noqa: E402
from .ops import explain, use_backend  # noqa: E402

__all__ = ['attention_maps', 'attention_rollout', 'explain', 'fuse', 'layers', 'models', 'ops', 'use_backend']
