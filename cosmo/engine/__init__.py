"""How a model learns and answers: rooms whose imports go one way (WORKSPACE.md lists them)."""
