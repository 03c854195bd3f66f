"""OpenAI's API: requests checked and turned into sampling, generations, and the answers and events written of them."""
