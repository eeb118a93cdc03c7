"""Comparisons with other checkpointers, `python tests/bench --help`.

States (`workloads`), who saves them (`peers`, `file_peers`), how long they take (`timing`) and how much memory
(`memory`), questions about jaxckpt alone (`special`), what is asked of it (`bars`), and how all of it is told
(`report`, `chart`).
"""
