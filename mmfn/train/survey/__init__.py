"""What is in a data set: counts, lengths, how full its batches are, what is wrong with it, and how it reads."""
