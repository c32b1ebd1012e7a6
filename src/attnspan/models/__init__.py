"""Hugging Face models: attaching, caching, loading, and the bundled model."""

from attnspan.models.attach import attach
from attnspan.models.cache import Cache
from attnspan.models.step import StepGraph

__all__ = ["Cache", "StepGraph", "attach"]
