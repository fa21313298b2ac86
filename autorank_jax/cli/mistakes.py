"""What ends a command with an exit code and its message; loaded late, so that Ctrl-C finds the program at work."""

from autorank_jax.cli.folders import ReportError
from autorank_jax.datasets import DatasetError
from autorank_jax.experiment.mistakes import ConfigurationError
from autorank_jax.experiment.results import DivergedError, LanguageDivergedError
from autorank_jax.interface.paths import PathError
from autorank_jax.ranks.table_file import CriteriaError

SEVERAL = ConfigurationError
"""With a line for each of its `problems`."""
SINGLE = (CriteriaError, DatasetError, ReportError, PathError)
DIVERGED = (DivergedError, LanguageDivergedError)
