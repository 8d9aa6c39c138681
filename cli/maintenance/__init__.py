"""`lightopd cache`: what caches there are, and how they are merged, split and cleared."""
