"""The decoder, its checkpoints and its tokenizers: what the sampler and the learner share."""
