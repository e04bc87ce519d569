"""The file of a sound run, and what loading another one says."""

from pathlib import Path

import pytest

from amfm.pretrain.config.errors import ConfigError
from amfm.pretrain.config.file import load_config

BASE = """\
run:
  dir: runs/small
model:
  pattern: M*-
  vocab_size: 512
  hidden_size: 64
  mamba: {num_heads: 4, head_dim: 16, num_groups: 2}
  attention: {num_heads: 4, num_kv_heads: 2, head_dim: 16}
  feed_forward: {hidden_size: 128}
data:
  store: data/small
  tokenizer: {vocab_size: 512}
  sources:
    - name: plays
      paths: [plays.txt]
train:
  steps: 1e2
  sequence_length: 128
  micro_batch_size: 2
  global_batch_size: 4
optimizer:
  learning_rate: 1e-3
"""


def message_of(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return str(caught.value)


def written(folder: Path, text: str, name: str = "run.yaml") -> Path:
    path = folder / name
    path.write_text(text)
    return path
