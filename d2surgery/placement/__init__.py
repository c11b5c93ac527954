"""Where an adapter lands in a base."""
