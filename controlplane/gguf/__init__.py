"""GGUF files: what is in them, and the files of a Hugging Face directory that say the same. For all planes."""
