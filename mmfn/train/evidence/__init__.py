"""Evidence: cards that state what a model, data and a layout must give, and what a machine measures of it."""
