"""What to run: one file an experiment; `config()` returns it, the docstring tells its result."""
