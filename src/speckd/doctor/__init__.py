"""`speckd doctor`: what would go wrong in a run, found before it, each with its fix."""
