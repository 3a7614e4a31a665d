"""The verbs of `prosocial`, one module each: flags, and the function that runs them."""
