"""Which replicas compute, and how they reduce: one interface, an implementation per backend, and the choice of one."""
