"""Plans: a step traced without values, extended to all layers, costed for a device."""
