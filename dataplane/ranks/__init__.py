"""Ranks of a stage: processes that share its layers' work, each of which may end without ending the stage."""
