"""Results as tables and plots for the documentation."""
