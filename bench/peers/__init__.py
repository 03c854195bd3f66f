"""The engines that we are compared with: each in a process of its own, driven over JSON lines.

A peer's module runs in the peer's interpreter, which may have other versions of everything; so these modules import
nothing but the standard library, `protocol`, and the peer. The side that starts them is `client`.
"""
