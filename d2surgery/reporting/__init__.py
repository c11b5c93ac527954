"""Records to rows, figures and self-contained pages."""
