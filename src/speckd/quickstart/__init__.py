"""The two-command demonstration: a shipped teacher, small students, every method side by side."""
