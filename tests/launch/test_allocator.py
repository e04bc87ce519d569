"""What the command line says to PyTorch's allocator, and when."""

import json
import os
import subprocess

import pytest

from amfm.launch.rank_command import expand_segments, isolated_python


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_what_the_user_says_of_the_allocator_stays(name):
    environment = {name: "max_split_size_mb:512"}
    expand_segments(environment)
    assert environment == {name: "max_split_size_mb:512"}


def test_the_command_line_asks_for_segments_that_grow_before_torch_is_imported():
    code = "import sys, os, json, amfm.launch.__main__ as m; sys.argv = ['amfm', '--version']; "
    code += "sys.modules['amfm.launch.cli'] = type(sys)('cli'); sys.modules['amfm.launch.cli'].main = lambda: None; m.main(); "
    code += "print(json.dumps([os.environ['PYTORCH_ALLOC_CONF'], 'torch' in sys.modules]))"
    environment = {name: value for name, value in os.environ.items() if "ALLOC_CONF" not in name}
    done = subprocess.run([*isolated_python(), "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == ["expandable_segments:True", False]
