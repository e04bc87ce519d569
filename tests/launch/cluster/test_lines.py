"""Nothing that a setting says becomes another line, another word or an option."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from amfm.launch.cluster.hosts import read_hosts
from amfm.launch.cluster.lines import (
    check_host,
    remote_command,
    sbatch_directive,
    sbatch_extra,
    shell_line,
    with_variables,
)
from amfm.launch.cluster.slurm import write_script
from tests.helpers.tiny_store import make_tiny_store
from tests.pretrain.tiny_run import tiny_config

EVIL = "x\ntouch planted"


@pytest.mark.parametrize(
    "launch",
    [
        {"slurm": {"partition": EVIL}},
        {"slurm": {"time_limit": EVIL}},
        {"slurm": {"account": "a\rb"}},
        {"slurm": {"extra": [f"--constraint={EVIL}"]}},
        {"slurm": {"extra": ["touch planted"]}},
        {"slurm": {"modules": [EVIL]}},
        {"slurm": {"memory": EVIL}},
    ],
)
def test_a_setting_that_would_become_another_line_of_the_script_is_refused(tmp_path: Path, launch: dict) -> None:
    config = tiny_config(make_tiny_store(tmp_path, num_documents=20), tmp_path / "run").model_copy()
    config = type(config).model_validate(config.model_dump(mode="json") | {"launch": launch})
    with pytest.raises(ValueError, match=r"launch\.slurm\."):
        write_script(config, [], [], nodes=1, ranks_per_node=1)


def test_a_name_of_several_words_stays_one_value_and_a_newline_in_it_is_refused() -> None:
    assert sbatch_directive("job-name", "a b # c", "run.name") == "#SBATCH --job-name='a b # c'"
    assert sbatch_directive("nodes", 3, "--nodes") == "#SBATCH --nodes=3"
    assert sbatch_extra("--constraint=h100") == "#SBATCH --constraint=h100"
    with pytest.raises(ValueError, match=r"run\.name=.* must be one line"):
        sbatch_directive("job-name", EVIL, "run.name")


@pytest.mark.parametrize("name", ["-oProxyCommand=touch planted", "-l", "a b", "a;b", "$(a)", "a\nb", ""])
def test_a_host_that_is_an_option_or_more_than_a_word_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must be a name or an address"):
        remote_command(["ssh"], name, "true")
    if name.strip() and "\n" not in name:
        (tmp_path / "hosts").write_text(f"first\n{name}\n")
        with pytest.raises(ValueError, match="must be a name or an address"):
            read_hosts(tmp_path / "hosts")


def test_names_addresses_and_users_are_hosts() -> None:
    for name in ("node-1", "10.0.0.1", "me@node.cluster", "[fe80::1%eth0]"):
        assert check_host(name, "--hosts") == name


def test_words_stay_words_whatever_is_in_them() -> None:
    words = ["a b", "$(touch planted)", "it's", "-x", "new\nline", ""]
    assert shlex.split(shell_line([["cd", "/a b"], ["exec", *words]])) == ["cd", "/a b", "&&", "exec", *words]
    assert with_variables({"A": "b c"}, ["x"]) == ["env", "A=b c", "x"] and with_variables({}, ["x"]) == ["x"]
