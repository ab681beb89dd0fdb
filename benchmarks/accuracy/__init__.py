"""Results against the reference in float64: the check before timing, and rounding errors by op and dtype."""
