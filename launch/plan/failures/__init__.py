"""What failures cost a run: replicas of checkpoints in memory, and goodput."""
