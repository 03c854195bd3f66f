"""What a model's text says: content, reasoning and tool calls, one parser for each family of chat templates (pure).

A parser is a function of the text so far: however a stream is cut into pieces, and wherever it is taken up again, what
was said up to a place is the same. What may still become a call is held back until it is known.
"""
