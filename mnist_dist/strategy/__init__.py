"""Who computes, and how they reduce: one interface, one implementation a backend, and the choice of one."""
