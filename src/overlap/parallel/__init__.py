"""One model on several ranks: the group that sums over them, and the processes that follow the one that serves."""
