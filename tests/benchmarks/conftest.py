"""What several tests of this folder start from."""

from tests.pretrain.conftest import base

__all__ = ["base"]
