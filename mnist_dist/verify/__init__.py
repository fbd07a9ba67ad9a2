"""Whether this cluster trains correctly: fourteen checks, one verdict. See docs/verify.md."""
