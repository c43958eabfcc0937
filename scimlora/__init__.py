"""Teach SCimilarity your own atlas: LoRA adapters on a frozen single-cell foundation model."""
from importlib import import_module

__version__ = "0.1.0"

# Names are looked up when they are used (PEP 562): `import scimlora` stays fast, and needs no torch.
_HOME = {"Base": "base", "Bundle": "bundle", "Classifier": "classifier", "Predictor": "predict", "TuneConfig": "lora",
         "InputError": "core", "ScimloraError": "core", "read_cells": "files"}
__all__ = sorted(_HOME)


def __getattr__(name):
    if name in _HOME: return getattr(import_module(f"scimlora.{_HOME[name]}"), name)
    raise AttributeError(f"module 'scimlora' has no attribute '{name}'")


def __dir__(): return sorted([*globals(), *_HOME])
