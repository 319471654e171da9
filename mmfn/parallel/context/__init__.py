"""One packed batch over several ranks: the order of tokens, frames of towers, and attention between ranks."""
