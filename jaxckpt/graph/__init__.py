"""What a checkpoint is: pure functions and frozen data, no I/O."""
