"""The stream's promise and its three keepers: CUDA, a CPU worker thread, virtual time."""
