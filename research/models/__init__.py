"""Model families: a frozen config with `make(rngs)`, and the Flax NNX module it makes."""
