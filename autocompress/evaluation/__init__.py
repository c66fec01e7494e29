"""One candidate from its policy to measured figures."""
