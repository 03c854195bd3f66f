"""Decisions of the control plane, sans-IO: who is alive, who serves what, and how to get there safely.

Nothing here awaits, reads a clock, draws random numbers or opens a socket; time comes in as an argument.
`controller.Controller.step(event, now, unix_now)` returns the effects that `controlplane.shell` performs in order.
"""
