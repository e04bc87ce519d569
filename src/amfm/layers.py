"""One layer of a model as a torch module: `amfm.layers.build("mamba", 256, num_heads=8, head_dim=32)`."""

from amfm.launch.modules import Layer
from amfm.launch.modules import build_layer as build

__all__ = ["Layer", "build"]
