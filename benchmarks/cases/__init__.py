"""Models and data as people bring them, each with one fault that public reports name, and what a right answer is."""
