"""Model cards: a template, a page for each family, and the generator that fills them from a saved model."""
