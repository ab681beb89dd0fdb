"""How calls are timed, what the machine did meanwhile, and what a time means."""
