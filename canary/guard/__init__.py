"""Guard any OpenAI-compatible server with Canary: turns are judged in their dialogue.

`routes.guard_routes` returns the routes. `dialogue` reads requests, `answers` holds each sentence
of an answer until it is judged. `policy` sets what follows from a label, `audit` records it.
"""
