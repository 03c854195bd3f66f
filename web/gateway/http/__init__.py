"""What a client's connection meets: routes, API keys, the OpenAPI document, and answers on their way to the socket."""
