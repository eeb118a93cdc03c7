"""Comparisons with other checkpointers: states (`workloads`), who saves them (`peers`), the measuring (`run`)."""
