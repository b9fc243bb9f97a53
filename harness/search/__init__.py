"""Who proposes the next point of a search, and the studies that the dashboard shows. Optuna is imported here
and by the dashboard only.
"""

import functools
import warnings

import optuna

# Around a call of Optuna that says it is experimental: `with quiet(): ...`.
quiet = functools.partial(
    warnings.catch_warnings, action="ignore", category=optuna.exceptions.ExperimentalWarning
)
optuna.logging.set_verbosity(optuna.logging.WARNING)  # it would announce every study, trial and resample
