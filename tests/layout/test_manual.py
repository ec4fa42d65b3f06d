"""The examples in the module docstrings are the manual: they run."""

import doctest
import importlib

import pytest


@pytest.mark.parametrize("name", ["run", "rows", "space", "layout", "plan", "stripe", "survival"])
def test_examples(name: str) -> None:
    failed, tried = doctest.testmod(importlib.import_module(f"outlast.layout.{name}"))
    assert tried
    assert not failed
