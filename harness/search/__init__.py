"""Who proposes the next point of a search, and the studies that the dashboard shows. Optuna is imported here
only.
"""
