"""Public benchmarks from the TSV files that users have: questions, scores of answers, and tables of both."""
