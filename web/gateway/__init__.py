"""One OpenAI-compatible endpoint of a cluster.

http     connections, routes, server-sent events     openai   requests, generations, answers, events
text     templates, tokens, detokenizer              routing  which scheduler runs which request
resume   a stream's identity, and how it goes on elsewhere

A request passes them in that order; `routing` and `text` know nothing of the others.
"""
