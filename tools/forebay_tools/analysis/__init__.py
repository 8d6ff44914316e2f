"""How large a cache should be: traces, their replay through the daemon's own policy, and what follows from it."""
