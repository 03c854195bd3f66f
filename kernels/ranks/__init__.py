"""What several ranks of one stage need on a host: sums that do not depend on how many they are, and how they are had.

`sums` has the number format, `exchange` the all-reduce in shared memory, `layout` who computes what."""
