"""HTTP for every server of the project: errors in OpenAI's shape, limits, server-sent events."""
