"""Between text and tokens: chat templates before the model; vocabulary, detokenizer, stop strings after it (pure)."""
