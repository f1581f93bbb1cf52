"""What can be wrong with a checkpoint."""


class ModelError(Exception):
    """A checkpoint, its config or its tensors are not what they should be; says what, where and what instead."""


class DependencyError(ModelError):
    """A package which only some need is not installed; the message says which."""
