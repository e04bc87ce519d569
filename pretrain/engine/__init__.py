"""DeepSpeed's engine, and what happens to gradients before it steps."""
