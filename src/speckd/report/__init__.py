"""`speckd report`: runs, evaluations and benchmarks as one page that needs nothing else."""
