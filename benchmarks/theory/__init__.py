"""The claims made for the gate, checked on students small enough to be exact: docs/theory.md."""
