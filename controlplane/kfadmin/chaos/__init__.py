"""`kfadmin chaos`: game days, faults on a schedule against a live cluster whose every stream is checked."""
