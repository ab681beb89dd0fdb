"""The slim training loop of Hidden Positives: run from the checkout, not installed."""
