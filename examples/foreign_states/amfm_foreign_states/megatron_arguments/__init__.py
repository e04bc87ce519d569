"""Arguments of Megatron-LM's programs as our settings: to write a configuration, and to compare a checkpoint with one."""
