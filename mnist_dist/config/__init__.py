"""Every key of the configuration, its meaning and its range."""
