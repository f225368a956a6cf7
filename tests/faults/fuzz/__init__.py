"""Random damage to everything that a run reads, and the documented outcomes that each case must end in."""
