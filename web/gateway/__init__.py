"""One OpenAI-compatible endpoint of a cluster.

http     connections, routes, server-sent events     openai   requests, generations, answers, events
text     templates, tokens, detokenizer              routing  which scheduler runs which request
resume   a stream's identity, and how it goes on elsewhere

Imports run http -> resume -> openai -> routing and text; the last two know nothing of the others, nor of each other.
"""
