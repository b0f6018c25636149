"""What can go wrong, as one family of exceptions: each message names file, key, what was found and what is accepted."""


class MiniloraError(Exception):
    """Every error that minilora raises on purpose."""


class ConfigError(MiniloraError, ValueError):
    """An option has a value that cannot work."""


class FormatError(MiniloraError, ValueError):
    """A file does not hold what its format promises."""


class DataError(MiniloraError, ValueError):
    """A row of training or evaluation data cannot be used."""


class TargetError(MiniloraError, ValueError):
    """A module or an adapter was named that does not exist."""


class ShapeError(MiniloraError, ValueError):
    """Tensors do not fit together."""


class TrainingError(MiniloraError, RuntimeError):
    """Training cannot go on: a loss or a gradient is not finite, or a run does not fit its directory."""
