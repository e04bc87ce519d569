"""What ranks hand to collectives, in bytes and seconds: in a stage, in a whole step, and in buckets of gradients."""
