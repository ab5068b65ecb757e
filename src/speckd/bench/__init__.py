"""`speckd bench`: methods × teachers × starts × data × seeds from one declarative file, with paired statistics."""
