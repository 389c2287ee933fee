"""`python -m timm_gsa COMMAND`, the same as the console script `timm-gsa`."""
from .commands import console

if __name__ == '__main__':
    console()
