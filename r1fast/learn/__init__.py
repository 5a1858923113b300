"""Learning: rewards to advantages, rollouts to packed batches, losses, optimizer steps. Never imports rollout."""
