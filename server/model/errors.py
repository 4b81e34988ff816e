"""Why a base model is refused.

ModelError
├── ModelNotFound       nothing is at the path or under the name
├── ModelCorrupt        a file is unreadable, or tensors and configuration disagree
└── ModelUnsupported    an architecture, configuration field or file format that is not served
"""


class ModelError(Exception):
    """A base that will not be served. The message names what was wrong, where, and what to do."""


class ModelNotFound(ModelError):
    """Nothing is at the path or under the name."""


class ModelCorrupt(ModelError):
    """A file is missing or unreadable, or the tensors are not what the configuration promises."""


class ModelUnsupported(ModelError):
    """An architecture, configuration field or file format that is not served; names it."""
