"""What surrounds a step: checkpoints, resuming, signals, ranks, the output folder, progress and errors of programs."""
