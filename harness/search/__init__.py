"""Who proposes the next point of a search, and the studies that the dashboard shows. Optuna is imported here
and by the dashboard only.
"""

import optuna

optuna.logging.set_verbosity(optuna.logging.WARNING)  # it would announce every study, trial and resample
