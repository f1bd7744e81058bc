"""The method: paths, losses, guidance, solvers, recipes."""
