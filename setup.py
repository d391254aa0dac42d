"""Metadata lives in pyproject.toml; this file is here for build commands, which TOML cannot say."""

from setuptools import setup

setup()
