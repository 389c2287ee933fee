"""Marks of tests that need a release of timm."""
import pytest
import timm
from packaging.version import Version

reads_local_dir = pytest.mark.skipif(
    Version(timm.__version__) < Version('1.0.28'),
    reason='such a timm takes the safetensors file of a local-dir for a pickle')
