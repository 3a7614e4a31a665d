"""The verbs of CO3, one module each: flags, and the function that runs them."""
