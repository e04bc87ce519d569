"""What a test registers in its process is gone after it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import pytest

from amfm.data_pipeline.prepare.own_code import CodeSpec
from amfm.model.config import registering
from amfm.model.config.plugins import CACHES, IN_PROCESS, PluginSections
from amfm.model.config.section import Section


@pytest.fixture(autouse=True)
def nothing_stays_registered() -> Iterator[None]:
    modules = set(sys.modules)
    models = set(registering._below(Section))
    before = {model: {name: info.annotation for name, info in model.model_fields.items()} for model in models}
    packages = {model: model.packages for model in models if issubclass(model, PluginSections)}
    yield
    for model, known in before.items() if IN_PROCESS else ():
        for name in model.model_fields.keys() - known.keys():
            del model.model_fields[name]
        for name, annotation in known.items():
            model.model_fields[name].annotation = annotation
    for section, of in packages.items():
        if section.packages is of:
            continue
        section.packages = of
        done: dict[Any, bool] = {}
        for each in models:
            registering._rebuild(each, section, done)
    IN_PROCESS.clear()
    CodeSpec.registered.clear()
    for clear in CACHES:
        clear()
    registering.only_read(False)
    for name in set(sys.modules) - modules:
        if name.partition(".")[0].startswith("my_parts"):
            del sys.modules[name]
