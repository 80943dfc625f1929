"""The HTTP API's clients: one sans-I/O core, a blocking and an asyncio transport."""
