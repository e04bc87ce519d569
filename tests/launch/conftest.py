"""What several tests of this folder start from."""

from tests.pretrain.conftest import base, data

__all__ = ["base", "data"]
