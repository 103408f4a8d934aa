"""The three ways in which a run is refused or fails; Hydra prints each as its sentence, without a traceback."""

from hydra.errors import CompactHydraException


class QexpError(CompactHydraException):
    """One clear sentence that names the setting, its value and what is allowed."""


class ConfigError(QexpError):
    """The configuration alone shows that this can't work: raised before any work."""


class InputError(QexpError):
    """A checkpoint, a data set, a model or a server is not what the configuration says: raised before a run starts."""


class RunError(QexpError):
    """A run that had started can't be finished, or its result can't be trusted: the run ends as FAILED."""


class NotFinite(RunError):
    """The model gives NaN or infinity, for one image or for all of them."""
