"""Where parameters live, and how a block gets whole ones: shards, gathers ahead, memory of the host."""
