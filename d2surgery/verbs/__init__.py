"""The verbs of the command line that look at adapters, as Python functions of paths: results with rows and figures."""
