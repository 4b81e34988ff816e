"""deltamux serves many fine-tunes of one frozen base model from one process group."""

from importlib.metadata import version

__version__ = version("deltamux")
