"""`speckd evaluate`: what a model can do, how near it is to its teacher, and what it is worth as its draft model."""
