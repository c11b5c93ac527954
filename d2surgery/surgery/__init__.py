"""Surgery: adapters as other kinds, of other ranks, of two models, of several; each result with its error."""
