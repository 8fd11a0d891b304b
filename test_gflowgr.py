"""Tests of gflowgr.py, tokenizer.py and reward.py: python -m pytest -q test_gflowgr.py"""
import doctest

import pytest

import gflowgr
import reward
import tokenizer


@pytest.mark.parametrize("module", [gflowgr, reward, tokenizer], ids=lambda module: module.__name__)
def test_examples_in_docstrings(module):
    assert doctest.testmod(module).failed == 0
