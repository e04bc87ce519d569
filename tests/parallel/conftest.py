"""Data that several tests of this folder train on."""

from tests.pretrain.conftest import data

__all__ = ["data"]
