"""The pages that one reads after training: the report of a run with its explorer, and the comparison of runs."""
